"""What a loader did and how long the training loop waited for it: counters of fixed size."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

BUCKETS_PER_DOUBLING: Final = 8
SHORTEST_SECONDS: Final = 1e-6
NUM_BUCKETS: Final = 40 * BUCKETS_PER_DOUBLING
"""Waits from 1 µs to 12 days, each bucket 9 % wider than the one before."""


@dataclass(frozen=True)
class LoaderReport:
    """A loader's work up to now, on this rank. Printing it gives one line."""

    samples: int
    """Samples handed out, padding not counted."""
    batches: int
    bytes_read: int
    """Bytes of the batches that were assembled."""
    seconds: float
    """Time inside epochs: from the first request of a batch to the last."""
    wait_seconds: float
    """The part of it in which the training loop waited for a batch."""
    wait_p50_seconds: float
    wait_p99_seconds: float
    open_waits: Mapping[str, float] = field(default_factory=dict)
    """How long this loader waited for shards in the daemon, by reason: ``num_waits``;
    ``tier_seconds`` (at a local tier, or the catalog), ``queue_seconds`` (behind other work: for a
    thread, a buffer, room), ``throttle_seconds`` (held back by a bandwidth limit, or by a store
    that is busy), ``origin_seconds`` (at the object tier, or the origin), which add up to the
    time waited; ``longest_seconds`` (one wait)."""
    plan_problem: str = ""
    """Why the daemon has no plan of this loader, so that it reads without being fetched for."""

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that went into waiting for data, 0 to 1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples in {self.batches:,} batches, "
            f"{self.samples_per_second:,.0f} samples/s, {self.wait_share:.1%} of "
            f"{self.seconds:.1f} s waiting for data (wait p50 {self.wait_p50_seconds * 1e3:.2f} ms,"
            f" p99 {self.wait_p99_seconds * 1e3:.2f} ms), {self.bytes_read / 1e6:,.1f} MB read"
        )


class Meter:
    """Counts for one loader. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples = self._batches = self._bytes_read = 0
        self._seconds = self._wait_seconds = 0.0
        self._waits = [0] * NUM_BUCKETS

    def read(self, num_bytes: int) -> None:
        """A batch of *num_bytes* was assembled."""
        with self._lock:
            self._bytes_read += num_bytes

    def handed_out(self, samples: int, wait_seconds: float) -> None:
        """The training loop got a batch after waiting."""
        with self._lock:
            self._samples += samples
            self._batches += 1
            self._seconds += wait_seconds
            self._wait_seconds += wait_seconds
            self._waits[_bucket(wait_seconds)] += 1

    def computed(self, seconds: float) -> None:
        """The training loop worked on a batch before it asked for the next."""
        with self._lock:
            self._seconds += seconds

    def report(self) -> LoaderReport:
        """The counts as they stand."""
        with self._lock:
            return LoaderReport(
                self._samples,
                self._batches,
                self._bytes_read,
                self._seconds,
                self._wait_seconds,
                _quantile(self._waits, self._batches, 0.5),
                _quantile(self._waits, self._batches, 0.99),
            )


def _bucket(seconds: float) -> int:
    if seconds <= SHORTEST_SECONDS:
        return 0
    return min(int(math.log2(seconds / SHORTEST_SECONDS) * BUCKETS_PER_DOUBLING), NUM_BUCKETS - 1)


def _quantile(buckets: list[int], total: int, share: float) -> float:
    """The middle of the bucket where *share* of all waits is reached."""
    seen = 0
    for index, count in enumerate(buckets):
        seen += count
        if total and seen >= share * total:
            return SHORTEST_SECONDS * float(2 ** ((index + 0.5) / BUCKETS_PER_DOUBLING))
    return 0.0
