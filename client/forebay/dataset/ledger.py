"""What a loader books of its batches, their times by cause and their holes, and of the sums."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from forebay.dataset.advice import Habits, PlanFit, Workload, advise
from forebay.dataset.holes import ErrorBudget
from forebay.dataset.report import BatchTimes, LoaderReport, Meter
from forebay_wire.ids import new_random_name

if TYPE_CHECKING:
    from forebay.dataset.batches import ReadBatch
    from forebay.dataset.plan import PlanNews


def available_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def habits_of(dataset: object, columns: Sequence[str] | None, shuffle: str) -> Habits:
    """How a loader reads *columns* (None: all) of *dataset*."""
    every = getattr(dataset, "columns", None)  # what is packed has none to choose from
    if columns is not None:
        return Habits(len(columns), shuffle)
    return Habits(1 if every is None else len(every()), shuffle)


class Ledger:
    """Of one loader. Thread-safe; knows nothing of the loader, so its plan may keep it."""

    def __init__(self, where: str, max_errors: int, num_threads: int, habits: Habits) -> None:
        """*where*: whose rows, for messages; *max_errors*: -1 if the first one raises."""
        self.name = new_random_name()
        """By which the daemon tells the sums of one loader from those of another."""
        self._meter = Meter()
        self._budget = ErrorBudget(max_errors, where) if max_errors >= 0 else None
        self._num_threads = num_threads
        self._habits = habits
        self._fit = PlanFit()

    def start_epoch(self, epoch: int) -> None:
        """Batches of *epoch* follow."""
        self._meter.start_epoch(epoch)

    def hand_out(self, read: ReadBatch, asked: float, loaded: float, position: int) -> float:
        """Book a batch that is *asked* for since then, was there from *loaded* on (0: it has no
        way to a device), and is handed out now; when that is. TooManyBadSamples if its holes
        exceed the budget."""
        if read.holes:
            assert self._budget is not None, "else they were raised"
            self._budget.spend(read.holes)
        now, lay = perf_counter(), asked - read.finished
        self._meter.handed_out(
            read.num_samples,
            now - asked,
            read.times,
            read.num_bytes,
            lay if lay > 0.0 else 0.0,
            now - loaded if loaded else 0.0,
            len(read.holes),
            position,
        )
        return now

    def computed(self, seconds: float) -> None:
        """The training loop worked on a batch before it asked for the next."""
        self._meter.computed(seconds)

    @property
    def last(self) -> BatchTimes:
        """Of the batch that was handed out last."""
        return self._meter.last

    def report(self, news: PlanNews | None = None) -> LoaderReport:
        """The sums as they stand, with what the daemon last said."""
        report = self._meter.report()
        if news is not None:
            self._fit = news.fit
            report = replace(report, open_waits=news.waits, plan_problem=news.problem)
        bad = () if self._budget is None else self._budget.rows
        return replace(report, bad_samples=bad, advice=advise(self._workload(report), self._fit))

    def told(self, fit: PlanFit) -> dict[str, Any]:
        """What the daemon is told of the sums; *fit*: what it last said of the plan."""
        self._fit = fit
        return told(self.name, self.report())

    def _workload(self, report: LoaderReport) -> Workload:
        return Workload(
            report.seconds,
            report.stalls,
            sum(report.reading.values()),
            max(1, self._num_threads),
            available_cpus(),
            habits=self._habits,
        )


def told(name: str, report: LoaderReport) -> dict[str, Any]:
    """The sums of *report* as a plan's heartbeat carries them."""
    return {
        "name": name,
        "samples": report.samples,
        "batches": report.batches,
        "bytes_read": report.bytes_read,
        "masked_samples": report.masked_samples,
        "seconds": report.seconds,
        "wait_seconds": report.wait_seconds,
        "stalls": _rounded(report.stalls),
        "reading": _rounded(report.reading),
        "advice": report.advice,
        "covers": report.covers,
    }


def batch_times(times: BatchTimes) -> dict[str, float]:
    """``_times`` of a batch: seconds of its reading by cause, ``wait``, ``ready``."""
    return {**times.read, "wait": times.wait_seconds, "ready": times.ready_seconds}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {cause: round(took, 6) for cause, took in seconds.items() if took > 0.0}
