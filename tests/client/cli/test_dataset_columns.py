"""`forebay dataset columns`: columns of files beside those that are there."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay_server.testing.daemon import DaemonProcess

ROWS = 2000


@pytest.fixture
def name(request: pytest.FixtureRequest, daemon: DaemonProcess) -> str:
    made = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    with forebay.connect(daemon.data) as client, client.create_dataset(made) as writer:
        writer.write_table(pa.table({"x": np.arange(ROWS), "y": np.arange(ROWS) / 2}))
    return made


@pytest.fixture
def run(forebay_command, daemon: DaemonProcess, name: str):
    return lambda *arguments: forebay_command(
        "dataset", "columns", name, *arguments, "--data", daemon.data, "--json"
    )


def test_columns_of_files_are_added_by_several_processes(
    run, daemon: DaemonProcess, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "labels.parquet"
    labels = pa.table({"label": [f"l{n}" for n in range(ROWS)], "n": pa.array(range(ROWS))})
    pq.write_table(labels, path, row_group_size=300)
    found = run(path, "--jobs", 2, "--type", "n=float32").json
    assert found["version"] == 2
    assert found["columns"] == {"x": "int64", "y": "float64", "label": "string", "n": "float32"}
    with forebay.connect(daemon.data) as client:
        dataset = client.dataset(name)
        assert dataset.table().column("label").to_pylist() == labels["label"].to_pylist()
        assert np.array_equal(dataset.take(range(ROWS))["x"], dataset.take(range(ROWS))["n"])
    assert run(path, "--type", "n=float32").json["version"] == 2  # was done before: nothing more
    shown = run("--drop", "y,label").json
    assert list(shown["columns"]) == ["x", "n"]


def test_what_is_there_is_replaced_only_if_that_is_said(run, name: str, tmp_path: Path) -> None:
    path = tmp_path / "y.csv"
    path.write_text("y\n" + "7\n" * ROWS)
    failed = run(path)
    assert failed.status == ExitCode.EXISTS
    assert "'y' already" in failed.err
    assert "--replace" in failed.err
    assert run(path, "--replace").json["columns"] == {"x": "int64", "y": "float64"}
    found = run(path, "--replace", "--type", "y=int8").json
    assert found["columns"] == {"x": "int64", "y": "int8"}


def test_files_with_other_numbers_of_rows_change_nothing(
    run, daemon: DaemonProcess, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "z.csv"
    path.write_text("z\n1\n2\n")
    failed = run(path)
    assert failed.status == ExitCode.USAGE
    assert f"have 2 rows and version 1 has {ROWS}" in failed.err
    with forebay.connect(daemon.data) as client:
        assert client.dataset(name).version == 1


@pytest.mark.parametrize("arguments", [[], ["a.csv", "--drop", "x"]])
def test_either_files_or_columns_to_drop(run, arguments: list[str]) -> None:
    assert run(*arguments).status == ExitCode.USAGE
