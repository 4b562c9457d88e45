"""The trials of a sweep: begun, followed, pruned, told to the study. The handler of its runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from forebay_trainer.metrics.console import duration
from forebay_trainer.metrics.follow import Event
from forebay_trainer.metrics.history import History, history
from forebay_trainer.search.job import Base, Job, Slot, seconds_of
from forebay_trainer.search.pool import Running
from forebay_trainer.search.space import Space
from forebay_trainer.search.study import Study
from forebay_wire.errors import NotFound

MOST_STARTS: Final = 3
"""Of a trial in one sweep: somebody else ends it again and again."""

Which = Literal["last", "best"]


@dataclass(frozen=True)
class Objective:
    """What trials are compared by. Pure."""

    metric: str
    mode: Literal["min", "max"]
    which: Which
    """Of a trial's evaluations."""
    every_steps: int
    """Between evaluations; 0: one an epoch."""

    def reports(self, events: Sequence[Event], start: int) -> list[tuple[int, float]]:
        """Number of the evaluation, from 1, and its value. The number goes by steps or epochs, so
        that trials are compared at the same place. *start*: the step that the attempt began from;
        an evaluation there was told before, or is none of this trial."""
        found = []
        for event in events:
            if event["event"] != "evaluation" or self.metric not in event:
                continue
            number = event["step"] / self.every_steps if self.every_steps else event["epoch"] + 1
            if event["step"] > start and number == int(number):
                found.append((int(number), float(event[self.metric])))
        return found

    def value(self, found: History) -> float:
        """Of a run that came to its end; NaN if no evaluation has the metric."""
        first = found.starts[0]["step"] if found.starts else 0
        values = [
            event[self.metric]
            for event in found.evaluations
            if self.metric in event and event["step"] > first
        ]
        if not values:
            return math.nan
        if self.which == "last":
            return float(values[-1])
        choose = min if self.mode == "min" else max
        return float(choose((each for each in values if not math.isnan(each)), default=math.nan))


class Trials:
    """Up to *num_trials* of them, those of earlier processes included."""

    def __init__(
        self,
        base: Base,
        space: Space,
        study: Study,
        objective: Objective,
        *,
        num_trials: int,
        max_failures: int,
        common: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        """*common*: ``key=value`` of all trials. After *max_failures* failed ones in a row none is
        begun."""
        self.failure = ""
        """Why the sweep was ended early."""
        self._base = base
        self._space = space
        self._study = study
        self._objective = objective
        self._num_trials = num_trials
        self._max_failures = max_failures
        self._common = common
        self._say = say
        self._num_failed = 0
        self._waiting = study.running()
        self._num_starts: dict[int, int] = {}
        self._start_steps: dict[int, int] = {}
        self._pruned: set[int] = set()

    def next(self, slot: Slot) -> Job | None:
        if self.failure:
            return None
        if self._waiting:
            number = self._waiting.pop(0)
        elif self._study.num_begun < self._num_trials:
            number = self._study.ask()
        else:
            return None
        self._num_starts[number] = self._num_starts.get(number, 0) + 1
        values = self._space.arguments(self._study.values(number))
        return self._base.job(f"trial{number}", [*self._common, *values], slot)

    def progress(self, running: Running, events: Sequence[Event]) -> None:
        number = number_of(running.job)
        for event in events:
            if event["event"] == "start":
                self._start_steps[number] = event["step"]
        reports = self._objective.reports(events, self._start_steps[number])
        for place, value in reports:
            self._study.report(number, place, value)
        is_over = any(event["event"] == "end" for event in events)
        if reports and not is_over and not running.is_told and self._study.should_prune(number):
            self._pruned.add(number)
            running.tell()

    def ended(self, running: Running) -> None:
        number, end = number_of(running.job), running.end()
        if end.state == "left" and number not in self._pruned:
            if running.is_told or self._num_starts[number] < MOST_STARTS:
                self._waiting.append(number)  # it goes on: here, or in the next sweep
                return
            self._fail(number, running, f"ended by others {MOST_STARTS} times")
        elif end.state == "failed":
            self._fail(number, running, end.reason)
        elif end.state == "left":
            self._note(number, running)
            self._study.prune(number)
            self._tell(number, "pruned")
        else:
            self._complete(number, running)

    def _complete(self, number: int, running: Running) -> None:
        value = self._objective.value(self._note(number, running))
        if not math.isfinite(value):
            self._fail(number, running, f"{self._objective.metric} came to {value}")
            return
        self._study.complete(number, value)
        self._num_failed = 0
        self._tell(number, f"{self._objective.metric} {value:.5g}")

    def _fail(self, number: int, running: Running, reason: str) -> None:
        self._note(number, running)
        self._study.fail(number, reason)
        self._num_failed += 1
        self._tell(number, f"failed: {reason}")
        if self._num_failed >= self._max_failures:
            self.failure = (
                f"{self._num_failed} trials in a row failed, the last one: {reason}; see "
                f"{running.job.log}"
            )

    def _note(self, number: int, running: Running) -> History:
        try:
            found = history(running.events, running.job.run)
        except NotFound:  # it failed before it began
            found = History(running.job.run, [], [], [], [], 0, {})
        steps = found.steps[-1]["step"] if found.steps else 0
        self._study.note(number, steps, seconds_of(running.events))
        return found

    def _tell(self, number: int, what: str) -> None:
        row = next(row for row in self._study.rows() if row.number == number)
        values = "  ".join(self._space.arguments(row.values))
        best = self._study.best()
        shown = "" if best is None else f"  (best: {best.value:.5g}, trial {best.number})"
        spent = f"{row.steps} steps in {duration(row.seconds)}"
        self._say(f"trial {number}: {what}  {values}  {spent}{shown}")


def number_of(job: Job) -> int:
    return int(job.folder.name.removeprefix("trial"))
