"""What is run again adds nothing, and what was deleted and made anew is not appended to."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forebay
from forebay.testing.parts import SCHEMA, write_part
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.errors import Conflict


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forebay.Client]:
    folder = tmp_path_factory.mktemp("again")
    prefix = f"file://{folder.parent}"
    with (
        DaemonProcess(folder / "data", "--origin-prefixes", prefix) as process,
        forebay.connect(process.data) as connected,
    ):
        yield connected


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write(tmp_path / "lines.jsonl", range(5))


def write(path: Path, numbers: range) -> Path:
    path.write_text("".join(json.dumps({"n": number, "text": "x"}) + "\n" for number in numbers))
    return path


def numbers(client: forebay.Client, name: str) -> list[int]:
    found: list[int] = client.dataset(name).table().column("n").to_pylist()
    return found


def test_an_append_that_is_run_again_adds_nothing(
    client: forebay.Client, name: str, lines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write(lines.with_name("other.jsonl"), range(7, 9))
    client.import_dataset(name, lines)
    client.import_dataset(name, lines, append=True)
    client.import_dataset(name, other, append=True)
    assert len(numbers(client, name)) == 12
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        assert client.import_dataset(name, lines, append=True).version == 2
        assert client.import_dataset(name, other, append=True).version == 3
    assert "version 2 has these files already" in caplog.text
    assert client.dataset(name).version == 3
    again = client.import_dataset(name, lines, append=True, again=True)
    assert (again.version, len(again)) == (4, 17)
    assert client.import_dataset(name, lines, append=True).version == 2
    assert client.import_dataset(name, lines, append=True, again=True).version == 5


def test_another_file_or_other_options_are_another_import(
    client: forebay.Client, name: str, lines: Path
) -> None:
    client.import_dataset(name, lines)
    client.import_dataset(name, lines, append=True)
    write(lines, range(100, 106))
    assert client.import_dataset(name, lines, append=True).version == 3
    assert client.import_dataset(name, [lines, lines], append=True).version == 4
    client.delete_dataset(name)
    client.import_dataset(name, lines)
    assert client.import_dataset(name, lines, append=True).version == 2
    assert numbers(client, name) == [*range(100, 106)] * 2


def test_a_table_is_appended_as_often_as_it_is_given(client: forebay.Client, name: str) -> None:
    table = pa.table({"n": [1, 2]})
    client.import_dataset(name, table)
    for version in (2, 3):
        assert client.import_dataset(name, table, append=True).version == version


# ------------------------------------------------------------------------------------- made anew


@pytest.fixture
def make_anew(client: forebay.Client, name: str) -> Callable[[], None]:
    """Delete the dataset, and make another one of its name and version."""

    def remake() -> None:
        assert client.delete_dataset(name)
        with client.create_dataset(name, SCHEMA) as writer:
            writer.write(n=999, text="")

    with client.create_dataset(name, SCHEMA) as writer:
        writer.write(n=0, text="")
    return remake


def test_a_session_does_not_append_to_another_dataset(
    client: forebay.Client, name: str, make_anew: Callable[[], None]
) -> None:
    session = client.write_session(name, append=True)
    write_part(session, 0)
    make_anew()
    with pytest.raises(Conflict, match="deleted since"):
        session.commit()
    assert numbers(client, name) == [999]


def test_an_import_does_not_append_to_another_dataset(
    client: forebay.Client, name: str, make_anew: Callable[[], None], lines: Path
) -> None:
    begun: list[int] = []

    def at_the_end(done: int, total: int) -> None:
        if done == total and not begun:
            begun.append(done)
            make_anew()

    with pytest.raises(Conflict, match="deleted since"):
        client.import_dataset(name, lines, append=True, progress=at_the_end)
    assert numbers(client, name) == [999]


def test_files_in_place_are_not_added_to_another_dataset(
    client: forebay.Client,
    name: str,
    make_anew: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "t.arrow"
    table = client.dataset(name).table()
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    look = type(client)._look

    def look_and_remake(self: forebay.Client, *given: object) -> object:
        found = look(self, *given)
        make_anew()
        return found

    monkeypatch.setattr(type(client), "_look", look_and_remake)
    with pytest.raises(Conflict, match="deleted since"):
        client.register_dataset(name, [path], append=True)
    assert numbers(client, name) == [999]


def test_appends_at_the_same_time_come_one_after_the_other(client, name, tmp_path):
    """Of the same files once, of others each: nobody has to try again."""
    for number in range(3):
        pq.write_table(pa.table({"x": [number] * 100}), tmp_path / f"{number}.parquet")
    client.import_dataset(name, tmp_path / "0.parquet")
    together = threading.Barrier(5)

    def append(number):
        together.wait(timeout=60)
        return client.import_dataset(name, tmp_path / f"{number}.parquet", append=True).version

    with ThreadPoolExecutor(5) as pool:
        versions = list(pool.map(append, [1, 1, 1, 2, 2]))
    assert sorted(set(versions)) == [2, 3]
    assert len(set(versions[:3])) == len(set(versions[3:])) == 1
    found = client.dataset(name).take(range(300))["x"]
    assert np.bincount(found).tolist() == [100, 100, 100]
