"""The plan of a loader whose samples lie in several shards each: told to the daemon as *turns*, so
many samples and all shards that are read for them, some way ahead of where the loader stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

from forebay.dataset.plan import PlanReporter, Standing
from forebay.transfer import Transfer
from forebay_wire.protocol import DataEndpoint

AHEAD_USES: Final = 1 << 14
"""Uses of shards that the daemon knows ahead of the loader, if there are as many."""

PAGE_USES: Final = 1 << 12
"""That one message tells: some 30 KB."""

MAX_EPOCHS: Final = 2
"""Epochs that it reaches ahead, however small they are."""


@dataclass(frozen=True)
class Turn:
    """Some positions that follow one another, and the shards that are read for them."""

    stop: int
    """The position after the last one; positions count through the epochs."""
    shards: tuple[int, ...]
    """Their numbers in the version; none where only other ranks read."""


class Course(Protocol):
    """What a loader reads when. Must not refer to the loader."""

    @property
    def manifest(self) -> str:
        """Id of the version's."""
        ...

    @property
    def num_samples(self) -> int:
        """Of an epoch."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all shards that an epoch reads."""
        ...

    def turns(self, epoch: int, position: int) -> Iterator[Turn]:
        """From a position on, through this and the following epochs."""
        ...


@dataclass
class _TurnStanding(Standing):
    course: Course = field(kw_only=True)
    rest: Iterator[Turn] = field(default_factory=lambda: iter(()))
    """Turns that the daemon does not know."""
    told: deque[tuple[int, int]] = field(default_factory=deque)
    """Where each turn ends that it knows and that is not past, and its uses."""
    num_uses: int = 0
    """Of those."""
    stop: int = 0
    """The position after the last turn that it knows."""
    page: int = 0

    def begin(self, transfer: Transfer, body: dict[str, Any]) -> dict[str, Any]:
        course = self.course
        self.rest = course.turns(body["epoch"], body["position"])
        self.told, self.num_uses, self.page = deque(), 0, 0
        self.stop = self._time(body)
        what = {"manifest": course.manifest, "plan_bytes": course.num_bytes, "loader": self.loader}
        answer = transfer.plan("plan", {**self._timed(body), **what})
        return self._tell(transfer, body) or answer

    def go_on(self, transfer: Transfer, body: dict[str, Any]) -> dict[str, Any]:
        if self._time(body) > self.stop:
            return self.begin(transfer, body)
        answer = transfer.plan("position", self._timed(body))
        return self._tell(transfer, body) or answer

    def _time(self, body: dict[str, Any]) -> int:
        return int(body["epoch"] * self.course.num_samples + body["position"])

    def _timed(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "epoch": 0, "position": self._time(body)}

    def _tell(self, transfer: Transfer, body: dict[str, Any]) -> dict[str, Any] | None:
        """All that the daemon is to know now; its last answer, if it was told anything."""
        answer, now = None, self._time(body)
        while self.told and self.told[0][0] <= now:
            self.num_uses -= self.told.popleft()[1]
        reach = now + MAX_EPOCHS * self.course.num_samples
        while self.num_uses < AHEAD_USES and self.stop < reach:
            start, turns = self.stop, self._next_page(reach)
            if not turns:
                break
            page: list[list[Any]] = []
            for turn in turns:
                page.append([turn.stop - start, turn.shards])
                self.told.append((turn.stop, len(turn.shards)))
                self.num_uses += len(turn.shards)
                start = turn.stop
            told = {"plan": self.plan, "page": self.page, "turns": page}
            answer = transfer.plan("turns", told)
            self.page, self.stop = self.page + 1, start
        return answer

    def _next_page(self, reach: int) -> list[Turn]:
        found: list[Turn] = []
        num_uses = 0
        for turn in islice(self.rest, PAGE_USES):
            found.append(turn)
            num_uses += len(turn.shards)
            if num_uses >= PAGE_USES or turn.stop >= reach:
                break
        return found


class TurnReporter(PlanReporter):
    """A loader's plan in turns; see ``PlanReporter``."""

    def __init__(self, endpoint: DataEndpoint, loader: str, course: Course) -> None:
        super().__init__(endpoint, loader, dict)
        self._standing = _TurnStanding(dict, loader, endpoint, course=course)
