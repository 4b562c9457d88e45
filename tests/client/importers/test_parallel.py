"""One version written by many processes: every part once, whatever dies."""

import copy
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forebay
from forebay.dataset.parallel import WriteSession
from forebay.importers import tables
from forebay.importers.crew import Crew
from forebay.testing.parts import SCHEMA, FragileWork, write_part
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.errors import AlreadyExists, Conflict, NotFound, SchemaMismatch, StorageError

DEADLINE_SECONDS = 60.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("parallel") / "data") as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[forebay.Client]:
    with forebay.connect(daemon.data) as connected:
        yield connected


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


def numbers_of(client: forebay.Client, name: str) -> list[int]:
    return client.dataset(name).table().column("n").to_pylist()


def write_in_pool(session: WriteSession, numbers: list[int]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert all(pool.map(write_part, [session] * len(numbers), numbers))


def test_processes_write_one_version(client: forebay.Client, name: str) -> None:
    with client.write_session(name, SCHEMA, metadata={"a": 1}) as session:
        write_in_pool(session, [3, 1, 0, 2])
        assert session.parts() == {f"part-{number:03d}": 10 for number in range(4)}
        assert name not in client.datasets()
    assert numbers_of(client, name) == list(range(40))
    assert client.dataset(name).manifest.metadata == {"a": 1}
    with client.write_session(name, append=True) as session:
        assert write_part(session, 4)
    assert session.version == 2
    assert numbers_of(client, name) == list(range(50))


def test_a_part_counts_once(client: forebay.Client, name: str) -> None:
    with client.write_session(name, SCHEMA) as session:
        assert write_part(session, 0) is True
        assert write_part(copy.copy(session), 0, offset=1000) is False
    assert numbers_of(client, name) == list(range(10))


def test_a_dropped_part_is_written_anew(client: forebay.Client, name: str) -> None:
    with client.write_session(name, SCHEMA) as session:
        write_part(session, 0)
        assert session.drop("part-000") == 1
        assert write_part(session, 0, offset=5) is True
    assert numbers_of(client, name) == list(range(5, 15))


def test_order_and_completeness_are_the_callers(client: forebay.Client, name: str) -> None:
    session = client.write_session(name, SCHEMA)
    write_part(session, 0)
    write_part(session, 1)
    write_part(session, 2)
    with pytest.raises(NotFound, match=r"1 of 2 parts are not sealed \(part-007\)"):
        session.commit(["part-000", "part-007"])
    assert session.commit(["part-002", "part-000"]) == 1
    assert numbers_of(client, name) == [*range(20, 30), *range(10)]
    assert session.commit() == 1
    assert session.parts() == {}


def test_an_exception_leaves_nothing(client: forebay.Client, name: str) -> None:
    session = client.write_session(name, SCHEMA)

    def fail() -> None:
        with session:
            write_part(session, 0)
            assert session.parts()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert session.parts() == {}
    assert name not in client.datasets()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while client.status().num_uploads:
        assert time.monotonic() < deadline, "dropped parts keep their bytes"
        time.sleep(0.2)


def test_parts_agree_on_the_schema(client: forebay.Client, name: str) -> None:
    session = client.write_session(name)
    with session.part("a") as writer:
        writer.write(n=1)
    with pytest.raises(SchemaMismatch, match="another schema"), session.part("b") as writer:
        writer.write(n=1.5)
    assert list(session.parts()) == ["a"]
    session.abort()


def test_a_taken_name_is_found_at_the_commit(client: forebay.Client, name: str) -> None:
    for expected in (None, AlreadyExists):
        session = client.write_session(name, SCHEMA)
        write_part(session, 0)
        if expected is None:
            session.commit()
        else:
            with pytest.raises(expected):
                session.commit()
            session.abort()


def test_parts_outlive_daemon_and_writer(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "data") as process:
        with forebay.connect(process.data) as client:
            write_part(client.write_session("d", SCHEMA, write="nightly"), 0)
        process.kill()
        process.start()
        with forebay.connect(process.data) as client:
            session = client.write_session("d", SCHEMA, write="nightly")
            assert session.parts() == {"part-000": 10}
            write_part(session, 1)
            session.commit()
            assert numbers_of(client, "d") == list(range(20))


def test_a_job_that_runs_again_after_its_commit_changes_nothing(
    client: forebay.Client, name: str
) -> None:
    def job(append: bool) -> WriteSession:
        write = f"nightly-{append}"
        with client.write_session(name, SCHEMA, append=append, write=write) as session:
            write_part(session, 0)
            write_part(session, 1)
        return session

    assert [job(append=False).version for _ in range(2)] == [1, 1]
    assert [job(append=True).version for _ in range(2)] == [2, 2]
    assert len(client.dataset(name)) == 40
    again = client.write_session(name, append=True, write="nightly-True")
    assert again.version == 2
    assert write_part(again, 0) is False
    with client.write_session(name, append=True, write="nightly-8") as session:
        write_part(session, 0)
    assert session.version == 3
    client.delete_dataset(name, now=True)
    assert job(append=False).version == 1
    assert len(client.dataset(name)) == 20


def test_two_coordinators_of_one_write_commit_once(client: forebay.Client, name: str) -> None:
    client.write_session(name, SCHEMA).commit()
    one, other = (client.write_session(name, append=True, write="nightly") for _ in range(2))
    write_part(one, 0)
    assert [one.commit(), other.commit()] == [2, 2]
    assert len(client.dataset(name)) == 10


def test_a_part_sealed_after_the_commit_is_refused(client: forebay.Client, name: str) -> None:
    with client.write_session(name, SCHEMA) as session:
        write_part(session, 0)
    with pytest.raises(Conflict, match=r"committed as version 1, so part part-001 cannot count"):
        write_part(session, 1)


# -------------------------------------------------------------------------------------- crew


def test_a_part_whose_process_died_is_done_by_another(tmp_path: Path) -> None:
    crew = Crew(FragileWork(tmp_path), 2, 6)
    done = [part for part in crew.run(range(6)) if part is not None]
    assert sorted(done) == list(range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [*"012345", "died"]
    assert crew.done_bytes == sum(range(6))


@pytest.mark.slow  # three interpreters, one after the other
def test_a_part_that_kills_each_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="died 3 times"):
        list(Crew(FragileWork(tmp_path), 2, 8).run([7, 5]))


# ------------------------------------------------------------------------------------- import


def write_lines(folder: Path, num_files: int, rows: int = 100) -> list[int]:
    folder.mkdir()
    for number in range(num_files):
        lines = [json.dumps({"n": number * rows + n, "s": "x" * 50}) for n in range(rows)]
        (folder / f"{number:03d}.jsonl").write_text("\n".join(lines) + "\n")
    return list(range(num_files * rows))


def test_jobs_change_nothing(client: forebay.Client, name: str, tmp_path: Path) -> None:
    rows = write_lines(tmp_path / "in", 30, rows=1000)
    seen: list[tuple[int, int]] = []
    options = {"shard_bytes": 1 << 18, "progress": lambda *told: seen.append(told)}
    made = client.import_dataset(name, tmp_path / "in", jobs=2, **options)
    assert made.table().column("n").to_pylist() == rows
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


@pytest.mark.parametrize("row", ['{"n": null}', "{}"])
def test_a_missing_number_is_told_by_its_line(
    client: forebay.Client, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"n": 1}\n\n' * 50 + row + "\n")
    monkeypatch.setattr(tables, "RANGE_BYTES", 200)
    expected = (
        r"t.jsonl, line 101, column 'n': the value is missing, which int64 has no room for: "
        r"give --type n=float64"
    )
    with pytest.raises(SchemaMismatch, match=expected):
        client.import_dataset(name, path)
    made = client.import_dataset(name, path, types={"n": "float64"})
    assert np.isnan(made.table().column("n").to_pylist()[-1])


def test_an_import_that_was_killed_goes_on(
    client: forebay.Client, daemon: DaemonProcess, name: str, tmp_path: Path
) -> None:
    rows = write_lines(tmp_path / "in", 40, rows=1000)
    command = (
        "import forebay, pathlib, time\n"
        f"client = forebay.connect({str(daemon.data)!r})\n"
        f"told = pathlib.Path({str(tmp_path / 'told')!r})\n"
        "def tell(done, all): told.write_text(str(done)); time.sleep(0.05)\n"
        f"client.import_dataset({name!r}, {str(tmp_path / 'in')!r}, shard_bytes=1 << 18,"
        " progress=tell)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", command])
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (text := _read(tmp_path / "told")) or int(text) < 1 << 20:
        assert time.monotonic() < deadline
        assert child.poll() is None, "the import ended before it was killed"
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert name not in client.datasets()
    told: list[int] = []
    made = client.import_dataset(
        name, tmp_path / "in", shard_bytes=1 << 18, progress=lambda done, all: told.append(done)
    )
    assert told[0] > 1 << 19, "it began from the front"
    assert made.table().column("n").to_pylist() == rows


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_a_row_that_does_not_fit_is_named(
    client: forebay.Client, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 100)
    values = [None if row == 777 else row for row in range(1000)]
    pq.write_table(pa.table({"n": pa.array(values, pa.int64())}), tmp_path / "t.parquet")
    with pytest.raises(SchemaMismatch, match=r"t\.parquet.*row 777 of it, column 'n'.* missing"):
        client.import_dataset(name, tmp_path / "t.parquet")
    assert name not in client.datasets()


def test_types_cast_tables(client: forebay.Client, name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": np.arange(10.0)}), tmp_path / "t.parquet")
    made = client.import_dataset(name, tmp_path / "t.parquet", types={"x": "float32"})
    assert made.table().schema.field("x").type == pa.float32()


def test_a_dataset_of_datasets(client: forebay.Client, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_dict({"n": list(range(100))}).shuffle(seed=1)
    made = client.import_dataset(name, given)
    assert made.table().column("n").to_pylist() == given["n"][:]


def test_columns_are_written_in_parts_of_any_processes(client, name):
    """In the order of the parts' names, whoever wrote them, and whenever."""
    with client.create_dataset(name, {"x": "int64"}) as writer:
        writer.write_table(pa.table({"x": range(100)}))
    with client.write_session(name, {"y": "int64"}, columns=True, write="labels") as session:
        for part in (3, 1, 0, 2):
            with session.part(f"part-{part}") as writer:
                writer.write_table(pa.table({"y": range(25 * part, 25 * part + 25)}))
        with session.part("part-1") as writer:  # once more: it counted
            writer.write_table(pa.table({"y": range(25)}))
        assert writer.counted is False
    found = client.dataset(name)
    assert found.take(range(100))["x"].tolist() == found.take(range(100))["y"].tolist()
    again = client.write_session(name, {"y": "int64"}, columns=True, write="labels")
    assert again.version == found.version == 2
    with pytest.raises(forebay.AlreadyExists, match="'y' already"):
        client.write_session(name, {"y": "int64"}, columns=True)
    with pytest.raises(forebay.InvalidRequest, match="not both"):
        client.write_session(name, columns=True, append=True)


def test_parts_of_columns_belong_to_the_version_that_they_were_computed_of(client, name):
    with client.create_dataset(name, {"x": "int64"}) as writer:
        writer.write_table(pa.table({"x": range(4)}))
    session = client.write_session(name, {"y": "int64"}, columns=True, write="nightly")
    with session.part("a") as writer:
        writer.write_table(pa.table({"y": [0, 1]}))
    with client.write_columns(name, {"x": "int64"}, replace=True) as writer:
        writer.write_table(pa.table({"x": [9, 9, 9, 9]}))
    with pytest.raises(Conflict, match="beside another version"):
        client.write_session(name, {"y": "int64"}, columns=True, write="nightly")
    with session.part("b") as writer:
        writer.write_table(pa.table({"y": [2, 3]}))
    with pytest.raises(Conflict, match="has version 2 by now"):
        session.commit()
    assert client.dataset(name).schema.names == ["x"]


def test_columns_of_files_that_were_replaced_since_are_written_again(client, name, tmp_path):
    with client.create_dataset(name, {"x": "int64"}) as writer:
        writer.write_table(pa.table({"x": range(3)}))
    for file, values in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
        pq.write_table(pa.table({"y": values}), tmp_path / f"{file}.parquet")

    def put(file):
        dataset = client.import_dataset(
            name, tmp_path / f"{file}.parquet", columns=True, replace=True
        )
        return dataset.version, client.dataset(name).take(range(3))["y"].tolist()

    assert put("a") == (2, [1, 2, 3])
    assert put("a") == (2, [1, 2, 3])  # they are there
    assert put("b") == (3, [4, 5, 6])
    assert put("a") == (4, [1, 2, 3])
    client.drop_columns(name, ["y"])
    assert put("a") == (6, [1, 2, 3])
