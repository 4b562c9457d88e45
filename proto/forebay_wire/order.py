"""The virtual order of samples: which sample stands where, and who reads it, from any position.

An order is a pure function of (dataset version, selection, shuffle kind and its parameters, seed,
epoch): nothing of the epoch is ever stored, so starting at a position of 10^10 samples costs what
starting at 0 costs. Global batch k is the positions [k·B, (k+1)·B) of it; ranks and workers only
cut that. Byte-exact definition: ``docs/formats/order.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from forebay_wire.blocks import BlockLayout, BlockParameters, BlockShuffle
from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.permutation import Numbers, derive_key, permute

Shuffle = Literal["none", "full", "block"]
LastBatch = Literal["keep", "pad", "drop"]

STATE_FORMAT: Final = 2
STATE_FORMAT_WITHOUT_BLOCKS: Final = 1
"""The format of the states of builds that knew no block shuffle; still read."""

NO_BLOCKS: Final = (0, 0, 1)
"""``window_blocks``, ``block_rows`` and ``lanes`` of every other shuffle."""


@dataclass(frozen=True)
class Order:
    """The order of one epoch. Thread-safe, cheap to make."""

    num_samples: int
    shuffle: Shuffle
    seed: int
    epoch: int
    identity: str
    """Manifest id of the dataset version, and of the selection if there is one."""
    layout: BlockLayout | None = None
    """Of ``shuffle="block"``, and of no other."""

    def __post_init__(self) -> None:
        check_blocks(self.shuffle, None if self.layout is None else self.layout.parameters)
        if self.layout is not None and self.layout.blocks.num_samples != self.num_samples:
            raise InvalidRequest(f"these are no blocks of {self.num_samples} samples")

    @lazy
    def _key(self) -> bytes:
        return derive_key("epoch", self.identity, self.seed, self.epoch)

    @lazy
    def _block_shuffle(self) -> BlockShuffle:
        assert self.layout is not None
        return BlockShuffle(self.layout, self.identity, self.seed, self.epoch)

    def at(self, positions: Numbers) -> Numbers:
        """The samples (indices into the selection) that stand at *positions*."""
        if self.shuffle == "none":
            return positions
        if self.shuffle == "block":
            return self._block_shuffle.at(positions)
        return permute(self._key, self.num_samples, positions)

    def between(self, start: int, stop: int) -> Numbers:
        """The samples that stand at the positions [start, stop)."""
        return self.at(np.arange(start, stop, dtype=np.int64))


def check_shuffle(shuffle: str) -> Shuffle:
    """*shuffle* unchanged if it is a kind of shuffle."""
    if shuffle not in get_args(Shuffle):
        raise InvalidRequest(f'shuffle={shuffle!r} is unknown: use "none", "block" or "full"')
    return shuffle  # type: ignore[return-value]


def check_blocks(shuffle: str, blocks: BlockParameters | None) -> None:
    """Raise unless *blocks* are there for a block shuffle, and only for that."""
    if (check_shuffle(shuffle) == "block") != (blocks is not None):
        raise InvalidRequest(
            f'shuffle={shuffle!r}: window_blocks, block_rows and lanes belong to shuffle="block"'
        )


def check_last_batch(last_batch: str) -> LastBatch:
    """*last_batch* unchanged if it is a way to treat the last batch."""
    if last_batch not in get_args(LastBatch):
        raise InvalidRequest(f'last_batch={last_batch!r} is unknown: use "keep", "pad" or "drop"')
    return last_batch  # type: ignore[return-value]


@dataclass(frozen=True)
class Part:
    """What one rank reads of one global batch: some of its positions, then padding.

    The positions of the batch are listed lane by lane; the part is [start, stop) of that list.
    """

    batch_start: int
    batch_stop: int
    start: int
    stop: int
    num_padding: int
    lanes: int = 1

    @property
    def num_samples(self) -> int:
        """Rows that are no padding."""
        return self.stop - self.start

    @property
    def num_rows(self) -> int:
        return self.num_samples + self.num_padding

    def positions(self, num_samples: int) -> Numbers:
        """All positions; padding repeats what follows in the last one's lane, after the end of
        *num_samples* from the start."""
        own = self._listed(np.arange(self.start, self.stop, dtype=np.int64))
        if not self.num_padding:
            return own
        last = self._listed(np.array([self.stop - 1], dtype=np.int64))
        steps = np.arange(1, self.num_padding + 1, dtype=np.int64)
        padding = (last + steps * self.lanes) % max(num_samples, 1)
        return np.concatenate((own, padding))

    def mask(self) -> NDArray[np.bool_]:
        """True for samples, False for padding."""
        return np.arange(self.num_rows) < self.num_samples

    def _listed(self, numbers: Numbers) -> Numbers:
        """The positions that stand at *numbers* of the list. O(len(numbers)), however many lanes.

        In a batch of any size, the lanes of a run (which may go round) have one position more than
        the others: so the list is at most three stretches of lanes that have equally many.
        """
        if self.lanes == 1:
            return self.batch_start + numbers
        least, longer = divmod(self.batch_stop - self.batch_start, self.lanes)
        begin = self.batch_start % self.lanes
        over = max(0, begin + longer - self.lanes)  # lanes from 0 on that the run goes round to
        sizes = np.array([least + (over > 0), least + (over == 0), least + (over > 0)])
        first_lane = np.array([0, over or begin, begin if over else begin + longer])
        first_number = np.zeros(3, dtype=np.int64)
        np.cumsum(np.diff(first_lane) * sizes[:-1], out=first_number[1:])
        which = np.searchsorted(first_number, numbers, side="right") - 1
        size = np.maximum(sizes[which], 1)
        lane_in, turn = np.divmod(numbers - first_number[which], size)
        from_begin = (first_lane[which] + lane_in - begin) % self.lanes
        listed: Numbers = self.batch_start + from_begin + turn * self.lanes
        return listed


@dataclass(frozen=True)
class Cut:
    """How an epoch is cut into global batches, from *position* on, and these over the ranks.

    Steps count from *position*: after a change of the global batch size to B' at position p, the
    batches are [p + j·B', p + (j+1)·B').
    """

    num_samples: int
    global_batch_size: int
    last_batch: LastBatch = "keep"
    position: int = 0
    lanes: int = 1

    def __post_init__(self) -> None:
        check_last_batch(self.last_batch)
        if self.global_batch_size < 1:
            raise InvalidRequest(f"a global batch of {self.global_batch_size} samples: at least 1")
        if not 0 <= self.position <= self.num_samples:
            raise InvalidRequest(
                f"position {self.position} is outside an epoch of {self.num_samples} samples"
            )

    @property
    def num_steps(self) -> int:
        """Steps from *position* to the end of the epoch: the same on all ranks."""
        rest = self.num_samples - self.position
        full, short = divmod(rest, self.global_batch_size)
        return full if self.last_batch == "drop" else full + (short > 0)

    def steps(self) -> range:
        """The numbers of the steps."""
        return range(self.num_steps)

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.num_steps == 0

    def bounds(self, step: int) -> tuple[int, int]:
        """The positions [start, stop) of the global batch of *step*."""
        if not 0 <= step < self.num_steps:
            raise InvalidRequest(f"step {step} is outside [0, {self.num_steps})")
        start = self.position + step * self.global_batch_size
        return start, min(start + self.global_batch_size, self.num_samples)

    def part(self, step: int, rank: int, num_ranks: int) -> Part:
        """The part of *rank*: contiguous in the list of the batch's positions lane by lane, sizes
        differ by at most one, larger ones first.

        So ranks take whole lanes where the numbers of ranks, lanes and samples allow it, and else
        share one with their neighbours. With ``pad`` all parts of all steps have the same number of
        rows; with ``keep`` the parts of a short last batch may be empty.
        """
        start, stop = self.bounds(step)
        size, larger = divmod(stop - start, num_ranks)
        first = rank * size + min(rank, larger)
        last = first + size + (rank < larger)
        padding = 0
        if self.last_batch == "pad":
            padding = -(-self.global_batch_size // num_ranks) - (last - first)
        return Part(start, stop, first, last, padding, self.lanes)


def worker_steps(num_steps: int, worker: int, num_workers: int) -> range:
    """The steps of one worker of a rank: whole batches, in turn, from the resumed step on."""
    return range(worker, num_steps, num_workers)


def split_key(dataset_manifest: str, seed: int) -> bytes:
    """Names the permutation of a version's rows that its splits share."""
    return derive_key("split", dataset_manifest, seed)


def split_rows(dataset_manifest: str, num_rows: int, seed: int, positions: Numbers) -> Numbers:
    """Rows of the version that stand at *positions* of the permutation that its splits share."""
    return permute(split_key(dataset_manifest, seed), num_rows, positions)


@dataclass(frozen=True)
class OrderState:
    """Where reading stands: a few integers, whatever the ranks, workers and batch sizes."""

    epoch: int
    position: int
    """Samples of the epoch that were consumed, by all ranks together."""
    seed: int
    shuffle: Shuffle
    dataset: str
    version: int
    manifest: str
    """Manifest id of the dataset version."""
    selection: str
    """Manifest id of the selection, empty for the whole version."""
    window_blocks: int = 0
    """Of a block shuffle, like the next; 0 for the other kinds."""
    block_rows: int = 0
    lanes: int = 1

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the fields and ``format``."""
        return {"format": STATE_FORMAT, **self.__dict__}

    @property
    def blocks(self) -> BlockParameters | None:
        """The parameters of the block shuffle, if it is one."""
        if self.shuffle != "block":
            return None
        return BlockParameters(self.window_blocks, self.block_rows, self.lanes)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OrderState:
        """The inverse of :meth:`to_json`; :class:`InvalidRequest` for anything else.

        Reads what builds without block shuffle wrote, too.
        """
        if value.get("format") not in (STATE_FORMAT, STATE_FORMAT_WITHOUT_BLOCKS):
            raise InvalidRequest(
                f"loader state of format {value.get('format')!r}; this build reads "
                f"{STATE_FORMAT_WITHOUT_BLOCKS} and {STATE_FORMAT}: "
                "pass what state_dict() returned, or upgrade Forebay"
            )
        names = set(cls.__dataclass_fields__)
        if value["format"] == STATE_FORMAT_WITHOUT_BLOCKS:
            names -= _BLOCK_FIELDS
        try:
            state = cls(**{name: value[name] for name in names})
        except KeyError as error:
            raise InvalidRequest(f"loader state lacks {error}: it is not complete") from error
        numbers = {"epoch", "position", "seed", *_BLOCK_FIELDS}
        if any(type(getattr(state, name)) is not int for name in numbers):
            raise InvalidRequest("loader state holds something else than integers")
        if state.epoch < 0 or state.position < 0:
            raise InvalidRequest("loader state stands before the first sample")
        check_blocks(state.shuffle, state.blocks)
        if (
            state.blocks is None
            and (state.window_blocks, state.block_rows, state.lanes) != NO_BLOCKS
        ):
            raise InvalidRequest(f"loader state has blocks, but shuffle={state.shuffle!r}")
        return state

    def check_same_samples(self, other: OrderState) -> None:
        """Raise unless *self* (a saved state) and *other* (a loader's own) mean the same order."""
        if (self.dataset, self.manifest) != (other.dataset, other.manifest):
            raise InvalidRequest(
                f"the state was taken on dataset {self.dataset!r} version {self.version} "
                f"(manifest {self.manifest[:12]}…), this loader reads {other.dataset!r} version "
                f"{other.version}: open client.dataset({self.dataset!r}, version={self.version})"
            )
        if self.selection != other.selection:
            raise InvalidRequest(
                f"the state was taken on another split of {self.dataset!r} version {self.version} "
                f"(selection {self.selection[:12] or 'none'}, here "
                f"{other.selection[:12] or 'none'}): open the same split"
            )
        if self._order_words() != other._order_words():
            raise InvalidRequest(
                f"the state was taken with {self._order_words()}, this loader "
                f"has {other._order_words()}: make it with the same ones"
            )

    def _order_words(self) -> str:
        """What a loader is made with that makes the order, as it is written there."""
        words = f"shuffle={self.shuffle!r}, seed={self.seed}"
        if self.shuffle != "block":
            return words
        return (
            f"{words}, window_blocks={self.window_blocks}, block_rows={self.block_rows or None}, "
            f"lanes={self.lanes}"
        )


_BLOCK_FIELDS: Final = {"window_blocks", "block_rows", "lanes"}
