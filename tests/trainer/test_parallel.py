"""Ranks in processes of their own keep the same parameters, those that one process would get."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

# Three steps on batches of 7, 7 and 1 samples: in the last one most ranks have an empty part.
TRAIN = """
import json, torch
from torch.nn import functional as F
from forebay_trainer.data import Data, DataConfig
from forebay_trainer.loop import share_of_mean
from forebay_trainer.models import ModelConfig
from forebay_trainer.optim import OptimizerConfig
from forebay_trainer.parallel import ParallelConfig
from forebay_wire.order import Cut

images = torch.randint(0, 256, (15, 28, 28), generator=torch.Generator().manual_seed(1)).byte()
labels = torch.arange(15) % 10
data = Data(DataConfig(), None, None, num_samples=15)
with ParallelConfig(backend="gloo", timeout_seconds=30).build() as parallel:
    torch.manual_seed(parallel.rank)  # DDP starts all ranks from rank 0's parameters
    model = parallel.wrap(ModelConfig(dropout=0.0, channels=(4,), hidden_features=8).build())
    optimizer = OptimizerConfig(name="sgd", learning_rate=0.1).build(model)
    cut = Cut(15, 7)
    for step in range(cut.num_steps):
        part = cut.part(step, parallel.rank, parallel.num_ranks)
        rows = torch.from_numpy(part.positions(15))
        examples = data.prepare({"image": images[rows], "label": labels[rows]})
        (num_samples,) = parallel.sum([examples.num_samples])
        losses = F.cross_entropy(model(examples.images), examples.labels, reduction="none")
        loss = share_of_mean(losses, examples.weights, num_samples)
        optimizer.zero_grad()
        (loss * parallel.num_ranks).backward()
        optimizer.step()
    totals = parallel.sum([loss.item()])
    values = torch.cat([each.detach().flatten() for each in model.parameters()])
    print(json.dumps({"loss": totals[0], "values": values.tolist()}))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(num_ranks):
    """What each of the ranks printed."""
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(num_ranks)
    ]
    try:
        return [json.loads(rank.communicate(timeout=80)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_three_ranks_end_with_the_parameters_of_one_process():
    (alone,) = train(1)
    first, *others = train(3)
    for other in others:
        assert other == first
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert first["values"] == pytest.approx(alone["values"], rel=1e-3, abs=1e-5)


RANK = """
import os, signal, sys, time
from forebay_trainer.parallel import end_with_parent
end_with_parent(signal.SIGTERM)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_rank_is_told_when_its_torchrun_was_killed():
    launcher = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]],"
    launcher += " start_new_session=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", launcher, RANK], stdout=subprocess.PIPE
    ) as torchrun:
        assert int(torchrun.stdout.readline())
        torchrun.send_signal(signal.SIGKILL)
        # The pipe ends when its last holder, the rank, has ended.
        assert torchrun.stdout.read() == b""
