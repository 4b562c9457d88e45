"""Waiting with an end: deadlines, and pauses that grow with jitter."""

from __future__ import annotations

import random
import time
from typing import Final

RECONNECT_SECONDS: Final = 60.0
"""How long a call waits for a daemon that went away before it raises DaemonUnavailable."""


class Deadline:
    """A point in time, *seconds* from its making. Thread-safe."""

    def __init__(self, seconds: float, within: Deadline | None = None) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._within = within

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        left = max(0.0, self._end - time.monotonic())
        return left if self._within is None else min(left, self._within.remaining)

    def at_most(self, seconds: float) -> Deadline:
        """A deadline in *seconds*, or with this one if that comes (or is cancelled) earlier."""
        return Deadline(seconds, self)

    def cancel(self) -> None:
        """Expire now: whoever waits until then stops soon."""
        self._end = 0.0

    @property
    def expired(self) -> bool:
        return self.remaining <= 0.0


class Backoff:
    """Pauses from *first* to *limit* seconds, doubling, each shortened by up to half at random.

    The jitter keeps the ranks of a job from knocking all at once. Not thread-safe.
    """

    def __init__(self, first: float = 0.02, limit: float = 1.0) -> None:
        self._next = first
        self._limit = limit

    def pause(self, deadline: Deadline) -> bool:
        """Sleep once, no longer than until *deadline*; False (and no sleep) if it has passed."""
        if deadline.expired:
            return False
        time.sleep(min(self.next_seconds(), deadline.remaining))
        return True

    def next_seconds(self) -> float:
        """The length of the next pause in seconds, for callers that wait on something else."""
        pause = self._next * random.uniform(0.5, 1.0)
        self._next = min(self._next * 2, self._limit)
        return pause
