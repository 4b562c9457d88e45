"""Which generation is the latest: along the newest attempt's lineage, never by step or by clock.

A run that is rolled back saves the same steps again, so neither the highest step nor the newest
time says what the run stands on. What does: the newest attempt, the generation it restored, the
attempt that made that one, and so on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from forebay_server.model.states import GenerationState


class Point(NamedTuple):
    """A generation within its run."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"{self.attempt}/{self.step}"


@dataclass(frozen=True)
class Lineage:
    """The attempts of one run and the states of their generations. Immutable."""

    parents: Mapping[int, Point | None]
    """Attempt number to the generation it restored."""
    states: Mapping[Point, GenerationState]

    def walk(self, start: Point | None = None) -> Iterator[Point]:
        """All generations that the newest attempt stands on, newest first; with *start* those from
        that one down.

        Those of the newest attempt from its last step down, then the generation it restored and
        what is older than that in its attempt, then what that attempt restored, and so on. A
        parent without a generation (deleted since) is passed over; what is older is not.
        """
        steps: dict[int, list[int]] = defaultdict(list)
        for number, step in self.states:
            steps[number].append(step)
        attempt: int | None = max(self.parents, default=None)
        upto: int | None = None
        if start is not None:
            attempt, upto = start
        while attempt is not None:
            for step in sorted(steps[attempt], reverse=True):
                if upto is None or step <= upto:
                    yield Point(attempt, step)
            parent = self.parents.get(attempt)
            # Parents are older by rule; anything else would make the walk endless.
            if parent is None or parent.attempt >= attempt:
                return
            attempt, upto = parent

    def root(self, newest: int | None = None) -> int | None:
        """The attempt where :meth:`walk` ends, from attempt *newest* (None: the newest one) down:
        it restored nothing of this run. None without any attempt."""
        attempt = max(self.parents, default=None) if newest is None else newest
        while attempt is not None:
            parent = self.parents.get(attempt)
            if parent is None or parent.attempt >= attempt:
                return attempt
            attempt = parent.attempt
        return None

    def candidates(
        self,
        wanted: Collection[GenerationState],
        skip: Collection[Point] = (),
        start: Point | None = None,
    ) -> Iterator[Point]:
        """The generations of :meth:`walk` that are in one of the *wanted* states, *skip* left out.

        A generation that is newer than a skipped one stays a candidate.
        """
        for point in self.walk(start):
            if self.states[point] in wanted and point not in skip:
                yield point

    def latest(
        self, wanted: Collection[GenerationState], skip: Collection[Point] = ()
    ) -> Point | None:
        """The newest of :meth:`candidates`."""
        return next(self.candidates(wanted, skip), None)

    def at_step(self, step: int, wanted: Collection[GenerationState]) -> Point | None:
        """The newest generation of this *step* on the lineage that is in a *wanted* state."""
        return next((point for point in self.candidates(wanted) if point.step == step), None)


def needed_as_parent(
    point: Point, lineage: Lineage, visible: Iterable[GenerationState]
) -> int | None:
    """The attempt that would lose its only way back if the generation at *point* went, or None.

    An attempt needs the generation that it restored as long as nothing of its own is in a
    *visible* state: until then that generation is what a resume of the run starts from. Only the
    newest attempt resumes, so only what it stands on counts.
    """
    states = set(visible)
    if lineage.latest(states) != point:
        return None
    newest = max(lineage.parents, default=None)
    return newest if newest is not None and newest != point.attempt else None
