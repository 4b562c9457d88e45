"""`forebay checkpoint`: what a run saved, shown and deleted."""

from pathlib import Path

import pytest
import torch

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay_server.testing.daemon import DaemonProcess


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    """A data folder with a run of two generations."""
    with DaemonProcess(tmp_path_factory.mktemp("checkpoints") / "data") as process:
        with forebay.connect(process.address()["rpc"]) as client:
            model = torch.nn.Linear(3, 2)
            with forebay.Checkpointer(client, "run", model=model) as checkpointer:
                for step in (5, 10):
                    saved = checkpointer.save(step, metrics={"loss": 1 / step})
                    saved.wait("local", timeout=60)
        yield process.data


def test_runs(forebay_command, data: Path) -> None:
    assert "1/10" in forebay_command("checkpoint", "list", "--data", data).out
    [found] = forebay_command("checkpoint", "list", "--data", data, "--json").json
    assert (found["run"], found["num_generations"], found["latest_step"]) == ("run", 2, 10)


def test_generations_newest_first(forebay_command, data: Path) -> None:
    shown = forebay_command("checkpoint", "list", "run", "--data", data)
    assert shown.out.index("0.1") < shown.out.index("0.2")
    found = forebay_command("checkpoint", "list", "run", "--data", data, "--json").json
    assert [one["step"] for one in found["generations"]] == [10, 5]
    assert [one["attempt"] for one in found["attempts"]] == [1]


@pytest.mark.parametrize(
    ("selector", "step"), [(["run"], 10), (["run", "5"], 5), (["run", "1/5"], 5), (["run@1/5"], 5)]
)
def test_show(forebay_command, data: Path, selector: list[str], step: int) -> None:
    found = forebay_command("checkpoint", "show", *selector, "--data", data, "--json").json
    assert (found["attempt"], found["step"], found["state"]) == (1, step, "committed")
    assert found["metrics"] == {"loss": 1 / step}
    tensors = {one["name"]: one for one in found["tensors"]}
    weight = next(one for name, one in tensors.items() if name.endswith("weight"))
    assert (weight["dtype"], weight["shape"], weight["num_bytes"]) == ("float32", [2, 3], 24)
    assert [pack["rank"] for pack in found["packs"]] == [0]


def test_show_for_people(forebay_command, data: Path) -> None:
    shown = forebay_command("checkpoint", "show", "run", "--data", data).out
    for part in ("run@1/10", "committed", "2×3", "float32", "loss"):
        assert part in shown


def test_unknown_generation_names_the_command_that_lists_them(forebay_command, data: Path) -> None:
    ended = forebay_command("checkpoint", "show", "run", "7", "--data", data)
    assert ended.status == ExitCode.NOT_FOUND
    assert "forebay checkpoint list run" in ended.err


def test_import_with_a_prefix(forebay_command, data: Path, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    prefix = ("--add-prefix", "model.", "--data", data)
    forebay_command("checkpoint", "import", "bare", tmp_path / "w.pt", *prefix)
    shown = forebay_command("checkpoint", "show", "bare", "--data", data, "--json").json
    assert [one["name"] for one in shown["tensors"]] == ["model.weight", "model.bias"]
    forebay_command("checkpoint", "delete", "bare", "--all", "--yes", "--now", "--data", data)


def test_delete_one_then_all(forebay_command, data: Path) -> None:
    """The last test of this module: nothing is left."""
    one = forebay_command("checkpoint", "delete", "run", "1/5", "--yes", "--data", data)
    assert "Deleted 1 generation." in one.out
    left = forebay_command("checkpoint", "list", "run", "--data", data, "--json").json
    assert [each["step"] for each in left["generations"]] == [10]
    gone = forebay_command(
        "checkpoint", "delete", "run", "--all", "--yes", "--data", data, "--json"
    )
    assert gone.json["num_deleted"] == 1
    assert forebay_command("checkpoint", "list", "--data", data, "--json").json == []
