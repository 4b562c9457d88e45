"""How fast background work may move bytes through a tier, so that readers do not feel it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

YIELD_SECONDS: Final = 0.25
"""The longest that one piece waits for readers: background work slows down to a piece each of
these, and never starves."""
BURST_SECONDS: Final = 0.5
"""A tier that was idle gives so much of its rate at once."""
LOOK_SECONDS: Final = 0.01
"""How often a waiting mover looks whether readers are gone."""


class Budget:
    """Bytes per second and tier for background work. Thread-safe.

    A tier without a rate is not limited. Whatever the rate, movers step back while somebody waits
    for bytes of the tier (:meth:`foreground`).
    """

    def __init__(
        self,
        rates: Mapping[str, float],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """*rates*: tier to bytes per second, 0 or missing: no limit. *clock* answers seconds."""
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._buckets = {tier: _Bucket(rate, clock()) for tier, rate in rates.items() if rate > 0}
        self._readers: Counter[str] = Counter()

    @contextmanager
    def foreground(self, tier: str) -> Iterator[None]:
        """Somebody waits for bytes of *tier* inside the ``with`` block."""
        with self._lock:
            self._readers[tier] += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers[tier] -= 1

    def is_busy(self, tier: str) -> bool:
        """Whether anybody waits for bytes of *tier*."""
        with self._lock:
            return self._readers[tier] > 0

    def take(self, tier: str, num_bytes: int, check: Callable[[], object] = lambda: None) -> None:
        """Wait until *num_bytes* more may move through *tier*; on a thread, never on the loop.

        *check* is called now and then while it waits, and may raise to end the wait.
        """
        self._yield(tier, check)
        bucket = self._buckets.get(tier)
        if bucket is None:
            return
        with self._lock:
            wait = bucket.take(num_bytes, self._clock())
        until = self._clock() + wait
        while (left := until - self._clock()) > 0:
            check()
            self._sleep(min(left, YIELD_SECONDS))

    def _yield(self, tier: str, check: Callable[[], object]) -> None:
        until = self._clock() + YIELD_SECONDS
        while self.is_busy(tier) and self._clock() < until:
            check()
            self._sleep(LOOK_SECONDS)


class _Bucket:
    """A token bucket that may run into debt: who takes more than there is waits for it to fill."""

    def __init__(self, rate: float, at: float) -> None:
        self._rate = rate
        self._tokens = rate * BURST_SECONDS
        self._at = at

    def take(self, num_bytes: int, at: float) -> float:
        """Take *num_bytes* at the time *at*; the seconds to wait before using them."""
        full = self._rate * BURST_SECONDS
        self._tokens = min(full, self._tokens + (at - self._at) * self._rate) - num_bytes
        self._at = at
        return max(0.0, -self._tokens / self._rate)
