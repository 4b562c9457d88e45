"""What a loader did, and where its time went: counters of fixed size."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from forebay.forking import watch

BUCKETS_PER_DOUBLING: Final = 8
SHORTEST_SECONDS: Final = 1e-6
NUM_BUCKETS: Final = 40 * BUCKETS_PER_DOUBLING
"""Waits from 1 µs to 12 days, each bucket 9 % wider than the one before."""

MAX_EPOCHS: Final = 16
"""Epochs whose sums are kept one by one."""

MAX_SLOW_STEPS: Final = 16

MAX_NOTES: Final = 128
"""Notes that are added up at once."""


_Note = tuple[int, float, dict[str, float], int, float, float, int, int]
"""A batch that was handed out: samples, seconds waited, cause to seconds of its reading, bytes,
seconds that it lay ready, seconds to the device, masked samples, position after it."""


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
    reads: str = ""
    """Dataset, version and split that are read now, or were last."""

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
            + (f" of {self.reads}" if self.reads else "")
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
    """Counts for one loader. Thread-safe, except that one thread at a time hands out.

    What is handed out is only noted, and added up some batches at a time: that is half the work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._notes: deque[_Note] = deque()
        """To be added up."""
        self._computed = 0.0
        """Seconds of the current epoch in which the training loop worked."""
        self._before = _Sums()
        """All epochs but the current one."""
        self._epoch = _Sums()
        self._epochs: deque[EpochReport] = deque(maxlen=MAX_EPOCHS - 1)
        self._waits = [0] * NUM_BUCKETS
        self._slow: list[SlowStep] = []
        """The shortest of the slowest first."""
        self._last: _Note | None = None
        watch(self)

    def forget_parent(self) -> None:
        """In a child of fork: the thread that tells the daemon may have held it."""
        self._lock = threading.Lock()

    def start_epoch(self, epoch: int) -> None:
        """What follows is of *epoch*."""
        with self._lock:
            self._add_up()
            self._epoch.seconds += self._computed
            self._computed = 0.0
            if self._epoch.batches and self._epoch.epoch != epoch:
                self._epochs.append(self._epoch.report())
                self._before.add(self._epoch)
                self._epoch = _Sums()
            self._epoch.epoch = epoch

    def handed_out(
        self,
        samples: int,
        wait_seconds: float,
        read: dict[str, float] | None = None,
        num_bytes: int = 0,
        ready_seconds: float = 0.0,
        copy_seconds: float = 0.0,
        masked: int = 0,
        position: int = 0,
    ) -> None:
        """The training loop got a batch after waiting, *copy_seconds* of it for the way to the
        device. *read*: cause to seconds in the thread that read the batch."""
        self._last = note = (
            samples,
            wait_seconds,
            read or {},
            num_bytes,
            ready_seconds,
            copy_seconds,
            masked,
            position,
        )
        self._notes.append(note)
        if len(self._notes) >= MAX_NOTES:
            with self._lock:
                self._add_up()

    def computed(self, seconds: float) -> None:
        """The training loop worked on a batch before it asked for the next."""
        self._computed += seconds

    @property
    def last(self) -> BatchTimes:
        """Of the batch that was handed out last."""
        if self._last is None:
            return BatchTimes()
        _, wait, read, _, ready, copied, _, _ = self._last
        reading = {**read, "copy": read.get("copy", 0.0) + copied} if copied else dict(read)
        return BatchTimes(wait, _stalls(wait, copied, read), reading, ready)

    def report(self) -> LoaderReport:
        """The counts as they stand."""
        with self._lock:
            self._add_up()
            total = _Sums()
            total.add(self._before)
            current = _Sums(self._epoch.epoch)
            current.add(self._epoch)
            current.seconds += self._computed
            total.add(current)
            epochs = (*self._epochs, current.report()) if total.batches else ()
            return LoaderReport(
                **{name: getattr(total, name) for name in _COUNTS},
                stalls=total.stalls,
                reading=total.reading,
                wait_p50_seconds=_quantile(self._waits, total.batches, 0.5),
                wait_p99_seconds=_quantile(self._waits, total.batches, 0.99),
                epochs=epochs,
                slow_steps=tuple(reversed(self._slow)),
            )

    def _add_up(self) -> None:
        """Add all notes to the current epoch, by column: with the lock held."""
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        if not notes:
            return
        samples, waits, reads, sizes, lay, copies, masked, _ = zip(*notes, strict=True)
        sums = self._epoch
        waited, num_before = sum(waits), self._before.batches + sums.batches
        sums.samples += sum(samples)
        sums.batches += len(notes)
        sums.bytes_read += sum(sizes)
        sums.seconds += waited
        sums.wait_seconds += waited
        sums.masked_samples += sum(masked)
        sums.ready_seconds += sum(lay)
        sums.ready_batches += len(notes) - lay.count(0.0)
        reading, stalls, buckets = sums.reading, sums.stalls, self._waits
        for wait, read, copied in zip(waits, reads, copies, strict=True):
            buckets[_bucket(wait)] += 1
            took = sum(read.values())
            scale = (wait - copied) / took if took else 0.0
            for cause, one in read.items():
                reading[cause] = reading.get(cause, 0.0) + one
                stalls[cause] = stalls.get(cause, 0.0) + one * scale
        if any(copies):
            reading["copy"] = reading.get("copy", 0.0) + sum(copies)
            stalls["copy"] = stalls.get("copy", 0.0) + sum(copies)
        for step, (note, wait) in enumerate(zip(notes, waits, strict=True), num_before + 1):
            if len(self._slow) < MAX_SLOW_STEPS or wait > self._slow[0].wait_seconds:
                self._note_slow(note, step)

    def _note_slow(self, note: _Note, step: int) -> None:
        _, wait, read, _, _, copied, _, position = note
        stalls = _stalls(wait, copied, read)
        self._slow.append(SlowStep(wait, step, self._epoch.epoch, position, stalls))
        self._slow.sort(key=lambda one: one.wait_seconds)
        del self._slow[:-MAX_SLOW_STEPS]


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
