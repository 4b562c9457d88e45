"""Traces for the replay: who reads which blob in turn, and which loaders say so ahead of time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from forebay_server.model.uses import ReadOrder
from forebay_wire.order import Order, Shuffle


@dataclass(frozen=True)
class Job:
    """A loader that reads its dataset of shards, epoch after epoch, in an order of its samples."""

    name: str
    num_blobs: int
    seed: int
    shuffle: Shuffle = "full"
    rows: int = 1
    """Samples in a shard."""
    batch: int = 1
    """Samples in a step; each shard is read once a step."""

    @property
    def num_samples(self) -> int:
        return self.num_blobs * self.rows

    @property
    def order(self) -> ReadOrder:
        """What it would register with the daemon. How many epochs it will read, nobody knows."""
        return ReadOrder(
            manifest=self.name,
            identity=self.name,
            num_samples=self.num_samples,
            num_version_rows=self.num_samples,
            selection=None,
            shuffle=self.shuffle,
            seed=self.seed,
            global_batch_size=self.batch,
            last_batch="keep",
            rank=0,
            num_ranks=1,
        )

    @property
    def blobs(self) -> list[str]:
        return [f"{self.name}{number}" for number in range(self.num_blobs)]

    def reads(self) -> Iterator[Read]:
        blobs = self.blobs
        for epoch in itertools.count():
            order = Order(self.num_samples, self.shuffle, self.seed, epoch, self.name)
            shards = order.between(0, self.num_samples) // self.rows
            for start in range(0, self.num_samples, self.batch):
                position = epoch * self.num_samples + start
                for shard in np.unique(shards[start : start + self.batch]).tolist():
                    yield Read(blobs[shard], self, position)


@dataclass(frozen=True)
class Read:
    """One read of a blob."""

    blob: str
    job: Job | None = None
    """The loader, if it has a plan."""
    position: int = 0
    """Of the step, in the loader's samples, counted on through its epochs."""


@dataclass(frozen=True)
class Trace:
    """What is replayed on a cache of *capacity* bytes; the first *num_warm* reads do not count."""

    name: str
    reads: list[Read]
    capacity: int
    num_warm: int
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of a blob; those that are missing have 1."""


def _take(reads: Iterator[Read], count: int) -> list[Read]:
    return [next(reads) for _ in range(count)]


def one_job(num_blobs: int, seed: int, shuffle: Shuffle, percent: int) -> Trace:
    """Twelve epochs; the first two fill the cache."""
    job = Job("a", num_blobs, seed, shuffle)
    word = "sequential" if shuffle == "none" else "shuffled"
    reads = _take(job.reads(), 12 * num_blobs)
    return Trace(f"{word}, {percent} %", reads, num_blobs * percent // 100, 2 * num_blobs)


def samples(num_blobs: int, seed: int) -> Trace:
    """Epochs of shuffled samples, 16 in a shard and 16 in a step; half of the shards fit."""
    job = Job("a", num_blobs, seed, rows=16, batch=16)
    reads = list(itertools.takewhile(_before(job, 3), job.reads()))
    return Trace("shuffled samples, 50 %", reads, num_blobs // 2, len(reads) // 3)


def _before(job: Job, epoch: int) -> Callable[[Read], bool]:
    return lambda read: read.position < epoch * job.num_samples


def sizes_differ(num_blobs: int, seed: int) -> Trace:
    """Shuffled epochs of blobs of 1 to 16 units, half of them fit."""
    trace = one_job(num_blobs, seed, "full", 50)
    dice = random.Random(seed)
    sizes = {blob: dice.choice((1, 2, 4, 8, 16)) for blob in Job("a", num_blobs, seed).blobs}
    capacity = sum(sizes.values()) // 2
    return replace(trace, name="shuffled, 50 %, sizes differ", capacity=capacity, sizes=sizes)


def two_jobs(num_blobs: int, seed: int, percent: int) -> Trace:
    """Two jobs, one four times slower, and 20 % of all reads are of blobs never read again; the
    cache holds *percent* of the jobs' data."""
    dice = random.Random(seed)
    fast, slow = Job("f", num_blobs, seed).reads(), Job("s", num_blobs, seed).reads()
    reads: list[Read] = []
    for index in range(20 * num_blobs):
        if dice.random() < 0.2:
            reads.append(Read(f"once{index}"))
        else:
            reads.append(next(fast) if dice.random() < 0.8 else next(slow))
    name = f"two jobs + one-shot, {percent} %"
    return Trace(name, reads, 2 * num_blobs * percent // 100, 4 * num_blobs)


def turnover(num_blobs: int, seed: int) -> Trace:
    """Six epochs of one job, then six of another on other data; the cache holds half of either."""
    before = _take(Job("a", num_blobs, seed).reads(), 6 * num_blobs)
    after = _take(Job("c", num_blobs, seed).reads(), 6 * num_blobs)
    return Trace("turnover, 50 %", before + after, num_blobs // 2, 2 * num_blobs)


def skewed(num_blobs: int, seed: int, exponent: float, moves: bool = False) -> Trace:
    """Reads by Zipf's law without any plan; the popular ones change over time if it *moves*."""
    weights = 1 / np.arange(1, num_blobs + 1) ** exponent
    drawn = np.random.default_rng(seed).choice(
        num_blobs, size=16 * num_blobs, p=weights / weights.sum()
    )
    if moves:
        drawn = (drawn + np.arange(len(drawn)) // 8) % num_blobs
    reads = [Read(f"z{number}") for number in drawn.tolist()]
    name = f"zipf {exponent:g}{', moving' if moves else ''}, 10 %"
    return Trace(name, reads, num_blobs // 10, 4 * num_blobs)


def ranks(num_blobs: int, seed: int) -> Trace:
    """Shuffled epochs in which four ranks read each blob, at about the same time."""
    dice = random.Random(seed)
    reads: list[Read] = []
    stream = Job("a", num_blobs, seed).reads()
    for _ in range(6):
        turns = [
            (index + 8 * dice.random(), read)
            for index, read in enumerate(_take(stream, num_blobs))
            for _ in range(4)
        ]
        reads += [read for _, read in sorted(turns, key=lambda turn: turn[0])]
    return Trace("four ranks, 50 %", reads, num_blobs // 2, 8 * num_blobs)


ONE_JOB: dict[str, Callable[[int, int], Trace]] = {
    "shuffled, 25 %": lambda num_blobs, seed: one_job(num_blobs, seed, "full", 25),
    "shuffled, 50 %": lambda num_blobs, seed: one_job(num_blobs, seed, "full", 50),
    "shuffled, 83 %": lambda num_blobs, seed: one_job(num_blobs, seed, "full", 83),
    "sequential, 50 %": lambda num_blobs, seed: one_job(num_blobs, seed, "none", 50),
    "sequential, 83 %": lambda num_blobs, seed: one_job(num_blobs, seed, "none", 83),
    "shuffled samples, 50 %": samples,
}

PLANNED: dict[str, Callable[[int, int], Trace]] = ONE_JOB | {
    "shuffled, 50 %, sizes differ": sizes_differ,
    "two jobs + one-shot, 30 %": lambda num_blobs, seed: two_jobs(num_blobs, seed, 30),
    "two jobs + one-shot, 50 %": lambda num_blobs, seed: two_jobs(num_blobs, seed, 50),
    "turnover, 50 %": turnover,
}

UNPLANNED: dict[str, Callable[[int, int], Trace]] = {
    "four ranks, 50 %": ranks,
    "zipf 0.7, 10 %": lambda num_blobs, seed: skewed(num_blobs, seed, 0.7),
    "zipf 1, 10 %": lambda num_blobs, seed: skewed(num_blobs, seed, 1.0),
    "zipf 1, moving, 10 %": lambda num_blobs, seed: skewed(num_blobs, seed, 1.0, moves=True),
}
