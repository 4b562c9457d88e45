"""`forebay checkpoint tag|pin|prune|lineage|list`: what is kept of a run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import forebay
from forebay.cli.exit_codes import ExitCode
from forebay_server.testing.daemon import DaemonProcess


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder with a run that was rolled back, and one that was forked from it."""
    with DaemonProcess(tmp_path_factory.mktemp("managed") / "data") as process:
        with forebay.connect(process.address()["rpc"]) as client:
            for restore, steps in ((None, (1, 2, 3)), ("1/2", (3, 4))):
                save(client, "run", steps, restore)
            save(client, "fork", (7,), "latest", fork_from="run@2/3")
        yield process.data


def save(
    client: forebay.Client, run: str, steps: tuple[int, ...], restore: str | None, **options: str
) -> None:
    model = torch.nn.Linear(3, 2)
    with forebay.Checkpointer(client, run, model=model, **options) as checkpointer:
        if restore:
            checkpointer.restore(restore)
        for step in steps:
            checkpointer.save(step, metrics={"loss": 1 / step}).wait("local", timeout=60)


def test_tags(forebay_command, data: Path) -> None:
    where = ("--data", data)
    assert (
        "run@2/4 has the tag 'good'"
        in forebay_command("checkpoint", "tag", "run", "good", *where).out
    )
    moved = forebay_command("checkpoint", "tag", "run", "good", "1/2", *where, "--json").json
    assert moved["tags"] == {"good": "run@1/2"}
    assert "good" in forebay_command("checkpoint", "list", "run", *where).out
    refused = forebay_command("checkpoint", "tag", "run", "latest", *where)
    assert refused.status == ExitCode.USAGE
    forebay_command("checkpoint", "tag", "run", "other", "good", *where)
    asked = forebay_command("checkpoint", "delete", "run", "good", *where)
    assert "1/2 of run" in asked.out + asked.err
    unknown = forebay_command("checkpoint", "delete", "run", "nothing", "--yes", *where)
    assert unknown.status == ExitCode.NOT_FOUND, unknown.err
    gone = forebay_command("checkpoint", "tag", "run", "other", "--remove", *where, "--json").json
    assert gone["tags"] == {"good": "run@1/2"}


def test_list_says_when_it_was_how_durable(forebay_command, data: Path) -> None:
    found = forebay_command("checkpoint", "list", "run", "--data", data, "--json").json
    newest = found["generations"][0]
    assert 0 < newest["ram_unix"] <= newest["local_unix"]
    fork = forebay_command("checkpoint", "list", "fork", "--data", data).out
    assert "run@2/3" in fork


def test_pin_and_prune(forebay_command, data: Path) -> None:
    where = ("--data", data)
    pinned = forebay_command(
        "checkpoint", "pin", "run@1/1", "--reason", "for the paper", *where, "--json"
    ).json
    assert pinned == {"generation": "run@1/1", "pinned": "for the paper"}
    told = forebay_command("checkpoint", "prune", "run", "--last", 1, "--dry-run", *where)
    assert "pinned: for the paper" in told.out
    assert "a rollback left it behind" in told.out
    said = forebay_command(
        "checkpoint", "prune", "run", "--last", 1, "--dry-run", *where, "--json"
    ).json
    goes = [f"{one['attempt']}/{one['step']}" for one in said["verdicts"] if not one["is_kept"]]
    assert goes == ["1/3"]  # 2/3 was restored a moment ago
    left = forebay_command("checkpoint", "list", "run", *where, "--json").json["generations"]
    assert len(left) == 5
    assert forebay_command("checkpoint", "prune", "run", *where).status == ExitCode.USAGE
    forebay_command("checkpoint", "pin", "run@1/1", "--remove", *where)


def test_lineage(forebay_command, data: Path) -> None:
    """The tree, whatever was pruned before; then the very text after that."""
    where = ("--data", data)
    forebay_command("checkpoint", "tag", "run", "good", "1/2", *where)
    found = forebay_command("checkpoint", "lineage", "run", *where, "--json").json
    assert found["path"] == ["run@2/4", "run@2/3", "run@1/2", "run@1/1"]
    assert found["forks"] == [{"run": "fork", "from": "run@2/3"}]
    shown = forebay_command("checkpoint", "lineage", "run", *where).out.splitlines()
    assert shown == [
        "run run",
        "└─ attempt 1",
        "   ├─ step 1 *",
        "   ├─ step 2 * [good]",
        "   │  └─ attempt 2",
        "   │     ├─ step 3 *",
        "   │     │  └─ run fork was forked here",
        "   │     └─ step 4 *",
        "   └─ step 3",
    ]
    fork = forebay_command("checkpoint", "lineage", "fork", *where).out.splitlines()
    assert fork == ["run fork, forked from run@2/3", "└─ attempt 1, from run@2/3", "   └─ step 7 *"]


def test_prune_deletes_and_goes_on(forebay_command, data: Path) -> None:
    """The last test of this module: little is left."""
    where = ("--data", data)
    said = forebay_command("checkpoint", "prune", "run", "--last", 1, "--always", *where)
    assert "deleted" in said.out
    left = forebay_command("checkpoint", "list", "run", *where, "--json").json["generations"]
    assert [f"{one['attempt']}/{one['step']}" for one in left] == ["2/4", "2/3", "1/2"]
    again = forebay_command("checkpoint", "prune", "run", "--dry-run", *where, "--json").json
    assert all(one["is_kept"] for one in again["verdicts"])
