"""`forebay dataset head`, `stats`, `verify` and `show --preview`: what is in a dataset."""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay.testing.blobs import flip_bit, replica_files
from forebay_server.testing.daemon import DaemonProcess

NUM_ROWS = 1000
VALUES = np.random.default_rng(0).normal(5, 2, NUM_ROWS)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("look") / "data") as process:
        with forebay.connect(process.data) as client:
            with client.create_dataset("d", batch_bytes=4096, shard_bytes=1 << 16) as writer:
                writer.write_table(table())
            client.dataset("d").define_splits({"part": 0.1})
        yield process


def table() -> pa.Table:
    numbers = np.arange(NUM_ROWS)
    tokens = [None if n % 10 == 0 else list(range(n % 4)) for n in range(NUM_ROWS)]
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(NUM_ROWS * 4, dtype="u1")), 4)
    kind = pa.fixed_shape_tensor(pa.uint8(), (2, 2))
    return pa.table(
        {
            "n": numbers,
            "x": [None if n == 3 else VALUES[n] for n in numbers],
            "text": [f"row\n{n}" for n in numbers],
            "raw": [bytes(n % 20) for n in numbers],
            "tokens": pa.array(tokens, pa.list_(pa.int32())),
            "image": pa.ExtensionArray.from_storage(kind, pixels),
        }
    )


def test_head(forebay_command, daemon: DaemonProcess) -> None:
    rows = forebay_command("dataset", "head", "d", "-n", "15", "--data", daemon.data, "--json").json
    assert [row["n"] for row in rows] == list(range(15))
    assert rows[13]["tokens"] == [0]
    assert base64.b64decode(rows[13]["raw"]) == bytes(13)
    assert rows[1]["image"] == [[4, 5], [6, 7]]
    shown = forebay_command("dataset", "head", "d", "-n", "-2", "--data", daemon.data).out
    assert "row 999" in shown
    assert "uint8 2×2" in shown
    assert "row 997" not in shown


def test_head_of_a_split_and_of_columns(forebay_command, daemon: DaemonProcess) -> None:
    options = ("--split", "part", "--columns", "n,text", "--data", daemon.data, "--json")
    rows = forebay_command("dataset", "head", "d", *options).json
    assert len(rows) == 10
    assert all(row["text"] == f"row\n{row['n']}" for row in rows)
    assert set(rows[0]) == {"#", "n", "text"}


def test_show_previews(forebay_command, daemon: DaemonProcess) -> None:
    found = forebay_command(
        "dataset", "show", "d", "--preview", "2", "--data", daemon.data, "--json"
    )
    assert [row["n"] for row in found.json["preview"]] == [0, 1]


def test_stats(forebay_command, daemon: DaemonProcess) -> None:
    found = forebay_command("dataset", "stats", "d", "--data", daemon.data, "--json").json
    assert found["n"] == {
        "of": "values",
        "num_rows": 1000,
        "num_missing": 0,
        "num_nulls": 0,
        "num_nan": 0,
        "num_values": 1000,
        "min": 0,
        "max": 999,
        "mean": pytest.approx(499.5),
        "std": pytest.approx(np.arange(1000).std()),
    }
    there = np.delete(VALUES, 3)
    assert found["x"]["num_missing"] == 1
    assert found["x"]["mean"] == pytest.approx(there.mean())
    assert found["x"]["std"] == pytest.approx(there.std())
    assert (found["text"]["of"], found["text"]["min"], found["text"]["max"]) == ("lengths", 5, 7)
    assert found["raw"]["mean"] == pytest.approx(9.5)
    assert (found["tokens"]["num_missing"], found["tokens"]["max"]) == (100, 3)
    assert found["image"]["num_values"] == 4000
    assert (found["tokens"]["num_nulls"], found["x"]["num_nan"]) == (100, 1)
    stats = ("dataset", "stats", "d", "--data", daemon.data)
    assert "std" in forebay_command(*stats).out
    assert forebay_command(*stats, "--recompute", "--json").json == found


def test_stats_of_a_split_are_those_of_its_rows(forebay_command, daemon: DaemonProcess) -> None:
    options = ("--split", "part", "--columns", "n", "--data", daemon.data, "--json")
    found = forebay_command("dataset", "stats", "d", *options).json["n"]
    with forebay.connect(daemon.data) as client:
        split = client.dataset("d", split="part")
        rows = split.take(np.arange(len(split)), ["n"])["n"]
    assert (found["num_rows"], found["min"], found["max"]) == (100, rows.min(), rows.max())
    assert found["std"] == pytest.approx(rows.std())


def test_verify(forebay_command, tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "data") as daemon:
        with forebay.connect(daemon.data) as client:
            with client.create_dataset("d", shard_bytes=1 << 16) as writer:
                writer.write_table(table())
            made = client.dataset("d")
            made.wait("remote")
        found = forebay_command("dataset", "verify", "d", "--data", daemon.data, "--json")
        assert found.status == ExitCode.OK
        assert found.json["num_bytes"] == made.num_bytes
        assert (found.json["num_rows"], found.json["damaged"]) == (NUM_ROWS, [])
        copies = (tmp_path / "data" / "object" / "data").rglob("*")
        for path in [*replica_files(tmp_path / "data"), *filter(Path.is_file, copies)]:
            flip_bit(path, 1000)
        found = forebay_command("dataset", "verify", "d", "--data", daemon.data, "--json")
        assert found.status == ExitCode.DAMAGED
        assert len(found.json["damaged"]) == 1
