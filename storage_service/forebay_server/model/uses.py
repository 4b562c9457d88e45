"""Which shards a loader touches when: its order turned into uses of blobs, a window at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from forebay_server.model.tracks import Tracks
from forebay_wire.blocks import BlockLayout, BlockParameters, starts_of
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import Cut, LastBatch, Order, Shuffle, check_blocks
from forebay_wire.selection import Rule, Stored, base_of

WINDOW_SAMPLES: Final = 1 << 14
"""Samples that one window looks at: some milliseconds of work and a few hundred kilobytes."""


ONE_TRACK: Final = Tracks(True, ())
"""All columns lie together."""


@dataclass(frozen=True)
class ReadOrder:
    """What one rank of one loader is going to read, as parameters."""

    manifest: str
    """Manifest id of the dataset version."""
    identity: str
    """Names the samples and their order: manifest ids of version and selection."""
    num_samples: int
    """Of an epoch, on all ranks together."""
    num_version_rows: int
    selection: Rule | None
    """Which rows of the version are read; None: all."""
    shuffle: Shuffle
    seed: int
    global_batch_size: int
    last_batch: LastBatch
    rank: int
    num_ranks: int
    num_epochs: int = 0
    """0: nobody knows when it ends."""
    blocks: BlockParameters | None = None
    """Of a block shuffle."""

    def __post_init__(self) -> None:
        check_blocks(self.shuffle, self.blocks)
        if not 0 <= self.rank < self.num_ranks:
            raise InvalidRequest(f"rank {self.rank} of {self.num_ranks}: ranks count from 0")
        Cut(self.num_samples, self.global_batch_size, self.last_batch)  # raises

    def time(self, epoch: int, position: int) -> int:
        """A place in the endless row of epochs as one number."""
        return epoch * self.num_samples + position

    @property
    def lanes(self) -> int:
        return 1 if self.blocks is None else self.blocks.lanes

    def layout(self, shard_starts: NDArray[np.int64]) -> BlockLayout | None:
        """The blocks of a block shuffle; InvalidRequest for such as the samples do not have.

        *shard_starts*: the first row of each shard of the version and, last, the number of rows.
        """
        if self.blocks is None:
            return None
        starts: NDArray[np.int64] | None = shard_starts
        if self.selection is not None:
            stored = self.selection if isinstance(self.selection, Stored) else None
            starts = None if stored is None else starts_of(stored.counts)
        return self.blocks.layout(self.num_samples, starts)


@dataclass(frozen=True)
class Window:
    """The uses of a stretch of an order, in order: each shard once a step."""

    times: NDArray[np.int64]
    """When the step begins that uses the shard (:meth:`ReadOrder.time`)."""
    shards: NDArray[np.int64]
    stop: int
    """All uses before this time are in this window or an earlier one."""


def windows(
    order: ReadOrder,
    shard_starts: NDArray[np.int64],
    epoch: int,
    position: int,
    window_samples: int = WINDOW_SAMPLES,
    tracks: Tracks = ONE_TRACK,
) -> Iterator[Window]:
    """The uses from *position* of *epoch* on, through this and the following epochs.

    *shard_starts*: the first row of each shard and, last, the number of rows; *tracks*: in which of
    these and other shards the columns lie. Costs O(window) of time and memory for each window,
    whatever the size of an epoch. Ends only after the last epoch, if that is known, and where there
    is nothing to read. Raises InvalidRequest at once, for blocks that cannot be.
    """
    layout = order.layout(shard_starts)
    return _windows(order, layout, shard_starts, tracks, epoch, position, window_samples)


def _windows(
    order: ReadOrder,
    layout: BlockLayout | None,
    shard_starts: NDArray[np.int64],
    tracks: Tracks,
    epoch: int,
    first: int,
    window_samples: int,
) -> Iterator[Window]:
    if order.num_samples == 0:
        return
    num_shards = max([len(shard_starts), *(int(one.numbers.max()) + 1 for one in tracks.beside)])
    while not order.num_epochs or epoch < order.num_epochs:
        cut = Cut(order.num_samples, order.global_batch_size, order.last_batch, first, order.lanes)
        if cut.num_steps == 0 and first == 0:
            return  # a batch larger than the dataset, and short ones are dropped
        samples = Order(order.num_samples, order.shuffle, order.seed, epoch, order.identity, layout)
        own = max(1, order.global_batch_size // order.num_ranks)
        steps_at_once = max(1, window_samples // own)
        for start in range(0, cut.num_steps, steps_at_once):
            stop = min(start + steps_at_once, cut.num_steps)
            steps, positions = _positions(order, cut, start, stop)
            found = _shards(order, shard_starts, tracks, samples.at(positions))
            keys = np.unique(np.concatenate([steps * num_shards + shards for shards in found]))
            base = order.time(epoch, cut.position)
            times = base + keys // num_shards * order.global_batch_size
            end = order.time(epoch + 1, 0)
            if stop < cut.num_steps:
                end = base + stop * order.global_batch_size
            yield Window(times, keys % num_shards, end)
        epoch, first = epoch + 1, 0


def _positions(
    order: ReadOrder, cut: Cut, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(step, position) of each sample that the rank reads in the steps [start, stop)."""
    size = order.global_batch_size
    full = min(stop, (cut.num_samples - cut.position) // size)
    steps: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    # Full ones whose first positions are of one lane are alike.
    period = cut.lanes // math.gcd(size, cut.lanes)
    for kind in range(start, min(full, start + period)):
        numbers = np.arange(kind, full, period, dtype=np.int64)
        own = cut.part(kind, order.rank, order.num_ranks).positions(cut.num_samples)
        steps.append(np.repeat(numbers, len(own)))
        shifted = own[None, :] + ((numbers - kind) * size)[:, None]
        positions.append(shifted.reshape(-1) % cut.num_samples)  # padding repeats from the start
    for step in range(max(start, full), stop):  # the short one
        part = cut.part(step, order.rank, order.num_ranks)
        own = part.positions(cut.num_samples)
        steps.append(np.full(len(own), step, dtype=np.int64))
        positions.append(own)
    return np.concatenate(steps), np.concatenate(positions)


def _shards(
    order: ReadOrder, shard_starts: NDArray[np.int64], tracks: Tracks, samples: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """The shards that hold the rows at these places of the selection, on each track."""
    found: list[NDArray[np.int64]] = []
    rule, rows = None, samples
    if order.selection is not None:
        rule, rows = base_of(order.selection, samples)
    if isinstance(rule, Stored):
        own, places = rule.shards(rows), rows
        if tracks.beside:
            rows = _estimated(rule, shard_starts, own, places)
    else:
        if rule is not None:
            rows = rule.rows(order.manifest, order.num_version_rows, rows)
        own = np.searchsorted(shard_starts, rows, side="right") - 1
    if tracks.reads_base:
        found.append(own)
    return found + [track.at(rows) for track in tracks.beside]


def _estimated(
    stored: Stored,
    shard_starts: NDArray[np.int64],
    shards: NDArray[np.int64],
    samples: NDArray[np.int64],
) -> NDArray[np.int64]:
    """About which rows of the version stored *samples* are, which lie in *shards*: as if those of
    a shard lay evenly in it. Rows ascend, so that no other shard beside it is missed by much."""
    ends, last = stored.ends, np.maximum(shards - 1, 0)
    before = np.where(shards > 0, ends[last], 0)
    counts = ends[shards] - before
    sizes = shard_starts[shards + 1] - shard_starts[shards]
    within: NDArray[np.int64] = (samples - before) * sizes // counts
    return shard_starts[shards] + within
