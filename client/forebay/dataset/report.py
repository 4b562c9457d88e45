"""What a loader did, and where its time went: counters of fixed size."""

from __future__ import annotations

import heapq
import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

BUCKETS_PER_DOUBLING: Final = 8
SHORTEST_SECONDS: Final = 1e-6
NUM_BUCKETS: Final = 40 * BUCKETS_PER_DOUBLING
"""Waits from 1 µs to 12 days, each bucket 9 % wider than the one before."""

MAX_EPOCHS: Final = 16
"""Epochs whose sums are kept one by one."""

MAX_SLOW_STEPS: Final = 16


@dataclass(frozen=True)
class BatchTimes:
    """Where the time of one batch went, in seconds."""

    wait_seconds: float = 0.0
    """How long the training loop waited for it."""
    stalls: Mapping[str, float] = field(default_factory=dict)
    """The same by cause: shared out like ``read``, which is known of the batch's own reading; what
    the way to the device took is ``copy``'s."""
    read: Mapping[str, float] = field(default_factory=dict)
    """Cause to seconds in the thread that read it; the causes are in ``docs/loader.md``."""
    ready_seconds: float = 0.0
    """How long it lay finished before it was asked for: no stall, the trainer is slower."""


@dataclass(frozen=True)
class EpochReport:
    """One epoch of a loader, as far as it was read by it; times are in seconds."""

    epoch: int
    samples: int = 0
    """Samples handed out, neither padding nor holes among them."""
    batches: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    ready_batches: int = 0
    """Batches that were finished when they were asked for."""
    ready_seconds: float = 0.0
    masked_samples: int = 0
    stalls: Mapping[str, float] = field(default_factory=dict)
    reading: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SlowStep:
    """A step that was waited for long."""

    wait_seconds: float
    step: int
    """How many batches this loader had handed out, this one included."""
    epoch: int
    position: int
    """Samples of the epoch that were consumed after it, on all ranks."""
    stalls: Mapping[str, float]


@dataclass(frozen=True)
class LoaderReport:
    """A loader's work up to now, on this rank. Printing it gives a few lines."""

    samples: int
    """Samples handed out, neither padding nor holes among them."""
    batches: int
    bytes_read: int
    """Bytes of the batches that were assembled."""
    seconds: float
    """Time inside epochs: from the first request of a batch to the last."""
    wait_seconds: float
    """The part of it in which the training loop waited for a batch."""
    wait_p50_seconds: float = 0.0
    wait_p99_seconds: float = 0.0
    open_waits: Mapping[str, float] = field(default_factory=dict)
    """How long this loader waited for shards in the daemon, by reason: ``num_waits``;
    ``tier_seconds`` (at a local tier, or the catalog), ``queue_seconds`` (behind other work: for a
    thread, a buffer, room), ``throttle_seconds`` (held back by a bandwidth limit, or by a store
    that is busy), ``origin_seconds`` (at the object tier, or the origin), which add up to the
    time waited; ``longest_seconds`` (one wait)."""
    plan_problem: str = ""
    """Why the daemon has no plan of this loader, so that it reads without being fetched for."""
    stalls: Mapping[str, float] = field(default_factory=dict)
    """Cause to seconds that the training loop waited: they add up to ``wait_seconds``."""
    reading: Mapping[str, float] = field(default_factory=dict)
    """Cause to seconds in the threads (or workers) that read, waited for or not."""
    ready_batches: int = 0
    """Batches that were finished when they were asked for."""
    ready_seconds: float = 0.0
    """How long they lay finished: the trainer is slower than the loader."""
    masked_samples: int = 0
    """Samples that could not be read, handed out as holes (``on_error="mask"``)."""
    bad_samples: tuple[int, ...] = ()
    """Their rows in the version, each once, as far as they are kept."""
    epochs: tuple[EpochReport, ...] = ()
    """The last epochs one by one."""
    slow_steps: tuple[SlowStep, ...] = ()
    """The steps that were waited for longest, the slowest first."""
    advice: str = ""
    """One sentence about what holds training back; empty as long as nothing is known."""
    covers: str = ""
    """What the figures are of where that is not all of this rank."""

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that went into waiting for data, 0 to 1."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain lists, numbers and texts."""
        shares = {"samples_per_second": self.samples_per_second, "wait_share": self.wait_share}
        return asdict(self) | shares

    def __str__(self) -> str:
        lines = [
            f"{self.samples:,} samples in {self.batches:,} batches, "
            f"{self.samples_per_second:,.0f} samples/s, {self.wait_share:.1%} of "
            f"{self.seconds:.1f} s waiting for data (wait p50 {self.wait_p50_seconds * 1e3:.2f} ms,"
            f" p99 {self.wait_p99_seconds * 1e3:.2f} ms), {self.bytes_read / 1e6:,.1f} MB read"
        ]
        if self.wait_seconds:
            lines.append(f"waited for: {shares_of(self.stalls)}")
        elif self.reading:
            lines.append(f"reading went into: {shares_of(self.reading)}")
        if self.masked_samples:
            lines.append(f"masked {self.masked_samples:,} samples that could not be read")
        lines += [line for line in (self.advice, self.covers, self.plan_problem) if line]
        return "\n".join(lines)


def shares_of(seconds: Mapping[str, float]) -> str:
    """Causes with their shares, the largest first: ``origin 62 %, transform 30 %``."""
    total = sum(seconds.values())
    parts = sorted(seconds.items(), key=lambda part: -part[1])
    return ", ".join(
        f"{cause} {took / total * 100:.0f} %" for cause, took in parts if took >= 0.005 * total > 0
    )


class _Sums:
    """What is added up, of one epoch or of all."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.samples = self.batches = self.bytes_read = 0
        self.seconds = self.wait_seconds = self.ready_seconds = 0.0
        self.ready_batches = self.masked_samples = 0
        self.stalls: dict[str, float] = {}
        self.reading: dict[str, float] = {}

    def add(self, other: _Sums) -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, its in ((self.stalls, other.stalls), (self.reading, other.reading)):
            for cause, took in its.items():
                mine[cause] = mine.get(cause, 0.0) + took

    def report(self) -> EpochReport:
        found = {name: getattr(self, name) for name in _COUNTS}
        return EpochReport(
            self.epoch, **found, stalls=dict(self.stalls), reading=dict(self.reading)
        )


_COUNTS: Final = (
    *("samples", "batches", "bytes_read", "seconds", "wait_seconds", "ready_seconds"),
    *("ready_batches", "masked_samples"),
)


class Meter:
    """Counts for one loader. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before = _Sums()
        """All epochs but the current one."""
        self._epoch = _Sums()
        self._epochs: deque[EpochReport] = deque(maxlen=MAX_EPOCHS - 1)
        self._waits = [0] * NUM_BUCKETS
        self._slow: list[tuple[float, int, int, int, dict[str, float]]] = []
        """A heap, the shortest of the slowest first."""
        self._last: tuple[float, float, dict[str, float], float] | None = None

    def start_epoch(self, epoch: int) -> None:
        """What follows is of *epoch*."""
        with self._lock:
            if self._epoch.epoch == epoch:
                return
            if self._epoch.batches:
                self._epochs.append(self._epoch.report())
                self._before.add(self._epoch)
            self._epoch = _Sums(epoch)

    def handed_out(
        self,
        samples: int,
        wait_seconds: float,
        read: dict[str, float] | None = None,
        *,
        num_bytes: int = 0,
        ready_seconds: float = 0.0,
        copy_seconds: float = 0.0,
        masked: int = 0,
        position: int = 0,
    ) -> None:
        """The training loop got a batch after waiting, *copy_seconds* of it for the way to the
        device. *read*: cause to seconds in the thread that read the batch."""
        read = read or {}
        took = sum(read.values())
        scale = (wait_seconds - copy_seconds) / took if took > 0.0 else 0.0
        with self._lock:
            sums = self._epoch
            sums.samples += samples
            sums.batches += 1
            sums.bytes_read += num_bytes
            sums.seconds += wait_seconds
            sums.wait_seconds += wait_seconds
            if ready_seconds > 0.0:
                sums.ready_batches += 1
                sums.ready_seconds += ready_seconds
            sums.masked_samples += masked
            reading, stalls = sums.reading, sums.stalls
            for cause, one in read.items():
                reading[cause] = reading.get(cause, 0.0) + one
                stalls[cause] = stalls.get(cause, 0.0) + one * scale
            if copy_seconds:
                reading["copy"] = reading.get("copy", 0.0) + copy_seconds
                stalls["copy"] = stalls.get("copy", 0.0) + copy_seconds
            self._waits[_bucket(wait_seconds)] += 1
            self._last = (wait_seconds, copy_seconds, read, ready_seconds)
            if len(self._slow) < MAX_SLOW_STEPS or wait_seconds > self._slow[0][0]:
                self._note_slow(sums.epoch, position)

    def computed(self, seconds: float) -> None:
        """The training loop worked on a batch before it asked for the next."""
        with self._lock:
            self._epoch.seconds += seconds

    @property
    def last(self) -> BatchTimes:
        """Of the batch that was handed out last."""
        last = self._last
        if last is None:
            return BatchTimes()
        wait, copied, read, ready = last
        reading = {**read, "copy": read.get("copy", 0.0) + copied} if copied else dict(read)
        return BatchTimes(wait, _stalls(wait, copied, read), reading, ready)

    def report(self) -> LoaderReport:
        """The counts as they stand."""
        with self._lock:
            total = _Sums()
            total.add(self._before)
            total.add(self._epoch)
            epochs = (*self._epochs, self._epoch.report()) if total.batches else ()
            slow = sorted(self._slow, key=lambda one: -one[0])
            return LoaderReport(
                **{name: getattr(total, name) for name in _COUNTS},
                stalls=total.stalls,
                reading=total.reading,
                wait_p50_seconds=_quantile(self._waits, total.batches, 0.5),
                wait_p99_seconds=_quantile(self._waits, total.batches, 0.99),
                epochs=epochs,
                slow_steps=tuple(SlowStep(*one) for one in slow),
            )

    def _note_slow(self, epoch: int, position: int) -> None:
        assert self._last is not None, "just set"
        wait, copied, read, _ = self._last
        step = self._before.batches + self._epoch.batches
        one = (wait, step, epoch, position, _stalls(wait, copied, read))
        if len(self._slow) < MAX_SLOW_STEPS:
            heapq.heappush(self._slow, one)
        else:
            heapq.heapreplace(self._slow, one)


def _stalls(wait: float, copied: float, read: Mapping[str, float]) -> dict[str, float]:
    """*wait*, of which the way to the device took *copied*, shared out like *read*."""
    took = sum(read.values())
    scale = (wait - copied) / took if took > 0.0 else 0.0
    found = {cause: one * scale for cause, one in read.items()}
    if copied:
        found["copy"] = found.get("copy", 0.0) + copied
    return found


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
