"""SIGKILL of daemon or trainer at every named step of a generation commit."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.failpoints import GENERATION_COMMIT, VARIABLE

TRAINER = Path(__file__).with_name("save_generation.py")
_spec = importlib.util.spec_from_file_location("save_generation", TRAINER)
assert _spec is not None
assert _spec.loader is not None
save_generation = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(save_generation)


def assert_restores(client: forebay.Client, run: str, step: int) -> None:
    """The newest generation of *run* is that of *step*, bit for bit."""
    with forebay.Checkpointer(client, run=run) as checkpointer:
        resumed = checkpointer.restore("latest")
    assert resumed is not None
    assert resumed.step == step
    for name, value in save_generation.state_at(step).items():
        assert torch.equal(resumed.state[name], value)


def committed_steps(client: forebay.Client, run: str) -> list[int]:
    return sorted(one.step for one in client.checkpoints(run) if one.state == "committed")


@pytest.mark.parametrize("point", dict.fromkeys(GENERATION_COMMIT))
def test_daemon_killed_in_a_generation_commit_leaves_all_or_nothing(
    point: str,
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    in_background: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> None:
    daemon.start().wait_ready()
    with connect() as client, forebay.Checkpointer(client, run="r") as checkpointer:
        checkpointer.save(1, state=save_generation.state_at(1)).wait("local", timeout=60)
    daemon.restart(environment={VARIABLE: point})
    with connect() as client:
        with forebay.Checkpointer(client, run="r") as checkpointer:
            checkpointer.restore("latest")
            outcome = in_background(
                lambda: checkpointer.save(2, state=save_generation.state_at(2)).wait(
                    "local", timeout=60
                )
            )
            assert daemon.wait_exit() == -9, "the failpoint was not passed"
            daemon.start().wait_ready()
            result = outcome()
        steps = committed_steps(client, "r")
        assert steps == [1, 2] or isinstance(result, forebay.ForebayError)
        assert_restores(client, "r", steps[-1])


def start_trainer(
    address: str, rank: int, num_ranks: int, rendezvous: Path, steps: list[int], point: str
) -> subprocess.Popen[bytes]:
    words = [address, str(rank), str(num_ranks), str(rendezvous), *map(str, steps)]
    environment = {**os.environ, VARIABLE: point, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(TRAINER), *words], env=environment)


@pytest.mark.parametrize("point", ["client.save.after_begin", "client.save.after_copy"])
def test_trainer_killed_before_its_seal_leaves_the_previous_generation(
    point: str,
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    tmp_path: Path,
) -> None:
    daemon.start().wait_ready()
    trainer = start_trainer(daemon.address()["rpc"], 0, 1, tmp_path / "r", [1, 2], f"{point}:2")
    assert trainer.wait(100) == -9
    with connect() as client:
        assert committed_steps(client, "killed") == [1]
        assert_restores(client, "killed", 1)
        with forebay.Checkpointer(client, run="killed") as checkpointer:
            checkpointer.restore("latest")
            # The dead attempt had reached step 2: it may be saved again.
            checkpointer.save(2, state=save_generation.state_at(2)).wait("local", timeout=60)
        assert_restores(client, "killed", 2)


def test_generation_sealed_by_all_ranks_before_the_trainer_died_lands(
    daemon: DaemonProcess, connect: Callable[[], forebay.Client], tmp_path: Path
) -> None:
    daemon.start().wait_ready()
    ranks = [
        start_trainer(
            daemon.address()["rpc"], rank, 2, tmp_path / "r", [5], "client.save.after_seal"
        )
        for rank in range(2)
    ]
    assert [rank.wait(100) for rank in ranks] == [-9, -9]
    with connect() as client:
        assert_restores(client, "killed", 5)
