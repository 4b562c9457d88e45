"""Which rank has which part, and how a rank ends with what started it."""

import signal
import subprocess
import sys

import pytest

from forebay_trainer.parallel import ParallelConfig, Shape
from forebay_wire.errors import InvalidRequest


@pytest.mark.parametrize(
    ("keys", "num_ranks", "shape"),
    [
        ({}, 1, Shape()),
        ({}, 4, Shape(replicas=4)),
        ({"num_shards": 0}, 4, Shape(shards=4)),
        ({"num_shards": 2}, 6, Shape(replicas=3, shards=2)),
        ({"num_shards": 0, "num_replicas": 2}, 6, Shape(replicas=2, shards=3)),
        ({"num_tensor": 2}, 4, Shape(replicas=2, tensor=2)),
        ({"num_tensor": 2, "num_shards": 0}, 8, Shape(shards=4, tensor=2)),
        ({"num_stages": 2, "num_shards": 2}, 4, Shape(stages=2, shards=2)),
    ],
)
def test_ranks_that_are_left_fill_the_mesh(keys, num_ranks, shape):
    assert ParallelConfig(**keys).shape(num_ranks) == shape


@pytest.mark.parametrize(
    ("keys", "num_ranks"),
    [({"num_tensor": 2}, 3), ({"num_replicas": 2}, 4), ({"num_shards": 3}, 2)],
)
def test_ranks_that_do_not_fit_are_refused_with_their_number(keys, num_ranks):
    with pytest.raises(InvalidRequest, match=rf"and {num_ranks} run: change the keys"):
        ParallelConfig(**keys).shape(num_ranks)


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
