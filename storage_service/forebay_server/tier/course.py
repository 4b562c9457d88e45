"""What work on bytes spends its time on, so that whoever waits for it can be told why.

Work that runs under a :class:`Course` (``Tiers.run`` takes it along to its threads) is at each
moment busy with one thing: the differences between two looks at :meth:`Course.so_far` add up to the
time between them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal

Reason = Literal["tier", "queue", "throttle", "origin"]

REASONS: Final[tuple[Reason, ...]] = ("throttle", "origin", "tier", "queue")
"""Held back by a limit of bandwidth (or told by a store to come back later); at the object tier or
the origin; at a local tier, the catalog included; behind other work: for a thread, a buffer, room.
What comes first counts where several go on at once."""


class Course:
    """One piece of work: a fetch, a segment, an open. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """*clock* answers seconds. It begins now, in the queue."""
        self._clock = clock
        self._lock = threading.Lock()
        self._doing: Counter[Reason] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(REASONS, 0.0)
        self._since = clock()

    def so_far(self) -> dict[str, float]:
        """Seconds since it began, by reason."""
        with self._lock:
            self._settle()
            return dict(self._seconds)

    def switch(self, before: Reason | None, after: Reason | None) -> None:
        """One of the things that it does ends, and another one begins."""
        with self._lock:
            self._settle()
            if before is not None:
                self._doing[before] -= 1
            if after is not None:
                self._doing[after] += 1

    @contextmanager
    def following(self, other: Course) -> Iterator[None]:
        """Inside, this waits for *other*, and its time goes where that one's goes."""
        with self._lock:
            self._settle()
        began = other.so_far()
        try:
            yield
        finally:
            ended = other.so_far()
            with self._lock:
                self._since = self._clock()
                for reason in REASONS:
                    self._seconds[reason] += ended[reason] - began[reason]

    def _settle(self) -> None:
        now = self._clock()
        doing = next((reason for reason in REASONS if self._doing[reason] > 0), "queue")
        self._seconds[doing] += now - self._since
        self._since = now


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add *more*, reason to seconds, to *total*."""
    for reason, seconds in more.items():
        total[reason] = total.get(reason, 0.0) + seconds


_current: Final[ContextVar[tuple[Course, Reason | None] | None]] = ContextVar(
    "forebay_course", default=None
)
"""Of this task, or thread, and what that is doing."""


def current_course() -> Course | None:
    """Under which this task or thread works."""
    found = _current.get()
    return None if found is None else found[0]


def begin_course(course: Course) -> Course:
    """Have the rest of this task work under *course*."""
    _current.set((course, None))
    return course


@contextmanager
def doing(reason: Reason) -> Iterator[None]:
    """Inside, this task or thread does that, if it works under a course."""
    found = _current.get()
    if found is None:
        yield
        return
    course, before = found
    token = _current.set((course, reason))
    course.switch(before, reason)
    try:
        yield
    finally:
        course.switch(reason, before)
        _current.reset(token)


@contextmanager
def on_thread(course: Course, reason: Reason) -> Iterator[None]:
    """Inside, this thread works under *course*, on that."""
    token = _current.set((course, reason))
    course.switch(None, reason)
    try:
        yield
    finally:
        course.switch(reason, None)
        _current.reset(token)
