"""The kit finds a bad loader out, by the name of the promise that it breaks."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from forebay.testing import conformance
from forebay.testing.conformance import Environment, NotSupported, Subject, check_loader, payload
from forebay.testing.conformance.team import Hang, deadline

NUM_SAMPLES = 61


class Exact:
    """A loader over nothing but numbers that keeps every promise."""

    def open(self, setting):
        self.rank, self.shape = setting.rank, setting.shape
        self.place = [0, 0] if setting.states is None else list(setting.states[0])
        self.children = [self.start_worker() for _ in range(self.shape.num_workers)]

    def start_worker(self):
        return subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # it ends with its parent

    def order(self, epoch):
        return random.Random(epoch).sample(range(NUM_SAMPLES), NUM_SAMPLES)

    def next(self):
        if any(child.poll() is not None for child in self.children):
            raise RuntimeError("a worker is dead")
        epoch, position = self.place
        if position == NUM_SAMPLES:
            self.place = [epoch + 1, 0]
            return None
        stop = min(position + self.shape.global_batch_size, NUM_SAMPLES)
        self.place = [epoch, stop]
        batch = self.order(epoch)[position:stop]
        return [(n, payload(n)) for n in batch[self.rank :: self.shape.world_size]]

    def state(self):
        return list(self.place)

    def workers(self):
        return [child.pid for child in self.children]

    def close(self):
        for child in self.children:
            end(child)


def end(child):
    child.kill()
    child.stdin.close()
    child.wait()


class Steady(Environment):
    """Everything may happen to it, and nothing does."""

    num_samples = NUM_SAMPLES

    def nothing(self):
        return contextlib.nullcontext()

    damaged = slow = full = restarted = appended = deleted = nothing


def broken(adapter, environment=None, **options) -> list[str]:
    subject = Subject(adapter, environment or Steady(), deadline_seconds=20)
    return check_loader(subject, **options).broken


def test_a_good_loader_keeps_every_promise():
    report = check_loader(Subject(Exact, Steady()))
    assert report.is_conformant, str(report)
    assert [outcome.promise for outcome in report.outcomes] == conformance.promise_names()


class RepeatsAtResume(Exact):
    """What was read ahead and what was consumed are mixed up."""

    def state(self):
        epoch, position = self.place
        return [epoch, max(0, position - self.shape.global_batch_size)]


class SkipsAtResume(Exact):
    """A shuffle buffer is lost with its process."""

    def open(self, setting):
        super().open(setting)
        if setting.states is not None and 0 < self.place[1] < NUM_SAMPLES:
            self.place[1] = min(self.place[1] + 5, NUM_SAMPLES)


class LosesTheTail(Exact):
    def next(self):
        if self.place[1] + self.shape.global_batch_size > NUM_SAMPLES:
            self.place[1] = NUM_SAMPLES
        return super().next()


class DependsOnWorkers(Exact):
    """Shards are dealt to workers, so the order is theirs."""

    def order(self, epoch):
        return random.Random(epoch + 10 * self.shape.num_workers).sample(
            range(NUM_SAMPLES), NUM_SAMPLES
        )


class DependsOnRanks(Exact):
    def order(self, epoch):
        return random.Random(epoch + 10 * self.shape.world_size).sample(
            range(NUM_SAMPLES), NUM_SAMPLES
        )


class ReplaysAfterABatchSizeChange(Exact):
    """The position is kept in batches, rounded down to whole ones of the new size."""

    def open(self, setting):
        super().open(setting)
        if self.place[1] < NUM_SAMPLES:
            self.place[1] -= self.place[1] % self.shape.global_batch_size


class ReordersAtResume(Exact):
    """What is left of the epoch is all there, and comes in another order."""

    def open(self, setting):
        super().open(setting)
        self.began = list(self.place) if setting.states is not None else [0, NUM_SAMPLES]

    def order(self, epoch):
        order = super().order(epoch)
        if epoch == self.began[0]:
            order[self.began[1] :] = order[self.began[1] :][::-1]
        return order


class ReordersTheNextEpochAtResume(Exact):
    def open(self, setting):
        super().open(setting)
        self.is_resumed = setting.states is not None and self.place[1] >= NUM_SAMPLES

    def order(self, epoch):
        return super().order(epoch)[:: -1 if self.is_resumed else 1]


class HasOneOrder(Exact):
    def order(self, epoch):
        return super().order(0)


class IsUnshuffled(HasOneOrder):
    shuffles = False


class ShufflesDespiteItsWord(Exact):
    shuffles = False


class EndsUnevenly(Exact):
    def next(self):
        batch = super().next()
        return batch or None


class StopsAfterOneEpoch(Exact):
    def next(self):
        return super().next() if self.place[0] == 0 else None


class MovesWhenAsked(Exact):
    def state(self):
        self.place[1] = min(self.place[1] + 1, NUM_SAMPLES)
        return super().state()


class LeavesWorkers(Exact):
    left: list = []  # noqa: RUF012 - for the test to end them

    def close(self):
        self.left += self.children


class LeavesWorkersWhenKilled(Exact):
    def start_worker(self):
        return subprocess.Popen(["sleep", "20"], stdin=subprocess.PIPE)


class EndsWhenAWorkerDies(Exact):
    """The epoch is over without a word."""

    def next(self):
        if any(child.poll() is not None for child in self.children):
            return None
        return super().next()


class HangsWhenAWorkerDies(Exact):
    def next(self):
        while any(child.poll() is not None for child in self.children):
            time.sleep(0.01)
        return super().next()


class SharesAPlace(Exact):
    """All loaders of a process have one state: a name in shared memory that is not unique."""

    places: dict = {}  # noqa: RUF012 - this is the mistake

    def open(self, setting):
        super().open(setting)
        self.places[setting.rank] = self.place

    def next(self):
        self.place = self.places[self.rank]
        try:
            return super().next()
        finally:
            self.places[self.rank] = self.place


class HasAnObjectForAState(Exact):
    def state(self):
        return {1, 2}


@pytest.mark.parametrize(
    ("adapter", "promise"),
    [
        (RepeatsAtResume, "resumes_at_every_step"),
        (SkipsAtResume, "resumes_at_every_step"),
        (LosesTheTail, "epoch_is_whole"),
        (DependsOnWorkers, "workers_do_not_matter"),
        (DependsOnWorkers, "resumes_with_other_workers"),
        (DependsOnRanks, "ranks_do_not_matter"),
        (DependsOnRanks, "resumes_with_other_ranks"),
        (ReplaysAfterABatchSizeChange, "resumes_with_another_batch_size"),
        (ReplaysAfterABatchSizeChange, "resumes_again_and_again"),
        (ReordersAtResume, "resumes_at_every_step"),
        (ReordersAtResume, "resumes_with_other_workers"),
        (ReordersAtResume, "resumes_with_other_ranks"),
        (ReordersAtResume, "resumes_with_another_batch_size"),
        (ReordersAtResume, "resumes_again_and_again"),
        (ReordersTheNextEpochAtResume, "resumes_at_every_step"),
        (HasOneOrder, "epochs_are_shuffled_anew"),
        (ShufflesDespiteItsWord, "epochs_are_shuffled_anew"),
        (EndsUnevenly, "epoch_is_whole"),
        (StopsAfterOneEpoch, "further_epochs_are_whole"),
        (MovesWhenAsked, "asking_for_the_state_changes_nothing"),
        (LeavesWorkers, "left_early_it_ends"),
        (EndsWhenAWorkerDies, "a_killed_worker_is_not_silent"),
        (RepeatsAtResume, "a_killed_trainer_loses_nothing"),
        (SharesAPlace, "two_at_once"),
        (HasAnObjectForAState, "resumes_at_every_step"),
    ],
)
def test_a_bad_loader_is_found_out_by_name(adapter, promise):
    try:
        assert broken(adapter, only=[promise]) == [promise]
    finally:
        for child in LeavesWorkers.left:
            end(child)
        LeavesWorkers.left.clear()


def test_a_loader_that_does_not_shuffle_says_so():
    assert broken(IsUnshuffled) == []


def test_what_depends_on_workers_breaks_no_other_promise():
    names = broken(DependsOnWorkers)
    assert "epoch_is_whole" not in names
    assert "resumes_at_every_step" not in names


def test_a_hang_is_a_broken_promise():
    subject = Subject(HangsWhenAWorkerDies, Steady(), deadline_seconds=0.3)
    [outcome] = check_loader(subject, only=["a_killed_worker_is_not_silent"]).outcomes
    assert (outcome.verdict, outcome.detail) == ("broken", "next() did not return in 0.3 s")


def test_workers_that_outlive_their_trainer_are_found():
    subject = Subject(LeavesWorkersWhenKilled, Steady(), deadline_seconds=0.5)
    [outcome] = check_loader(subject, only=["a_killed_trainer_loses_nothing"]).outcomes
    assert outcome.verdict == "broken"
    assert "workers outlive their trainer" in outcome.detail


class Faulty(Steady):
    """A store with faults, for a loader that reads from it."""

    fault = ""

    @contextlib.contextmanager
    def during(self, fault):
        self.fault = fault
        try:
            yield
        finally:
            self.fault = ""

    def damaged(self):
        return self.during("damaged")

    def slow(self):
        return self.during("slow")

    def full(self):
        return self.during("full")

    def appended(self):
        return self.during("appended")

    def deleted(self):
        return self.during("deleted")

    def restarted(self):
        return self.during("restarted")


STORE = Faulty()


class FollowsTheStore(Exact):
    """Does the worst of each fault."""

    def next(self):
        batch = super().next()
        if STORE.fault == "damaged" and batch:
            return [(batch[0][0], b"\0" * 32), *batch[1:]]
        if STORE.fault == "slow":
            raise TimeoutError("too slow")
        return None if STORE.fault in ("full", "deleted", "restarted") else batch

    def order(self, epoch):
        order = super().order(epoch)
        return order[::-1] if STORE.fault == "appended" else order


@pytest.mark.parametrize(
    ("promise", "detail"),
    [
        ("damage_is_noticed", "wrong bytes"),
        ("a_slow_store_only_takes_longer", "TimeoutError"),
        ("a_full_store_loses_nothing", "lost"),
        ("a_restart_loses_nothing", "lost"),
        ("an_appended_version_waits", "repeated"),
        ("a_deleted_data_set_is_not_silent", "lost"),
    ],
)
def test_faults_of_the_store_reach_the_verdict(promise, detail):
    report = check_loader(Subject(FollowsTheStore, STORE), only=[promise])
    assert report.broken == [promise]
    assert detail in report.outcomes[0].detail


def test_what_cannot_be_tested_is_said():
    class Bare(Environment):
        num_samples = NUM_SAMPLES

    report = check_loader(Subject(Exact, Bare()), only=["damage_is_noticed", "epoch_is_whole"])
    assert [outcome.verdict for outcome in report.outcomes] == ["kept", "not tested"]
    assert not report.is_conformant
    assert report.broken == []
    assert "cannot damage stored bytes" in str(report)
    with pytest.raises(NotSupported):
        Bare().slow()


def test_the_report_tells_what_was_lost_and_after_what():
    report = check_loader(Subject(LosesTheTail, Steady()), only=["epoch_is_whole"])
    with pytest.raises(AssertionError, match=r"lost 1 samples \(\d+\) \(of 61\)"):
        report.check()
    found = json.loads(report.to_json())
    assert found["outcomes"][0]["verdict"] == "broken"


def test_the_same_seed_does_the_same():
    one, other = (
        check_loader(Subject(SkipsAtResume, Steady()), seed=3, only=["resumes_again_and_again"])
        for _ in range(2)
    )
    assert one.outcomes[0].detail == other.outcomes[0].detail


def test_a_deadline_leaves_the_alarm_of_others_as_it_was():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Hang), deadline(0.05, "it"):
            time.sleep(10)
        limit = time.monotonic() + 10
        while not rung and time.monotonic() < limit:
            time.sleep(0.01)
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_command_checks_a_loader_of_yours(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import contextlib, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('kit', {__file__!r})\n"
        "kit = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(kit)\n"
        "def good():\n"
        "    return contextlib.nullcontext(kit.Subject(kit.Exact, kit.Steady()))\n"
        "def bad():\n"
        "    return contextlib.nullcontext(kit.Subject(kit.LosesTheTail, kit.Steady()))\n"
    )
    for function, code in (("good", 0), ("bad", 1)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "forebay.testing.conformance", f"mine:{function}"),
                *("--only", "epoch_is_whole", "--only", "same_again"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == code, done.stderr
        assert "same_again" in done.stdout
