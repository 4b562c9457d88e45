"""``forebay dataset split`` and ``forebay dataset select``, and what show says of their result."""

from pathlib import Path

import numpy as np
import pytest

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay_server.testing.daemon import DaemonProcess


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory):
    """A daemon with a dataset of 10 numbered rows."""
    with DaemonProcess(tmp_path_factory.mktemp("select") / "data") as process:
        with (
            forebay.connect(process.address()["rpc"]) as client,
            client.create_dataset("d", schema={"x": "int64"}) as writer,
        ):
            for number in range(10):
                writer.write(x=number)
        yield process


@pytest.mark.parametrize(
    ("arguments", "counts", "said"),
    [
        (("split", "d", "a=0.7,b=0.3", "--seed", "1"), {"a": 7, "b": 3}, "split, seed 1"),
        (("split", "d", "--folds", "2", "--prefix", "k"), {"k0-train": 5}, "train part of fold 0"),
        (("split", "d", "--buckets", "x=2,4"), {"bucket1": 2}, "bucket 2 <= x < 4"),
        (("select", "d", "some", "--where", "x > 3", "--where", "x in [2, 5, 9]"), {"some": 2}, ""),
        (("select", "d", "text", "--rows", "{rows}.txt"), {"text": 3}, "list of rows"),
        (("select", "d", "binary", "--rows", "{rows}.npy"), {"binary": 3}, "list of rows"),
        (
            ("split", "d", "--of", "text", "--folds", "3"),
            {"text-fold0-train": 2, "text-fold0-test": 1},
            "train part of fold 0 of 3 within text",
        ),
        (
            ("select", "d", "inner", "--of", "text", "--where", "x > 1"),
            {"inner": 2},
            "filter (x > 1) within text",
        ),
    ],
)
def test_selections_are_defined_and_shown(
    forebay_command, numbers: DaemonProcess, tmp_path: Path, arguments, counts, said
) -> None:
    np.save(tmp_path / "rows.npy", np.array([4, 1, 7]))
    (tmp_path / "rows.txt").write_text("4\n1\n7\n")
    given = [one.replace("{rows}", str(tmp_path / "rows")) for one in arguments]
    for _ in range(2):
        found = forebay_command("dataset", *given, "--data", numbers.data, "--json").json
        assert counts.items() <= found["selections"].items()
    shown = forebay_command("dataset", "show", "d", "--data", numbers.data, "--json").json
    by_name = {one["name"]: one for one in shown["selections"]}
    for name, count in counts.items():
        assert by_name[name]["num_rows"] == count
    assert said in by_name[next(iter(counts))]["definition"]
    assert said[:12] in forebay_command("dataset", "show", "d", "--data", numbers.data).out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("split", "d"), ExitCode.USAGE, "exactly one"),
        (("split", "d", "a=1", "--folds", "2"), ExitCode.USAGE, "exactly one"),
        (("split", "d", "--buckets", "x"), ExitCode.USAGE, "COLUMN=BOUND"),
        (("select", "d", "s"), ExitCode.USAGE, "either --where or --rows"),
        (("split", "d", "a=1", "--of", "text"), ExitCode.USAGE, "--folds and --buckets"),
        (("select", "d", "s", "--of", "nope", "--where", "x > 1"), ExitCode.NOT_FOUND, "nope"),
        (("select", "d", "s", "--where", "x"), ExitCode.USAGE, "COLUMN OPERATOR VALUE"),
        (("select", "d", "s", "--where", "y > 1"), ExitCode.USAGE, "y"),
        (("select", "d", "s", "--rows", "no-such-file.npy"), ExitCode.NOT_FOUND, "no file"),
        (("select", "nope", "s", "--where", "x > 1"), ExitCode.NOT_FOUND, "nope"),
    ],
)
def test_wrong_use_says_why(
    forebay_command, numbers: DaemonProcess, arguments, status, message
) -> None:
    done = forebay_command("dataset", *arguments, "--data", numbers.data)
    assert (done.status, message in done.err) == (status, True), done.err
