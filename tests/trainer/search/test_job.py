"""What a run of many is started with, and how it ended, as its events and its log tell."""

import pytest

from forebay_trainer import recipe as recipes
from forebay_trainer.search.job import Base, Slot, end_of, seconds_of

END = {"event": "end", "attempt": 1, "time": 12.0, "step": 8}

TRACE = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
SAID = """step 3  loss 1.0
forebay_trainer, rank 0: RankLost: rank 1 failed
forebay_trainer, rank 1: LossNotFinite: the loss of step 4 is nan
RuntimeError: something else
"""


@pytest.mark.parametrize(
    ("events", "status", "log", "state", "reason"),
    [
        ([{**END, "reason": "done"}], 0, "", "done", "done"),
        ([{**END, "reason": "stopped early"}], 0, "", "done", "stopped early"),
        ([{**END, "reason": "terminated"}], 1, "", "left", "terminated"),  # by torchrun
        ([{**END, "reason": "done"}, {"event": "start"}], None, "", "left", "it was killed"),
        ([], 1, SAID, "failed", "LossNotFinite: the loss of step 4 is nan"),
        ([], 1, TRACE, "failed", "torch.OutOfMemoryError: CUDA out of memory. Tried to"),
        ([], -9, "step 3\n", "failed", "killed by signal 9, as the kernel does when memory"),
        ([], 5, "odd\n\n", "failed", "status 5: odd"),
        ([], 5, "", "failed", "status 5: it printed nothing"),
    ],
)
def test_how_a_run_ended(events, status, log, state, reason):
    end = end_of(events, status, log)
    assert end.state == state
    assert end.reason.startswith(reason)


def test_time_between_attempts_does_not_count():
    events = [{"attempt": number, "time": time} for number, time in [(1, 5), (1, 7), (2, 100)]]
    assert seconds_of([*events, {"attempt": 2, "time": 103}]) == 5


def test_runs_side_by_side_share_cores_and_gpus():
    alone = Slot(0, 1, 8, ["0", "1"])
    assert alone.environment(1) == {"PYTHONUNBUFFERED": "1"}
    slots = [Slot(number, 2, 8, ["4", "5", "6"]).environment(2) for number in range(2)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in slots] == ["4,5", "6,4"]
    assert {each["OMP_NUM_THREADS"] for each in slots} == {"2"}
    assert "CUDA_VISIBLE_DEVICES" not in Slot(1, 4, 2, []).environment(1)


def test_a_run_of_many_has_a_name_a_folder_and_metrics_that_can_be_read():
    given = ["run=a", "output.folder=here", "seed=3", "metrics.sinks=['prometheus']"]
    base = Base(recipes.load("mnist_cnn", given), "mnist_cnn", "gpu", given, 2)
    job = base.job("seed4", ["seed=4"], Slot(0, 1, 2, []))
    assert (job.run, str(job.metrics)) == ("a-seed4", "here/seed4/metrics.jsonl")
    words = job.command[job.command.index("forebay_trainer") :]
    assert words[1:4] == ["mnist_cnn", "--size", "gpu"]
    assert words[4:] == [
        "seed=4",
        "run=a-seed4",
        "output.folder=here/seed4",
        'metrics.sinks=["prometheus", "jsonl"]',
        "metrics.port=0",
    ]
    assert "--nproc-per-node=2" in job.command
