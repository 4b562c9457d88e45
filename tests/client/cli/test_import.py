"""`forebay dataset import`: files become a dataset, whole or not at all."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay.importers.formats import find_source
from forebay.importers.piece import Options
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.limits import MIB


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


@pytest.fixture
def run(forebay_command, daemon: DaemonProcess, name: str):
    """Runs the import into a dataset of the test's own."""
    return lambda *arguments: forebay_command(
        "dataset", "import", name, *arguments, "--data", daemon.data, "--json"
    )


@pytest.fixture
def read(daemon: DaemonProcess, name: str):
    """Reads that dataset, or a split of it, as a table."""

    def table(split: str | None = None) -> pa.Table:
        with forebay.connect(daemon.data) as client:
            return client.dataset(name, split=split).table()

    return table


def test_parquet(run, read, tmp_path: Path) -> None:
    table = pa.table({"x": range(50_000), "text": [f"row {x}" for x in range(50_000)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7_000)
    assert run(tmp_path / "t.parquet").json["num_rows"] == 50_000
    assert read().column("x").to_pylist() == list(range(50_000))
    assert read().column("text")[49_999].as_py() == "row 49999"


@pytest.mark.parametrize("is_compressed", [False, True])
def test_csv(run, read, tmp_path: Path, is_compressed: bool) -> None:
    text = "a,b,c\n" + "".join(f"{x},{x / 2},word{x}\n" for x in range(1000))
    path = tmp_path / ("t.csv.gz" if is_compressed else "t.csv")
    path.write_bytes(gzip.compress(text.encode()) if is_compressed else text.encode())
    found = run(path).json
    assert (found["version"], found["num_rows"]) == (1, 1000)
    assert read().column("b").to_pylist() == [x / 2 for x in range(1000)]
    assert read().column("c")[7].as_py() == "word7"


def test_csv_options(run, read, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("1;2\n3;4\n")
    options = ("--format", "csv", "--delimiter", ";", "--no-header", "--type", "f1=float32")
    assert run(tmp_path / "t.txt", *options).status == 0
    assert read().schema.field("f1").type == pa.float32()
    assert read().column("f0").to_pylist() == [1, 3]


def test_npz(run, read, daemon: DaemonProcess, name: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (300, 4, 5), dtype=np.uint8)
    masks = images > 100
    np.savez_compressed(
        tmp_path / "t.npz",
        image=images,
        mask=masks,
        label=np.arange(300, dtype=">i4"),
        word=np.array([f"w{x}" for x in range(300)]),
    )
    assert run(tmp_path / "t.npz").status == 0
    with forebay.connect(daemon.data) as client:
        sample = client.dataset(name)[17]
    assert np.array_equal(sample["image"], images[17])
    assert np.array_equal(sample["mask"], masks[17])
    assert (sample["label"], sample["word"]) == (17, "w17")


def test_several_files_are_one_version_in_order(run, read, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.csv").write_text(f"x\n{number}\n")
    found = run(*(tmp_path / f"{number}.csv" for number in range(3))).json
    assert (found["version"], found["num_rows"]) == (1, 3)
    assert read().column("x").to_pylist() == [0, 1, 2]


def test_splits(run, read, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\n" + "\n".join(map(str, range(100))))
    found = run(tmp_path / "t.csv", "--split", "train=0.8,test=0.2", "--seed", "5").json
    assert found["splits"] == {"train": 80, "test": 20}
    both = read("train").column("x").to_pylist() + read("test").column("x").to_pylist()
    assert sorted(both) == list(range(100))


def test_append_is_a_new_version(run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\n1\n2\n")
    run(tmp_path / "t.csv")
    found = run(tmp_path / "t.csv", "--append").json
    assert (found["version"], found["num_rows_added"], found["num_rows"]) == (2, 2, 4)


def test_append_command(
    forebay_command, daemon: DaemonProcess, name: str, run, read, tmp_path: Path
) -> None:
    (tmp_path / "t.jsonl").write_text('{"x": 1}\n{"x": 2}\n')
    command = ("dataset", "append", name, tmp_path / "t.jsonl", "--data", daemon.data, "--json")
    missing = forebay_command(*command)
    assert missing.status == ExitCode.NOT_FOUND
    assert "import it first" in missing.err
    run(tmp_path / "t.jsonl")
    found = forebay_command(*command, "--jobs", "2").json
    assert (found["version"], found["num_rows_added"], found["num_rows"]) == (2, 2, 4)
    assert read().column("x").to_pylist() == [1, 2, 1, 2]
    (tmp_path / "t.jsonl").write_text('{"y": 1}\n')
    message = json.loads(forebay_command(*command).err)["message"]
    assert "t.jsonl, line 1, column 'y'" in message


def test_taken_name(run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\n1\n")
    run(tmp_path / "t.csv")
    again = run(tmp_path / "t.csv")
    assert again.status == ExitCode.EXISTS
    assert "--append" in again.err


def test_second_file_that_does_not_fit_leaves_nothing(
    run, daemon: DaemonProcess, name: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("y\n1\n")
    ended = run(tmp_path / "a.csv", tmp_path / "b.csv")
    assert ended.status == ExitCode.USAGE
    assert "columns" in ended.err
    with forebay.connect(daemon.data) as client:
        assert name not in client.datasets()


@pytest.mark.parametrize(
    ("file", "content", "status", "message"),
    [
        ("t.xyz", b"", ExitCode.USAGE, "--format"),
        ("t.parquet", b"no parquet", ExitCode.USAGE, "cannot be read as parquet"),
        ("t.npz", b"no zip", ExitCode.USAGE, "cannot be read as npz"),
        ("t.csv", b"", ExitCode.USAGE, "t.csv is empty: a CSV file has"),
        ("missing.csv", None, ExitCode.NOT_FOUND, "there is no file"),
    ],
)
def test_unreadable_files(
    run, tmp_path: Path, file: str, content: bytes | None, status: int, message: str
) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    ended = run(tmp_path / file)
    assert ended.status == status
    assert message in ended.err
    assert str(tmp_path / file) in ended.err


def test_value_of_another_type_far_down_makes_text_and_is_named(
    run, read, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f"{x},{'y' * 60}" for x in range(150_000)]
    (tmp_path / "t.csv").write_text("x,y\n" + "\n".join(lines) + "\nword,1\n")
    ended = run(tmp_path / "t.csv")
    assert ended.json["num_rows"] == 150_001
    assert "t.csv, line 150002, column 'x': 'word' is no int64" in caplog.text
    assert read().column("x")[-2:].to_pylist() == ["149999", "word"]
    assert run(tmp_path / "t.csv", "--append").status == ExitCode.OK


@pytest.mark.parametrize("given", ["train", "train=x"])
def test_malformed_split(run, tmp_path: Path, given: str) -> None:
    (tmp_path / "t.csv").write_text("x\n1\n")
    assert run(tmp_path / "t.csv", "--split", given).status == ExitCode.USAGE


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3), "b": np.zeros(4)}, "as long as each other"),
        ({"a": np.zeros(())}, "no dimension"),
        ({"a": np.asfortranarray(np.ones((2, 3)))}, "ascontiguousarray"),
        ({"a": np.array([{}], dtype=object)}, "pickle"),
    ],
)
def test_npz_that_cannot_be_columns(run, tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    ended = run(tmp_path / "t.npz")
    assert ended.status == ExitCode.USAGE
    assert message in ended.err


def test_files_are_never_read_whole(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.frombuffer(os.urandom(64 * MIB), np.uint8).reshape(-1, 1024))
    (piece,) = find_source([str(tmp_path / "t.npz")]).pieces
    pa.array(np.zeros(1))  # the first one imports pandas
    tracemalloc.start()
    num_rows = sum(block.batch.num_rows for block in piece.read(None, Options()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 64 * 1024
    assert peak < 24 * MIB
