"""The block shuffle: blocks of rows permuted, rows permuted within windows of some blocks.

So a reader needs only a window's blocks at a time, and yet every epoch differs. The permuted blocks
laid end to end are the *slots* 0 … n - 1. Lane l of L has a run of them, of as many as there are
positions congruent to l modulo L; position p is slot p div L of lane p mod L. The blocks that a
lane's slots lie in are grouped in windows of at most W blocks, and a window's slots (of that lane)
are permuted. Byte-exact definition: ``docs/formats/order.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.permutation import Numbers, derive_key, permute, permute_each, unpermute

MAX_BLOCKS: Final = 1 << 31
MAX_LANES: Final = 1 << 12


@dataclass(frozen=True)
class BlockParameters:
    """What a block shuffle is, beside its seed: a part of the order."""

    window_blocks: int
    """Blocks whose rows are mixed with one another."""
    block_rows: int = 0
    """Rows of a block; 0: the shards of the version are its blocks."""
    lanes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.window_blocks <= MAX_BLOCKS:
            raise InvalidRequest(f"window_blocks={self.window_blocks}: 1 to {MAX_BLOCKS}")
        if not 0 <= self.block_rows < 1 << 62:
            raise InvalidRequest(f"block_rows={self.block_rows}: at least 1, or 0 for shards")
        if not 1 <= self.lanes <= MAX_LANES:
            raise InvalidRequest(f"lanes={self.lanes}: 1 to {MAX_LANES}")

    def layout(self, num_samples: int, shard_starts: Numbers | None) -> BlockLayout:
        """The blocks of *num_samples*; *shard_starts*: the first row of each shard and, last, the
        number of rows, or None for samples that are not all rows of a version."""
        if self.block_rows:
            return BlockLayout(self, EvenBlocks(num_samples, self.block_rows))
        if shard_starts is None:
            raise InvalidRequest(
                'shuffle="block" of a split needs block_rows: the rows of a shard need not stand '
                'together in it (of a random split they never do: use shuffle="full")'
            )
        return BlockLayout(self, UnevenBlocks(num_samples, shard_starts))


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of a dataset's samples: the same in all epochs."""

    parameters: BlockParameters
    blocks: Blocks


def starts_of(counts: Sequence[int]) -> Numbers:
    """The first row of each of consecutive shards of so many rows and, last, the number of all."""
    starts: Numbers = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(np.array(counts, dtype=np.int64), out=starts[1:])
    return starts


class Deal(Protocol):
    """Blocks in the order of one permutation, laid end to end."""

    def first(self, numbers: Numbers) -> Numbers:
        """The first slot of the blocks that stand at *numbers*; the end after the last one."""
        ...

    def number_at(self, slots: Numbers) -> Numbers:
        """Where the blocks stand that *slots* lie in."""
        ...

    def rows(self, slots: Numbers) -> Numbers:
        """The rows that lie in *slots*."""
        ...


class Blocks(Protocol):
    """How the rows of an epoch are cut into blocks."""

    @property
    def num_samples(self) -> int: ...

    def deal(self, key: bytes) -> Deal: ...


class EvenBlocks:
    """Runs of *block_rows* rows, the last one maybe shorter. O(1) of everything."""

    def __init__(self, num_samples: int, block_rows: int) -> None:
        self.num_samples = num_samples
        self.block_rows = block_rows
        self.num_blocks = -(-num_samples // block_rows)
        if self.num_blocks > MAX_BLOCKS:
            raise InvalidRequest(
                f"{num_samples} samples in blocks of {block_rows} rows are {self.num_blocks} "
                f"blocks; allowed: {MAX_BLOCKS}: make block_rows larger"
            )

    def deal(self, key: bytes) -> Deal:
        return _EvenDeal(self, key)


class _EvenDeal:
    def __init__(self, blocks: EvenBlocks, key: bytes) -> None:
        self._size = blocks.block_rows
        self._num_blocks = blocks.num_blocks
        self._key = key
        last = self._num_blocks - 1
        self._gap = self._num_blocks * self._size - blocks.num_samples
        """Rows that the short block lacks."""
        self._short = int(unpermute(key, self._num_blocks, np.array([last]))[0])
        """Where it stands."""
        self._after = (self._short + 1) * self._size - self._gap
        """The slot after it."""

    def first(self, numbers: Numbers) -> Numbers:
        return numbers * self._size - self._gap * (numbers > self._short)

    def number_at(self, slots: Numbers) -> Numbers:
        return (slots + self._gap * (slots >= self._after)) // self._size

    def rows(self, slots: Numbers) -> Numbers:
        numbers = self.number_at(slots)
        blocks = permute(self._key, self._num_blocks, numbers)
        return blocks * self._size + slots - self.first(numbers)


class UnevenBlocks:
    """Shards: O(number of shards) of memory, and as much work for each epoch."""

    def __init__(self, num_samples: int, shard_starts: Numbers) -> None:
        """*shard_starts*: the first row of each and, last, the number of rows."""
        self.num_samples = num_samples
        is_block = np.diff(shard_starts, prepend=-1) > 0  # empty shards are none
        self.starts = shard_starts[is_block]
        if int(shard_starts[-1]) != num_samples:
            raise InvalidRequest(
                f"shards of {shard_starts[-1]} rows are no blocks of {num_samples} samples"
            )

    def deal(self, key: bytes) -> Deal:
        return _UnevenDeal(self.starts, key)


class _UnevenDeal:
    def __init__(self, starts: Numbers, key: bytes) -> None:
        num_blocks = len(starts) - 1
        blocks = permute(key, num_blocks, np.arange(num_blocks, dtype=np.int64))
        self._firsts: Numbers = np.zeros(num_blocks + 1, dtype=np.int64)
        np.cumsum(np.diff(starts)[blocks], out=self._firsts[1:])
        self._moved: Numbers = starts[blocks] - self._firsts[:-1]
        """From a slot of a block to its row."""

    def first(self, numbers: Numbers) -> Numbers:
        return self._firsts[numbers]

    def number_at(self, slots: Numbers) -> Numbers:
        return np.searchsorted(self._firsts, slots, side="right") - 1

    def rows(self, slots: Numbers) -> Numbers:
        return slots + self._moved[self.number_at(slots)]


class BlockShuffle:
    """The block shuffle of one epoch. Thread-safe."""

    def __init__(self, layout: BlockLayout, identity: str, seed: int, epoch: int) -> None:
        self._blocks = layout.blocks
        self._window_blocks = layout.parameters.window_blocks
        self._lanes = layout.parameters.lanes
        self._parts = (identity, seed, epoch)

    @lazy
    def _deal(self) -> Deal:
        return self._blocks.deal(derive_key("blocks", *self._parts))

    @lazy
    def _row_key(self) -> bytes:
        return derive_key("rows", *self._parts)

    def at(self, positions: Numbers) -> Numbers:
        """The rows that stand at *positions*, in O(len(positions))."""
        num_samples = self._blocks.num_samples
        if len(positions) == 0:
            return np.empty(0, dtype=np.int64)
        if int(positions.min()) < 0 or int(positions.max()) >= num_samples:
            raise InvalidRequest(
                f"positions {positions.min()} to {positions.max()} are outside [0, {num_samples})"
            )
        lanes = positions % self._lanes
        slots = self._lane_start(lanes) + positions // self._lanes
        starts, stops = self._windows(lanes, slots)
        moved = permute_each(self._row_key, starts, stops - starts, slots - starts)
        return self._deal.rows(starts + moved)

    def _lane_start(self, lanes: Numbers) -> Numbers:
        """The first slot of each of *lanes*."""
        size, longer = divmod(self._blocks.num_samples, self._lanes)
        return lanes * size + np.minimum(lanes, longer)

    def _windows(self, lanes: Numbers, slots: Numbers) -> tuple[Numbers, Numbers]:
        """The slots [start, stop) of the windows that *slots* of *lanes* lie in."""
        deal = self._deal
        lane_starts, lane_stops = self._lane_start(lanes), self._lane_start(lanes + 1)
        first = deal.number_at(lane_starts)
        num_blocks = deal.number_at(lane_stops - 1) - first + 1
        # As many as it takes, and all about equally large: the last one mixes as well as the first.
        num_windows = -(-num_blocks // self._window_blocks)
        window = ((deal.number_at(slots) - first + 1) * num_windows - 1) // num_blocks
        starts = deal.first(first + window * num_blocks // num_windows)
        stops = deal.first(first + (window + 1) * num_blocks // num_windows)
        return np.maximum(lane_starts, starts), np.minimum(lane_stops, stops)
