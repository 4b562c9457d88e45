"""A rank that dies, fails or hangs ends the others, with a sentence that says which and where."""

import re
import signal
import subprocess
import sys

import pytest

import forebay
from forebay_trainer.watch import Judge, Sign, WatchConfig
from forebay_wire.errors import InvalidRequest

pytestmark = pytest.mark.timeout(200)

CONFIG = WatchConfig(step_seconds=60.0, peer_seconds=10.0, beat_seconds=1.0)


def test_ranks_that_live_and_move_are_left_alone():
    judge = Judge(CONFIG)
    for now in range(100):
        signs = {rank: Sign(beat=now, step=now, quiet_seconds=3.0) for rank in range(3)}
        assert judge.look(float(now), signs) is None


def test_a_rank_without_a_sign_of_life_is_dead_after_peer_seconds():
    judge = Judge(CONFIG)
    silent = Sign(beat=7, step=3, phase="update")
    assert judge.look(0.0, {0: Sign(beat=1), 1: silent}) is None
    assert judge.look(10.0, {0: Sign(beat=2), 1: silent}) is None
    assert judge.look(10.5, {0: Sign(beat=3), 1: silent}) == (
        "rank 1, last in step 3 (update), gave no sign of life for 10 s"
    )
    assert judge.look(11.0, {0: Sign(beat=4), 1: Sign(beat=8)}) is None


def test_a_rank_that_ended_well_or_lost_contact_is_not_to_blame():
    judge = Judge(CONFIG)
    for state in ("ended", "lost"):
        gone = Sign(beat=1, state=state, quiet_seconds=500.0)
        assert judge.look(0.0, {0: Sign(beat=1), 1: gone}) is None
        assert judge.look(99.0, {0: Sign(beat=2), 1: gone}) is None


def test_a_rank_that_failed_is_named_with_its_reason():
    failed = Sign(beat=1, step=9, phase="save", state="failed", reason="OSError: no room")
    assert Judge(CONFIG).look(0.0, {0: Sign(), 2: failed}) == (
        "rank 2 failed in step 9 (save): OSError: no room"
    )


def test_ranks_that_come_no_further_are_listed_with_where_they_are():
    signs = {
        0: Sign(step=5, phase="forward and backward", quiet_seconds=61.0),
        1: Sign(step=5, phase="load", quiet_seconds=60.5),
    }
    assert Judge(CONFIG).look(0.0, signs) == (
        "no progress for 60 s: rank 0 in step 5 (forward and backward) for 61 s; "
        "rank 1 in step 5 (load) for 60 s"
    )


@pytest.mark.parametrize("keys", [{"beat_seconds": 0}, {"peer_seconds": 1.5}, {"step_seconds": 0}])
def test_times_that_make_no_sense_are_refused(keys):
    with pytest.raises(InvalidRequest):
        WatchConfig(**keys)


WATCH = ("watch.step_seconds=12", "watch.peer_seconds=9", "watch.beat_seconds=0.3")
KEYS = (*WATCH, "checkpoint.every_steps=4", "max_steps=100000", "data.num_threads=0")
GOOD = re.compile(r"the last good generation is \S+@1/\d+")


def faulty(launch, name, fault=None):
    keys = [*KEYS, "min_step_seconds=0.02"]
    if fault:
        keys += [f"model.fault={fault}", "model.fault_step=22", "model.fault_rank=1"]
    return launch(*keys, num_ranks=2, run=name)


def test_all_ranks_end_with_a_sentence_when_one_fails_hangs_or_dies(launch, client):
    worlds = {
        "raise": faulty(launch, "raise", "raise"),
        "hang": faulty(launch, "hang", "hang"),
        "nan": faulty(launch, "nan", "nan"),
        "kill": faulty(launch, "kill"),
        "stop": faulty(launch, "stop"),
    }
    for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        worlds[name].wait_step(21)
        worlds[name].processes[1].send_signal(number)
    texts = {}
    for name, ranks in worlds.items():
        if name == "stop":  # it cannot end by itself
            ranks.processes[0].wait(60)
            ranks.kill()
        statuses = ranks.statuses()
        texts[name] = ranks.output()
        assert 0 not in statuses, (name, texts[name])
        first = ranks.logs[0].read_text()
        assert GOOD.search(first), (name, first)

    first = worlds["raise"].logs[0].read_text()
    assert "rank 1 failed in step 22" in first
    assert "RuntimeError: the fault that was asked for" in first
    assert "no progress for 12 s: rank 0 in step 22" in texts["hang"]
    assert "rank 1 in step 22 (forward and backward) for 12 s" in texts["hang"]
    assert "in inputs" in worlds["hang"].logs[1].read_text()  # where it sleeps, in its stacks
    for name in ("kill", "stop"):
        assert re.search(r"rank 1, last in step \d+ .* gave no sign of life", texts[name]), name
    nan_is_named(client, worlds["nan"], texts["nan"])


HANG = """
import ctypes
from forebay_trainer.parallel import ParallelConfig
from forebay_trainer.watch import Watch, WatchConfig

config = WatchConfig(step_seconds=1.0, peer_seconds=1.0, beat_seconds=0.1)
with Watch(config, ParallelConfig(backend="gloo").build(), str) as watch:
    watch.at(1, "evaluation")
    ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the lock of the interpreter
"""


@pytest.mark.slow
def test_a_rank_that_hangs_in_c_is_ended_with_its_stacks():
    ended = subprocess.run(
        [sys.executable, "-c", HANG], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert 'File "<string>", line 9 in <module>' in ended.stderr


@pytest.mark.slow
def test_the_rank_that_keeps_the_meeting_point_may_die_too(launch):
    ranks = launch(*KEYS, "min_step_seconds=0.02", num_ranks=3)
    ranks.wait_step(21)
    ranks.processes[0].kill()
    assert ranks.statuses()[1:] == [3, 3], ranks.output()
    for log in ranks.logs[1:]:
        assert GOOD.search(log.read_text()), ranks.output()


def nan_is_named(client, ranks, text):
    assert "LossNotFinite: the loss of step 22 is nan; nothing of it was applied" in text
    named = re.search(r"Its samples are the rows ([\d, ]+) of the dataset", text)
    found = {int(row) for row in named[1].split(", ")}
    train = client.dataset("numbers", split="train")
    # Steps count from 1, and the 7 batches of an epoch leave off where step 22 begins.
    with forebay.DataLoader(
        train, global_batch_size=12, shuffle="full", seed=0, include_ids=True, rank=0, world_size=1
    ) as loader:
        loader.set_epoch(3)
        expected = next(iter(loader))["_ids"].tolist()
    assert found == set(expected)
    run = text.split("run ", 1)[1].split(",", 1)[0]
    assert max(each.step for each in client.checkpoints(run)) == 20
