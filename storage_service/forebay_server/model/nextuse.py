"""Which blob a tier gives up first when plans say who needs what next: the farthest next use.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems
Journal 5(2), 1966, with bypass: a missed blob is not kept if all that would have to go is needed
earlier. Loaders of different speed are compared in seconds, which their reported positions give.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

NEVER: Final = math.inf
"""The time of a next use that no plan knows of."""

SWEEP: Final = 64
"""Stale keys brought up to date with each call, so that no call has to do them all."""

RATE_DECAY: Final = 0.995
"""Weight of the past at each report of a position: the speed is that of the last 200 or so."""

DRIFT: Final = 0.25
"""A plan whose times have moved by this share is looked at anew. Less is chance: steps take
different times."""


class PlanView(Protocol):
    """What one loader is going to read.

    Positions are numbers of the plan's own unit (a batch, a sample, a blob) that count on through
    all its epochs. The answers never change; an expected position must not lie before the start.
    """

    @property
    def seconds_per_position(self) -> float | None:
        """A guess until the loader has reported positions; None: as fast as the other plans."""

    def next_position(self, blob: str, start: int) -> float | None:
        """The first position >= *start* at which *blob* is needed, exact or expected; None: never
        again. Called often: O(log n)."""

    def uses(self, start: int) -> Iterator[tuple[int, str]]:
        """(position, blob) in ascending order from *start* on, lazily, perhaps without an end. A
        blob that one position needs several times may come once."""


@dataclass(frozen=True)
class Admission:
    """Whether a missed blob is kept, and what goes for it."""

    admit: bool
    victims: tuple[str, ...] = ()


REFUSED: Final = Admission(admit=False)


@dataclass(frozen=True)
class Use:
    """Somebody is going to need *blob* at *time* (of the caller's clock)."""

    time: float
    plan: str
    position: int
    blob: str


@dataclass(frozen=True)
class _Schedule:
    """A straight line from positions to times."""

    position: int
    time: float
    seconds_per_position: float

    def time_of(self, position: float) -> float:
        return self.time + (position - self.position) * self.seconds_per_position


@dataclass
class _Plan:
    """A view with where its loader stands."""

    view: PlanView
    position: int
    time: float
    schedule: _Schedule
    """The line that the keys in the heap are made with."""
    served: dict[str, int] = field(default_factory=dict)
    """Blob to the position behind the use that it was handed over for, ahead of the position."""
    _seconds: float = 0.0
    _positions: float = 0.0

    def observe(self, position: int, time: float) -> None:
        moved, took = position - self.position, time - self.time
        if moved > 0 and took >= 0:
            self._positions = self._positions * RATE_DECAY + moved
            self._seconds = self._seconds * RATE_DECAY + took
        self.position, self.time = position, max(time, self.time)

    def measured_rate(self) -> float | None:
        """Seconds per position; None before anything was seen."""
        if self._positions and self._seconds:
            return self._seconds / self._positions
        return self.view.seconds_per_position

    def next_position(self, blob: str) -> float | None:
        return self.view.next_position(blob, self.served.get(blob, self.position))


_Key = tuple[float, float]
"""(minus the time of the next use, last use): the smallest key goes first."""

_UNKNOWN: Final[_Key] = (NEVER, NEVER)
"""No entry in the heap has it."""


@dataclass
class _Resident:
    num_bytes: int
    last_used: float
    key: _Key


class NextUse:
    """Knows what a tier holds and what all plans are going to read. Not thread-safe; no clock:
    callers pass times, in seconds, of any one clock that does not jump back.

    Every call costs O(log n) in the number of resident blobs per blob that it touches, times the
    number of plans. After a plan came, went or changed its speed, the order of victims is that of
    before for a while: each call brings :data:`SWEEP` blobs up to date.
    """

    def __init__(self) -> None:
        self._plans: dict[str, _Plan] = {}
        self._residents: dict[str, _Resident] = {}
        self._heap: list[tuple[_Key, str]] = []
        self._stale: list[str] = []
        self._now = 0.0

    # ------------------------------------------------------------------------------- plans

    def add_plan(self, plan: str, view: PlanView, position: int, now: float) -> None:
        """A loader has registered, and everything before *position* is read."""
        if plan in self._plans:
            raise ValueError(f"plan {plan!r} is known already")
        self._now = max(self._now, now)
        added = _Plan(view, position, now, _Schedule(position, now, 1.0))
        self._plans[plan] = added
        added.schedule = self._line(added)
        self._all_are_stale()

    def remove_plan(self, plan: str) -> None:
        """It ended or its loader is dead. Idempotent."""
        if self._plans.pop(plan, None) is not None:
            self._all_are_stale()

    def advance(self, plan: str, position: int, now: float) -> None:
        """The loader has read everything before *position*, at *now*.

        :class:`ValueError` for a position that goes backwards.
        """
        moving = self._plans[plan]
        if position < moving.position:
            raise ValueError(
                f"plan {plan!r} goes back from position {moving.position} to {position}"
            )
        self._now = max(self._now, now)
        passed = self._passed(moving, position)
        moving.observe(position, now)
        for blob in passed:
            if moving.served.get(blob, position) <= position:
                moving.served.pop(blob, None)
            self._refresh(blob)
        if self._has_drifted(moving):
            moving.schedule = self._line(moving)
            self._all_are_stale()
        self._sweep()

    def served(self, plan: str, blob: str) -> None:
        """*plan*'s loader has got *blob* for its next position that needs it, which is still ahead
        of the reported one: what counts is its use after that."""
        found = self._plans[plan]
        position = found.next_position(blob)
        if position is not None:
            found.served[blob] = math.floor(position) + 1
            self._refresh(blob)

    def next_use(self, blob: str) -> float | None:
        """When some plan needs *blob* next; None: no plan needs it again."""
        times = [
            self._line(plan).time_of(position)
            for plan in self._plans.values()
            if (position := plan.next_position(blob)) is not None
        ]
        return min(times, default=None)

    def deadlines(self) -> Iterator[Use]:
        """All that plans are going to need, earliest first, lazily, perhaps without an end. Blobs
        come again with each use. Valid until a plan is added, removed or advanced."""
        return heapq.merge(
            *(self._uses(name, plan) for name, plan in self._plans.items()),
            key=lambda use: (use.time, use.plan),
        )

    # --------------------------------------------------------------------------- residents

    def stored(self, blob: str, num_bytes: int, now: float) -> None:
        """The tier has *blob* now. Again: only its size is news, so that a list of what is there
        may be told as often as one likes."""
        self._now = max(self._now, now)
        resident = self._residents.get(blob)
        if resident is None:
            self._residents[blob] = _Resident(num_bytes, now, _UNKNOWN)
            self._refresh(blob)
        else:
            resident.num_bytes = num_bytes
        self._sweep()

    def touched(self, blob: str, now: float) -> None:
        """Somebody reads *blob*; nothing if the tier does not have it."""
        self._now = max(self._now, now)
        resident = self._residents.get(blob)
        if resident is not None:
            resident.last_used = max(resident.last_used, now)
            self._refresh(blob)

    def removed(self, blob: str) -> None:
        """The tier has *blob* no more. Idempotent."""
        self._residents.pop(blob, None)
        if not self._residents:
            self._heap.clear()

    def __contains__(self, blob: str) -> bool:
        return blob in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def victims(
        self, bytes_needed: int, may_go: Callable[[str], bool] = lambda blob: True
    ) -> list[str]:
        """Blobs of together at least *bytes_needed* (all that may go, if they are fewer bytes):
        those that no plan needs again, least recently used first, then by farthest next use.

        Nothing is removed: that is for the caller to try and to report. What must not go often
        (pinned, dirty) is better never reported as stored: it costs time in every call.
        """
        return [blob for blob, _ in self._pick(bytes_needed, may_go)]

    def should_admit(
        self,
        blob: str,
        num_bytes: int,
        room_bytes: int,
        may_go: Callable[[str], bool] = lambda blob: True,
    ) -> Admission:
        """Whether a missed *blob* is worth its room, of which *room_bytes* are free: yes if a plan
        needs it again, and earlier than everything that must go for it.

        Uses that are being served right now do not count: call :meth:`served` (or
        :meth:`advance`) before. Without any plan for the blob the answer is no, whatever the room.
        """
        if not self._is_planned(blob):
            return REFUSED
        key = self._key_of(blob, self._now)
        return self._admit_before(key, num_bytes, room_bytes, may_go)

    # ------------------------------------------------------------------------------- parts

    def _is_planned(self, blob: str) -> bool:
        return any(plan.next_position(blob) is not None for plan in self._plans.values())

    def _admit_before(
        self, key: _Key, num_bytes: int, room_bytes: int, may_go: Callable[[str], bool]
    ) -> Admission:
        """Admit, if what goes before *key* makes enough room."""
        if num_bytes <= room_bytes:
            return Admission(admit=True)
        picked = self._pick(num_bytes - room_bytes, may_go, before=key)
        freed = sum(self._residents[victim].num_bytes for victim, _ in picked)
        if freed < num_bytes - room_bytes:
            return REFUSED
        return Admission(admit=True, victims=tuple(victim for victim, _ in picked))

    def _line(self, plan: _Plan) -> _Schedule:
        """Where *plan* stands and how fast it is, by all that is known now."""
        rate = plan.measured_rate()
        if rate is None:
            others = [one.measured_rate() for one in self._plans.values()]
            known = [one for one in others if one is not None]
            rate = sum(known) / len(known) if known else 1.0
        return _Schedule(plan.position, plan.time, rate)

    def _uses(self, name: str, plan: _Plan) -> Iterator[Use]:
        line = self._line(plan)
        for position, blob in plan.view.uses(plan.position):
            if position >= plan.served.get(blob, position):
                yield Use(line.time_of(position), name, position, blob)

    @staticmethod
    def _passed(plan: _Plan, stop: int) -> list[str]:
        passed: list[str] = []
        if stop == plan.position:
            return passed
        for position, blob in plan.view.uses(plan.position):
            if position >= stop:
                break
            passed.append(blob)
        return passed

    def _has_drifted(self, plan: _Plan) -> bool:
        """Whether keys made with the plan's schedule would order blobs wrongly beside others'."""
        if len(self._plans) < 2:
            return False
        old, new = plan.schedule, self._line(plan)
        if abs(new.seconds_per_position - old.seconds_per_position) > (
            DRIFT * old.seconds_per_position
        ):
            return True
        farthest = -self._heap[0][0][0] if self._heap else NEVER
        horizon = farthest - plan.time
        return 0 < horizon < NEVER and abs(old.time_of(plan.position) - plan.time) > DRIFT * horizon

    def _key_of(self, blob: str, last_used: float) -> _Key:
        nearest = NEVER
        for plan in self._plans.values():
            position = plan.next_position(blob)
            if position is not None:
                nearest = min(nearest, plan.schedule.time_of(position))
        return (-nearest, last_used)

    def _refresh(self, blob: str) -> None:
        resident = self._residents.get(blob)
        if resident is None:
            return
        key = self._key_of(blob, resident.last_used)
        if key != resident.key:
            resident.key = key
            heapq.heappush(self._heap, (key, blob))
            if len(self._heap) > 2 * len(self._residents) + SWEEP:
                self._heap = [(one.key, name) for name, one in self._residents.items()]
                heapq.heapify(self._heap)

    def _all_are_stale(self) -> None:
        self._stale = list(self._residents)
        self._sweep()

    def _sweep(self) -> None:
        for blob in self._stale[-SWEEP:]:
            self._refresh(blob)
        del self._stale[-SWEEP:]

    def _pick(
        self, bytes_needed: int, may_go: Callable[[str], bool], before: _Key | None = None
    ) -> list[tuple[str, _Key]]:
        """The victims with their keys; only keys that go before *before*, if given."""
        self._sweep()
        picked: list[tuple[str, _Key]] = []
        popped: list[tuple[_Key, str]] = []
        seen: set[str] = set()
        num_stale = 0  # beyond SWEEP of them, the order of before must do
        while bytes_needed > 0 and self._heap:
            key, blob = heapq.heappop(self._heap)
            resident = self._residents.get(blob)
            if resident is None or resident.key != key or blob in seen:
                continue  # left over from before the blob's last change
            current = self._key_of(blob, resident.last_used)
            if current != key:
                resident.key = key = current
                if num_stale < SWEEP:
                    num_stale += 1
                    heapq.heappush(self._heap, (current, blob))
                    continue
            popped.append((key, blob))
            seen.add(blob)
            if before is not None and key[0] >= before[0]:
                break
            if may_go(blob):
                picked.append((blob, key))
                bytes_needed -= resident.num_bytes
        for entry in popped:
            heapq.heappush(self._heap, entry)
        return picked


def first_uses(uses: Iterator[Use], num_blobs: int, until: float) -> list[Use]:
    """The first use of each of the next *num_blobs* different blobs that are needed before the time
    *until*, in order: what to prefetch from :meth:`NextUse.deadlines`."""
    found: dict[str, Use] = {}
    for use in uses:
        if use.time >= until or len(found) >= num_blobs:
            break
        found.setdefault(use.blob, use)
    return list(found.values())
