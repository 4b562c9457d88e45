"""SIGKILL of daemon or trainer at every named step of a generation commit."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.beside import load_beside
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.warm import WarmProcess, WarmPython
from forebay_wire.failpoints import GENERATION_COMMIT, VARIABLE

TRAINER = Path(__file__).with_name("save_generation.py")
save_generation = load_beside(__file__, "save_generation")


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


StartTrainer = Callable[..., WarmProcess]


@pytest.fixture
def start_trainer(warm_torch: WarmPython) -> StartTrainer:
    """Starts ``save_generation.py`` as one rank that is killed at a failpoint."""

    def start(address: str, *words: object, point: str) -> WarmProcess:
        command = [str(TRAINER), address, *map(str, words)]
        environment = {**os.environ, VARIABLE: point, "OMP_NUM_THREADS": "1"}
        return warm_torch.start(command, environment, 0, 1, 2)

    return start


@pytest.mark.parametrize("point", ["client.save.after_begin", "client.save.after_copy"])
def test_trainer_killed_before_its_seal_leaves_the_previous_generation(
    point: str,
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    start_trainer: StartTrainer,
    tmp_path: Path,
) -> None:
    daemon.start().wait_ready()
    address = daemon.address()["rpc"]
    trainer = start_trainer(address, 0, 1, tmp_path / "r", 1, 2, point=f"{point}:2")
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
    daemon: DaemonProcess,
    connect: Callable[[], forebay.Client],
    start_trainer: StartTrainer,
    tmp_path: Path,
) -> None:
    daemon.start().wait_ready()
    address = daemon.address()["rpc"]
    ranks = [
        start_trainer(address, rank, 2, tmp_path / "r", 5, point="client.save.after_seal")
        for rank in range(2)
    ]
    assert [rank.wait(100) for rank in ranks] == [-9, -9]
    with connect() as client:
        assert_restores(client, "killed", 5)
