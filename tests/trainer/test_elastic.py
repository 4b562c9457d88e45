"""Under torchrun: ranks that die are started again, and nodes come and go between starts."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from forebay_trainer import records
from forebay_trainer.demo.proof import prove
from forebay_trainer.processes import descendants

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS = 240.0
KEYS = ("deterministic=true", "checkpoint.every_steps=4", "num_epochs=4")


class Torchrun:
    """An agent with its ranks; ended with all of them."""

    def __init__(self, daemon, folder, name, *options, keys=(), environment=None):
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, folder / f"{name}.log"
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        recipe = str(Path(__file__).parent / "tiny")
        words = [recipe, f"address={daemon.data}", f"run=elastic-{folder.parent.name}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launcher, "-m", "forebay_trainer", *words, f"output.folder={folder}", *keys],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )

    def ranks(self):
        """Process of each rank, as torchrun started them."""
        return [each for each in descendants(self.process.pid) if each.is_running()]

    def kill(self):
        family = self.ranks()
        self.process.kill()
        for each in family:
            if each.is_running():
                os.kill(each.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def text(self):
        return self.log.read_text(errors="replace")


def events(folder):
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition, *agents):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "\n".join(each.text()[-4000:] for each in agents)
        time.sleep(0.02)


def has_step(folder, attempt, step):
    return lambda: any(
        each["event"] == "step" and each["attempt"] == attempt and each["step"] >= step
        for each in events(folder)
    )


def check(folder, client, num_epochs):
    train = client.dataset("numbers", split="train")
    rows = set(train.rows_at(np.arange(len(train))).tolist())
    proof = prove(records.read_folder(folder / "records"), rows, num_epochs)
    assert proof.holds, proof.sentence()
    return proof


def test_a_rank_that_dies_is_started_again_and_nothing_is_lost(daemon, client, tmp_path):
    folder = tmp_path / "logs"
    options = ("--standalone", "--nproc-per-node=2", "--max-restarts=3")
    with Torchrun(daemon, folder, "a", *options, keys=(*KEYS, "min_step_seconds=0.1")) as agent:
        for attempt, step in ((1, 6), (2, 13)):
            wait_for(has_step(folder, attempt, step), agent)
            os.kill(agent.ranks()[attempt - 1].pid, signal.SIGKILL)
        assert agent.process.wait(SECONDS) == 0, agent.text()
    assert "gave no sign of life" in agent.text() or "lost contact" in agent.text()
    proof = check(folder, client, 4)
    assert proof.num_attempts == 3
    assert proof.rolled_back
    losses = {}
    for each in events(folder):
        if each["event"] == "step":  # what was rolled back came again, bit for bit
            assert losses.setdefault(each["step"], each["loss"]) == each["loss"]
    assert len(losses) == 28


def test_nodes_join_and_leave_between_starts(daemon, client, tmp_path, port):
    folder = tmp_path / "logs"
    options = ("--nnodes=1:2", "--max-restarts=6", "--rdzv-backend=c10d", "--rdzv-id=e")
    options += (f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1")
    options += ("--rdzv-conf=last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=8",)
    keys = (*KEYS, "min_step_seconds=0.5", "num_epochs=8", "watch.peer_seconds=20")

    # Else an agent that was alone does not tell a node that joins where to meet.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agent = functools.partial(Torchrun, daemon, folder, keys=keys, environment=environment)

    def started(num_ranks, after=0):
        """The attempt on so many ranks after another one, once it has taken steps."""
        starts = [each for each in events(folder) if each["event"] == "start"]
        for each in starts:
            if each["attempt"] > after and each["num_ranks"] == num_ranks:
                return has_step(folder, each["attempt"], each["step"] + 2)() and each["attempt"]
        return 0

    with agent("a", "--nproc-per-node=2", *options) as stays:
        wait_for(lambda: started(2), stays)
        with agent("b", "--nproc-per-node=1", *options) as goes:
            wait_for(lambda: started(3), stays, goes)
            joined = started(3)
            goes.kill()
        wait_for(lambda: started(2, after=joined), stays)
        assert stays.process.wait(SECONDS) == 0, stays.text()
    check(folder, client, 8)
