"""Commands against a real daemon: tables for people, JSON for programs, exit statuses."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay.cli import commands
from forebay.cli.exit_codes import MEANINGS, ExitCode
from forebay_server.testing.daemon import DaemonProcess


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory):
    """A daemon with a dataset of two versions."""
    with DaemonProcess(tmp_path_factory.mktemp("cli") / "data") as process:
        with forebay.connect(process.address()["rpc"]) as client:
            schema = {"x": "float32", "image": forebay.Array("uint8", (2, 3))}
            with client.create_dataset("odd", schema=schema) as writer:
                for number in range(10):
                    writer.write(x=number, image=[[number] * 3] * 2)
            client.dataset("odd").define_splits({"train": 0.8, "test": 0.2})
            with client.append_dataset("odd") as writer:
                writer.write(x=0.5, image=[[1, 2, 3], [4, 5, 6]])
        yield process


def test_status(forebay_command, filled: DaemonProcess) -> None:
    shown = forebay_command("status", "--data", filled.data)
    assert shown.status == 0
    for part in ("serving", str(filled.data), "ram", "ssd", "hdd", "object", "datasets"):
        assert part in shown.out
    found = forebay_command("status", "--data", filled.data, "--json").json
    assert found["num_datasets"] == 1
    assert [tier["name"] for tier in found["tiers"]] == ["ram", "ssd", "hdd", "object"]
    assert all(isinstance(tier["used_bytes"], int) for tier in found["tiers"])


def test_status_shows_the_plans_of_loaders(forebay_command, filled: DaemonProcess) -> None:
    with (
        forebay.connect(filled.address()["rpc"]) as client,
        forebay.DataLoader(client.dataset("odd"), global_batch_size=1) as loader,
    ):
        batches = iter(loader)
        next(batches)

        def shown() -> list[dict[str, Any]]:
            return forebay_command("status", "--data", filled.data, "--json").json["plans"]

        deadline = time.monotonic() + 60
        while not (plans := shown()) or plans[0]["position"] < 1:
            assert time.monotonic() < deadline, plans
        [plan] = plans
        shards = client.dataset("odd").manifest.shards
        assert plan["dataset"] == "odd@2"
        assert f"pid {os.getpid()}" in plan["loader"]
        assert plan["ahead_bytes"] == plan["ready_bytes"] == sum(one.num_bytes for one in shards)
        assert 0 < plan["expires_seconds"] <= 30
        assert plan["waits"]["num_waits"] == len(plan["recent"])
        out = forebay_command("status", "--data", filled.data).out
        for part in ("odd@2", f"pid {os.getpid()}", "0:", "ahead", "ready", "waited"):
            assert part in out


@pytest.mark.parametrize("way", ["option", "environment"])
def test_address(
    forebay_command, filled: DaemonProcess, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = filled.address()["rpc"]
    if way == "environment":
        monkeypatch.setenv("FOREBAY_ADDRESS", address)
    arguments = ("--address", address) if way == "option" else ()
    assert forebay_command("dataset", "list", *arguments, "--json").json[0]["name"] == "odd"


def test_data_folder_of_the_environment(
    forebay_command, filled: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_DATA", str(filled.data))
    assert "odd" in forebay_command("dataset", "list").out


def test_dataset_list(forebay_command, filled: DaemonProcess) -> None:
    shown = forebay_command("dataset", "list", "--data", filled.data)
    assert "odd" in shown.out
    assert "11" in shown.out
    [found] = forebay_command("dataset", "list", "--data", filled.data, "--json").json
    assert (found["name"], found["num_versions"], found["num_rows"]) == ("odd", 2, 11)


def test_dataset_show(forebay_command, filled: DaemonProcess) -> None:
    shown = forebay_command("dataset", "show", "odd", "--data", filled.data)
    for part in ("train", "test", "uint8 array of shape (2, 3)", "float32", "11 rows"):
        assert part in shown.out
    found = forebay_command("dataset", "show", "odd", "--data", filled.data, "--json").json
    assert [one["num_rows"] for one in found["versions"]] == [10, 11]
    assert {one["name"]: one["num_rows"] for one in found["selections"]} == {"train": 8, "test": 2}
    assert found["shown_version"] == 2
    assert sum(shard["num_rows"] for shard in found["shards"]) == 11
    (ssd,) = [one for one in found["copies"] if one["tier"] == "ssd"]
    assert ssd["num_bytes"] == sum(shard["num_bytes"] for shard in found["shards"])
    assert ssd["stored_bytes"] > ssd["num_bytes"]  # raw, with its tables
    assert "stored" in shown.out


def test_dataset_show_of_an_older_version(forebay_command, filled: DaemonProcess) -> None:
    arguments = ("dataset", "show", "odd", "--version", "1", "--data", filled.data, "--json")
    assert forebay_command(*arguments).json["shown_version"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("dataset", "show", "nope"), ExitCode.NOT_FOUND, "nope"),
        (("dataset", "show", "odd", "--version", "9"), ExitCode.NOT_FOUND, "it has [1, 2]"),
        (("dataset", "show", "a/b"), ExitCode.USAGE, "not allowed"),
        (("dataset", "delete", "nope", "--yes"), ExitCode.NOT_FOUND, "nope"),
        (("dataset", "delete", "odd"), ExitCode.USAGE, "--yes"),
        (("checkpoint", "list", "nope"), ExitCode.NOT_FOUND, "nope"),
        (("checkpoint", "show", "nope"), ExitCode.NOT_FOUND, "nope"),
        (("checkpoint", "show", "nope", "x/y"), ExitCode.USAGE, "ATTEMPT/STEP"),
        (("checkpoint", "lineage", "nope"), ExitCode.NOT_FOUND, "nope"),
        (("checkpoint", "prune", "nope", "--last", "1"), ExitCode.NOT_FOUND, "nope"),
        (("checkpoint", "prune", "nope", "--last", "-1"), ExitCode.USAGE, "whole number"),
        (("checkpoint", "tag", "nope", "5"), ExitCode.USAGE, "a step"),
        (("checkpoint", "delete", "run"), ExitCode.USAGE, "--all"),
        (("checkpoint", "delete", "run", "7", "--yes"), ExitCode.USAGE, "ATTEMPT/STEP"),
    ],
)
def test_failures(
    forebay_command, filled: DaemonProcess, arguments: tuple[str, ...], status: int, message: str
) -> None:
    ended = forebay_command(*arguments, "--data", filled.data)
    assert (ended.status, ended.out) == (status, "")
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_failure_as_json(forebay_command, filled: DaemonProcess) -> None:
    ended = forebay_command("dataset", "show", "nope", "--json", "--data", filled.data)
    assert ended.status == ExitCode.NOT_FOUND
    assert '"error": "NotFound"' in ended.err


def test_delete(forebay_command, filled: DaemonProcess) -> None:
    with (
        forebay.connect(filled.address()["rpc"]) as client,
        client.create_dataset("gone", {"x": "int64"}) as writer,
    ):
        writer.write(x=1)
    arguments = ("dataset", "delete", "gone", "--yes", "--data", filled.data)
    assert "Deleted dataset 'gone'" in forebay_command(*arguments).out
    assert forebay_command(*arguments).status == ExitCode.NOT_FOUND
    assert forebay_command(*arguments, "--missing-ok", "--json").json["existed"] is False


def test_folder_that_is_no_data_folder_is_not_made_one(forebay_command, tmp_path: Path) -> None:
    ended = forebay_command("status", "--data", tmp_path / "typo")
    assert ended.status == ExitCode.NOT_FOUND
    assert "is no data folder" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_nobody_there(forebay_command) -> None:
    ended = forebay_command("status", "--address", "grpc://127.0.0.1:1", "--timeout", "0.5")
    assert ended.status == ExitCode.UNAVAILABLE
    assert "grpc://127.0.0.1:1" in ended.err


def test_two_addresses_are_one_too_many(forebay_command, tmp_path: Path) -> None:
    ended = forebay_command("status", "--data", tmp_path, "--address", "grpc://h:1")
    assert ended.status == ExitCode.USAGE


def test_help_lists_every_exit_status(forebay_command) -> None:
    shown = forebay_command("--help")
    assert shown.status == 0
    for code, meaning in MEANINGS.items():
        assert f"{code.value:>3}  {meaning}" in shown.out


def test_commands_are_exactly_these(forebay_command) -> None:
    groups = {name: sorted(getattr(one, "commands", ())) for name, one in commands.commands.items()}
    assert groups == {
        "status": [],
        "dataset": [
            *("append", "columns", "delete", "head", "import", "list", "pin", "register"),
            *("select", "show", "split", "stats", "verify", "warm"),
        ],
        "checkpoint": [
            *("advise", "cat", "delete", "diff", "export", "import", "lineage", "list", "pin"),
            *("prune", "show", "tag", "verify"),
        ],
        "jobs": [],
        "why": [],
        "pin": [],
        "unpin": [],
        "pins": [],
        "policy": ["list", "set", "show"],
        "trash": ["empty", "list", "restore"],
        "doctor": [],
        "serve": [],
        "backup": [],
        "recover": [],
        "scrub": [],
        "fsck": [],
        "gc": [],
    }


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['forebay', '--help']\n"
        "from forebay.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'grpc', 'pyarrow', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", ["serve", "recover"])
def test_daemon_commands_become_the_daemon(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "forebay.cli", command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--data" in done.stdout


def test_documentation_has_every_exit_status() -> None:
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")
    for code, meaning in MEANINGS.items():
        assert f"| {code.value} | {meaning} |" in page
