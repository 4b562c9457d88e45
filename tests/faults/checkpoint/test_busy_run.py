"""A run that is saved while it is pruned, compacted, collected and read: nobody sees half of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
import forebay.checkpoint
from forebay_server.testing.beside import load_beside
from forebay_server.testing.daemon import DaemonProcess

HERE = Path(__file__).parent

common = load_beside(__file__, "system")

NUM_STEPS = 60
READ_SECONDS = 0.8
"""A reader looks at some of the generations only: those that it has seen stay for a while."""

KEPT = frozenset({20, 40, NUM_STEPS - 1, NUM_STEPS})

LENT_SECONDS = 240.0
"""What was opened is gone after this time at the latest."""

FROZEN = torch.arange(2 << 20, dtype=torch.int32)
"""Never changes: each generation shares it with those before, the first of which go."""


def state_at(step: int) -> dict[str, Any]:
    changing = torch.full((300, 1000), float(step))
    return {"changing": changing, "frozen": FROZEN, "step": step}


def read_on(address: str, ended: threading.Event, durability: str) -> Counter[str]:
    """Reads the newest generation again and again: how often each thing came of it."""
    found: Counter[str] = Counter()
    with forebay.connect(address) as client:
        while not ended.is_set():
            try:
                opened = forebay.checkpoint.open(client, "r", durability=durability)
            except forebay.NotFound:
                found["none yet"] += 1
                time.sleep(0.01)
                continue
            with opened:
                try:
                    (state,) = opened.state_dict().values()
                except forebay.NotFound:  # it was pruned before anything of it was open
                    found["gone"] += 1
                    continue
            assert state["step"] == opened.generation.step
            assert torch.equal(state["changing"], state_at(state["step"])["changing"])
            assert torch.equal(state["frozen"], FROZEN)
            found["read"] += 1
            ended.wait(READ_SECONDS)
    return found


def collect_on(address: str, ended: threading.Event) -> Counter[str]:
    found: Counter[str] = Counter()
    with forebay.connect(address) as client:
        while not ended.is_set():
            client.collect_garbage()
            found["collected"] += 1
            time.sleep(0.1)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_saves_while_the_run_is_pruned_compacted_and_read(tmp_path: Path) -> None:
    arguments = ("--hdd-path", "none", "--trash-seconds", "0")
    with (
        DaemonProcess(tmp_path / "data", *arguments) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        ThreadPoolExecutor(3) as threads,
    ):
        address, ended = daemon.address()["rpc"], threading.Event()
        working = [
            threads.submit(read_on, address, ended, "local"),
            threads.submit(read_on, address, ended, "remote"),
            threads.submit(collect_on, address, ended),
        ]
        try:
            keep = forebay.Keep(last=2, every_steps=20)
            with forebay.Checkpointer(client, "r", keep=keep) as checkpointer:
                for step in range(1, NUM_STEPS + 1):
                    saved = checkpointer.save(step, state=state_at(step))
                    if step % 3:  # or two are in flight
                        saved.wait("local", timeout=common.SECONDS)
                saved.wait("remote", timeout=common.SECONDS)
        finally:
            ended.set()
        local, remote, _ = (one.result() for one in working)
        assert local["read"] >= 5, local
        assert remote["read"] >= 5, remote
        check_kept(client)
        assert client.fsck().left == []
        check_space(client, daemon)


def check_kept(client: forebay.Client) -> None:
    def kept() -> set[int]:
        return {one.step for one in client.checkpoints("r") if one.state == "committed"}

    assert len(kept()) < NUM_STEPS, "nothing was pruned while it was saved"
    common.until(lambda: kept() == KEPT, lambda: (kept(), client.jobs()), LENT_SECONDS)
    for step in sorted(KEPT):
        with forebay.checkpoint.open(client, "r", f"1/{step}") as opened:
            (state,) = opened.state_dict().values()
        assert torch.equal(state["changing"], state_at(step)["changing"])
        assert torch.equal(state["frozen"], FROZEN)


def check_space(client: forebay.Client, daemon: DaemonProcess) -> None:
    """What was pruned is gone, but for what may stay with what is kept.

    At the worst each generation that is kept shares its frozen part with pruned ones alone, as no
    more than eight share a copy until another tier has it; and the file of that copy, of which far
    more than half is needed, keeps one change of which nothing is. All that was saved would be some
    three times of that.
    """
    change = state_at(0)["changing"].nbytes
    most = 1.01 * len(KEPT) * (FROZEN.nbytes + 2 * change)  # with tables and lists

    def used() -> int:
        return sum(
            path.stat().st_size
            for path in (daemon.data / "ssd" / "files").rglob("*")
            if path.is_file()
        )

    client.collect_garbage()
    common.until(lambda: used() <= most, lambda: (used(), most), LENT_SECONDS)
