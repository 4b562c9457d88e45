"""Samples of zarr arrays in an order: what a loader reads of them, and the plan of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from forebay.dataset.holes import HoleReader
from forebay.dataset.reading import (
    WINDOW_BLOCKS,
    Numbers,
    OrderedSamples,
    OrderOptions,
    PlanParameters,
    Reporter,
    no_drop_of_all,
    refuse_blocks,
)
from forebay.dataset.schema import Column
from forebay.dataset.turn_plan import Turn, TurnReporter
from forebay_wire.blocks import BlockParameters
from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.limits import MIB
from forebay_wire.manifest import DatasetManifest, ShardRef
from forebay_wire.order import Cut, LastBatch, Order, OrderState

if TYPE_CHECKING:
    from forebay.zarr_samples import SampleArray, Samples

BLOCK_BYTES: Final = 16 * MIB
"""A block of a block shuffle has about so many decoded bytes of all arrays, in whole bands."""

WINDOW_BYTES: Final = 256 * MIB
"""A window of a block shuffle has no more, unless that is less than two blocks, or told."""

MAX_COMMON: Final = 8
"""Blocks begin where bands of all arrays do if that is after so many of the longest ones."""

MAX_TURN_STEPS: Final = 64
"""Steps that read the same shards are told as one, up to so many."""

MAX_TURN_SHARDS: Final = 1 << 12

MAX_TOLD_KEYS: Final = 1 << 22
"""With more the daemon is told no plan: to find out where they lie would take a minute."""


def unit_rows(band_rows: Sequence[int]) -> int:
    """Samples of the shortest block at whose ends bands of all arrays end, too; of arrays for which
    that would be long, those of the longest band."""
    longest, common = max(band_rows), math.lcm(*band_rows)
    return common if common <= MAX_COMMON * longest else longest


def block_parameters(arrays: Sequence[SampleArray], options: OrderOptions) -> BlockParameters:
    """The blocks of a block shuffle: runs of whole bands."""
    unit = unit_rows([one.band_rows for one in arrays])
    unit_bytes = unit * sum(one.row_bytes for one in arrays)
    rows, window = options.block_rows, options.window_blocks
    if rows is None:
        rows = unit * max(1, BLOCK_BYTES // unit_bytes)
    elif rows < 1 or rows % unit:
        raise InvalidRequest(
            f"block_rows={rows}: the chunks of these arrays end together every {unit} samples, so "
            f"give a multiple of {unit}, or leave it out"
        )
    if window is None:
        window = min(WINDOW_BLOCKS, max(2, WINDOW_BYTES // (rows // unit * unit_bytes)))
    return BlockParameters(window, rows, 1 if options.lanes is None else options.lanes)


@dataclass(frozen=True)
class _Rows:
    """What holes are looked for in: samples of one band of each array, as if these were record
    batches."""

    samples: Samples
    arrays: tuple[SampleArray, ...]

    @lazy
    def manifest(self) -> DatasetManifest:
        samples = self.samples
        borders = [np.arange(0, samples.num_rows, one.band_rows) for one in self.arrays]
        starts = np.unique(np.concatenate(borders))
        rows = np.diff(starts, append=samples.num_rows).tolist()
        shard = ShardRef("", 0, samples.num_rows, tuple(rows))
        return DatasetManifest(samples.name, samples.version, None, "", (shard,))

    def columns(self, names: Sequence[str] | None = None) -> tuple[Column, ...]:
        return self.samples.columns(names)

    def part_at(self, row: int) -> str:
        return "the chunks of " + ", ".join(
            f"array {one.path!r} at rows {start} to {min(start + one.band_rows, one.length)}"
            for one in self.arrays
            for start in [row // one.band_rows * one.band_rows]
        )

    def read(self, rows: Numbers, columns: Sequence[str] | None) -> dict[str, Any]:
        return self.samples.read(rows, columns)


class ZarrReading:
    """Samples of zarr arrays in an order."""

    def __init__(self, samples: Samples, options: OrderOptions) -> None:
        self.samples = samples
        self._options = options
        self._arrays = samples.arrays(options.columns)  # raises for a name that does not exist
        self._blocks: BlockParameters | None = None
        if options.shuffle == "block":
            self._blocks = block_parameters(self._arrays, options)
        else:
            refuse_blocks(options)
        self._holes = HoleReader()

    can_mask = True

    @property
    def has_lanes(self) -> bool:
        return self._blocks is not None

    @property
    def row_bytes(self) -> float:
        return sum(one.row_bytes for one in self._arrays)

    @property
    def title(self) -> str:
        return self.samples.title

    @property
    def name(self) -> str:
        return self.samples.name

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.samples.columns(self._options.columns)

    def check(self, global_batch_size: int, last_batch: LastBatch) -> None:
        no_drop_of_all(len(self.samples), global_batch_size, last_batch)

    def order(self, epoch: int, lanes: int) -> Order:
        """The order of *epoch*: the same on all ranks."""
        samples, options, layout = self.samples, self._options, None
        if self._blocks is not None:
            layout = _with_lanes(self._blocks, lanes).layout(len(samples), None)
        identity = f"{samples.manifest_id}/"
        return Order(len(samples), options.shuffle, options.seed, epoch, identity, layout)

    def epoch(self, epoch: int, lanes: int) -> OrderedSamples:
        rows = _Rows(self.samples, self._arrays)
        return OrderedSamples(self.order(epoch, lanes), self._holes, rows)

    def cut(
        self, epoch: int, position: int, global_batch_size: int, last_batch: LastBatch, lanes: int
    ) -> Cut:
        return Cut(len(self.samples), global_batch_size, last_batch, position, lanes)

    # Where reading stands.

    @property
    def blocks(self) -> tuple[int, int]:
        blocks = self._blocks
        return (0, 0) if blocks is None else (blocks.window_blocks, blocks.block_rows)

    def blocks_of(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """What was left to chance depends on the arrays that are read, and may be others now."""
        found, options = OrderState.from_json(state), self._options
        if self._blocks is None or found.blocks is None or not found.block_rows:
            return self.blocks
        return (
            found.window_blocks if options.window_blocks is None else self._blocks.window_blocks,
            found.block_rows if options.block_rows is None else self._blocks.block_rows,
        )

    def in_blocks(self, window_blocks: int, block_rows: int) -> ZarrReading:
        blocks = self._blocks
        if blocks is None or (window_blocks, block_rows) == self.blocks:
            return self
        same = copy(self)
        same._blocks = BlockParameters(window_blocks, block_rows, blocks.lanes)
        return same

    def state(self, epoch: int, position: int, lanes: int) -> dict[str, Any]:
        return {**self._state(epoch, position, lanes).to_json(), "num_samples": len(self.samples)}

    def restored(self, state: Mapping[str, Any], lanes: int | None) -> tuple[int, int, int]:
        found = OrderState.from_json(state)
        any_lanes = lanes is None and found.shuffle == self._options.shuffle
        found.check_same_samples(self._state(0, 0, found.lanes if any_lanes else lanes or 1))
        if state.get("num_samples") != len(self.samples) or found.position > len(self.samples):
            raise InvalidRequest(
                f"the state stands at sample {found.position} of {state.get('num_samples')}, and "
                f"these arrays have {len(self.samples)}: open the same ones"
            )
        return found.epoch, found.position, found.lanes

    def _state(self, epoch: int, position: int, lanes: int) -> OrderState:
        blocks = self._blocks
        return OrderState(
            epoch=epoch,
            position=position,
            seed=self._options.seed,
            shuffle=self._options.shuffle,
            dataset=self.samples.name,
            version=self.samples.version,
            manifest=self.samples.manifest_id,
            selection="",
            window_blocks=0 if blocks is None else blocks.window_blocks,
            block_rows=0 if blocks is None else blocks.block_rows,
            lanes=lanes,
        )

    # The plan.

    def reporter(self, loader: str, parameters: PlanParameters) -> Reporter:
        lanes = parameters.lanes
        course = ZarrCourse(
            self.samples, self._arrays, parameters, lambda epoch: self.order(epoch, lanes)
        )
        return TurnReporter(self.samples.endpoint, loader, course)


def _with_lanes(blocks: BlockParameters, lanes: int) -> BlockParameters:
    return BlockParameters(blocks.window_blocks, blocks.block_rows, lanes)


class ZarrCourse:
    """What one rank of a loader reads when; see ``Course``."""

    def __init__(
        self,
        samples: Samples,
        arrays: Sequence[SampleArray],
        parameters: PlanParameters,
        order: Callable[[int], Order],
    ) -> None:
        self._samples = samples
        self._arrays = arrays
        self._parameters = parameters
        self._order = order

    @property
    def manifest(self) -> str:
        return self._samples.manifest_id

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    @property
    def num_bytes(self) -> int:
        shards = self._samples.stored.dataset.manifest.shards
        return sum(shards[number].num_bytes for number in self._shards_at(None).tolist())

    def turns(self, epoch: int, position: int) -> Iterator[Turn]:
        told = self._parameters
        while not told.num_epochs or epoch < told.num_epochs:
            cut = Cut(
                self.num_samples, told.global_batch_size, told.last_batch, position, told.lanes
            )
            if cut.num_steps == 0 and position == 0:
                return
            start, stop = epoch * self.num_samples + position, (epoch + 1) * self.num_samples
            for end, shards in self._of_epoch(epoch, cut):
                yield from _pieces(start, end, shards)
                start = end
            if start < stop:
                yield Turn(stop, ())  # what is dropped at the end
            epoch, position = epoch + 1, 0

    def _of_epoch(self, epoch: int, cut: Cut) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Where runs of steps end that read the same shards, and these."""
        told, order, first = self._parameters, self._order(epoch), epoch * self.num_samples
        run: tuple[int, ...] = ()
        end, num_steps = 0, 0
        for step in cut.steps():
            part = cut.part(step, told.rank, told.num_ranks)
            rows = order.at(part.positions(self.num_samples))
            shards = tuple(self._shards_at(rows).tolist())
            if num_steps and (shards != run or num_steps == MAX_TURN_STEPS):
                yield end, run
                num_steps = 0
            run, end, num_steps = shards, first + cut.bounds(step)[1], num_steps + 1
        if num_steps:
            yield end, run

    def _shards_at(self, rows: Numbers | None) -> Numbers:
        """The shards that hold *rows* (None: all) of any of the arrays."""
        parts = [np.empty(0, dtype=np.int64)]
        for array, (starts, shards) in zip(self._arrays, self._tables, strict=True):
            if rows is None:
                parts.append(shards)
                continue
            stored = np.unique(rows // array.stored_rows).tolist()
            parts.extend(shards[starts[one] : starts[one + 1]] for one in stored)
        found: Numbers = np.unique(np.concatenate(parts))
        return found

    @lazy
    def _tables(self) -> list[tuple[Numbers, Numbers]]:
        """For each array: where in the second one the shards of each run of samples begin."""
        num_keys = sum(one.num_stored * math.prod(one.cells) for one in self._arrays)
        if num_keys > MAX_TOLD_KEYS:
            raise InvalidRequest(
                f"the arrays have {num_keys} chunks, and a plan takes {MAX_TOLD_KEYS}: write them "
                "with larger chunks, or with shards of zarr"
            )
        return [self._table(array) for array in self._arrays]

    def _table(self, array: SampleArray) -> tuple[Numbers, Numbers]:
        version, samples = self._samples.stored, self._samples
        places, starts = version.places, version.dataset.shard_starts
        counts, rows = [], []
        for number in range(array.num_stored):
            found = [places[key].row for key in samples.keys(array, number) if key in places]
            counts.append(len(found))
            rows.extend(found)
        at = np.repeat(np.arange(array.num_stored), counts)
        holding = np.searchsorted(starts, np.array(rows, dtype=np.int64), side="right") - 1
        pairs: NDArray[np.int64] = np.unique(at * len(starts) + holding)
        at, shards = np.divmod(pairs, len(starts))
        return np.searchsorted(at, np.arange(array.num_stored + 1)), shards


def _pieces(start: int, end: int, shards: tuple[int, ...]) -> Iterator[Turn]:
    """A turn; as several that follow one another, where it has too many shards for a message."""
    count = max(1, min(end - start, -(-len(shards) // MAX_TURN_SHARDS)))
    for number in range(count):
        part = shards[number * len(shards) // count : (number + 1) * len(shards) // count]
        yield Turn(start + (end - start) * (number + 1) // count, part)
