"""No space left at every single write of a save: an error or a success, and never half of one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import forebay
from forebay_server.testing.beside import load_beside
from forebay_server.testing.daemon import DaemonProcess

HERE = Path(__file__).parent


common = load_beside(__file__, "system")
calls = load_beside(str(HERE), "test_syscall_faults")

MOST_CALLS = 300
"""Of one kind, in one save with what follows it: the sweep ends when a save makes no more."""

state_at = common.trainers.state_at


def save(client: forebay.Client, step: int, durability: str) -> None:
    with forebay.Checkpointer(client, "r") as checkpointer:
        checkpointer.restore("latest", missing_ok=True)
        checkpointer.save(step, state=state_at(step)).wait(durability, timeout=30)


def save_one(checkpointer: forebay.Checkpointer, step: int) -> None:
    checkpointer.save(step, state=state_at(step)).wait("local", timeout=30)


def check(client: forebay.Client, allowed: set[int]) -> None:
    with forebay.Checkpointer(client, "r") as checkpointer:
        resumed = checkpointer.restore("latest")
    assert resumed is not None
    assert resumed.step in allowed
    assert resumed.skipped == ()
    common.same_state(resumed.state, resumed.step)


@pytest.mark.slow
@pytest.mark.needs("strace", package="strace")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "call", ["pwrite64", "fallocate", "fsync", "fdatasync", "link", "ftruncate", "openat"]
)
def test_no_space_at_any_call(call: str, tmp_path: Path) -> None:
    with (
        DaemonProcess(tmp_path / "data", "--hdd-path", "none") as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        save(client, 1, "remote")
        last, hits = 1, 0
        for number in itertools.count(1):
            step, trace = 1 + number, tmp_path / f"trace-{number}"
            fault = f"{call}:error=ENOSPC:when={number}"
            with calls.injected(daemon, trace, fault):
                done = calls.run_restarting(daemon, lambda: save(client, step, "remote"))  # noqa: B023 - ended here
            hit = "INJECTED" in trace.read_text("ascii")
            check(client, {step} if done else {last, step})
            last = max(one.step for one in client.checkpoints("r") if one.state == "committed")
            if not hit:
                break
            hits += 1
            assert number < MOST_CALLS
        assert hits >= 1, "no call was hit"
        assert done, "and without a fault it saves"
        assert client.fsck().left == []


@pytest.mark.slow
def test_a_tier_that_fills_up_keeps_what_it_has(tmp_path: Path) -> None:
    """Saves of new bytes until there is no room: a clear error, and what was saved is there."""
    limits = ("--ssd-bytes", "8MiB", "--hdd-path", "none", "--object-url", "none")
    with (
        DaemonProcess(tmp_path / "data", *limits) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, "r") as checkpointer,
    ):
        error, last = None, 0
        while error is None:
            try:
                save_one(checkpointer, last + 1)
            except forebay.ResourceExhausted as caught:
                error = caught
            else:
                last += 1
        assert "ssd" in str(error)
        assert last > 5
        for one in (1, last):
            with forebay.Checkpointer(client, "r") as reader:
                common.same_state(reader.restore(f"1/{one}").state, one)
        for one in range(2, 6):  # files of the first one hold what all share
            client.delete_checkpoints("r", attempt=1, step=one, now=True)

        def can_save() -> bool:
            try:
                with forebay.Checkpointer(client, "r") as again:
                    again.restore("latest")
                    save_one(again, 200)
            except forebay.ResourceExhausted:
                return False
            return True

        common.until(can_save, lambda: client.status())
