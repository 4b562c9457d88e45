"""What a loader reads, seen from the loader: epochs of numbered samples, whatever they are made of.

A loader is given something with a method ``arranged``: a dataset, a mixture of datasets, packed
windows. What that returns says which samples an epoch has, in which order, how a position becomes a
state, and which plan the daemon gets; :class:`~forebay.dataset.batches.BatchSource` cuts it over
ranks and steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from forebay.dataset.advice import PlanFit
from forebay.dataset.holes import Hole, HoleReader
from forebay.dataset.holes import Readable as RowSource
from forebay.dataset.lists import WithFlatLists
from forebay.dataset.plan import PlanNews, PlanReporter
from forebay.dataset.schema import Column
from forebay_wire.blocks import BlockLayout, BlockParameters, starts_of
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import Cut, LastBatch, Order, OrderState, Shuffle

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset

Numbers = NDArray[np.int64]

WINDOW_BLOCKS: Final = 16
"""Blocks that a block shuffle mixes unless told otherwise: 1 GiB of shards of the usual size."""


@dataclass(frozen=True)
class OrderOptions:
    """What a loader's user says of the order."""

    shuffle: Shuffle = "none"
    seed: int = 0
    window_blocks: int | None = None
    block_rows: int | None = None
    lanes: int | None = None
    columns: tuple[str, ...] | None = None
    """The ones that batches have; None: all."""
    flat_lists: bool = False
    """Lists of numbers come end to end (``Lists``), not each by itself."""


@dataclass(frozen=True)
class PlanParameters:
    """What a plan says beside the order itself."""

    global_batch_size: int
    last_batch: LastBatch
    rank: int
    num_ranks: int
    lanes: int
    num_epochs: int = 0
    """0: nobody knows."""


class Samples(Protocol):
    """One epoch of what is read. Thread-safe."""

    @property
    def num_samples(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    def rows(self, positions: Numbers) -> Numbers:
        """What stands at *positions*: numbers that name rows to :meth:`read`."""
        ...

    def read(self, rows: Numbers, columns: Sequence[str] | None) -> dict[str, Any]:
        """Column to values of *rows*, in that order: arrays ``(len(rows), *shape)`` and lists."""
        ...

    def read_masked(
        self, rows: Numbers, columns: Sequence[str] | None
    ) -> tuple[dict[str, Any], list[Hole]]:
        """The same, and those of *rows* that cannot be read: zeros, or None."""
        ...

    def ids(self, rows: Numbers) -> dict[str, Numbers]:
        """What ``include_ids`` adds for *rows*."""
        ...


class ListSamples(Samples, Protocol):
    """Samples whose lists can be taken apart."""

    def list_lengths(self, rows: Numbers, column: str) -> Numbers:
        """How many elements each list has."""
        ...

    def list_pieces(
        self, rows: Numbers, starts: Numbers, sizes: Numbers, column: str
    ) -> NDArray[Any]:
        """Elements [start, start + size) of each list, one after the other."""
        ...


class Piece(Protocol):
    """What one rank reads in one step."""

    @property
    def num_samples(self) -> int:
        """Rows that are no padding."""
        ...

    def positions(self, num_samples: int) -> Numbers:
        """For :meth:`Samples.rows`, padding included."""
        ...

    def mask(self) -> NDArray[np.bool_]:
        """True for samples, False for padding."""
        ...


class Steps(Protocol):
    """The global batches from one position of an epoch on: the same on all ranks."""

    def steps(self) -> Iterable[Any]:
        """One after the other; each names itself to the methods below."""
        ...

    @property
    def num_steps(self) -> int: ...

    @property
    def is_over(self) -> bool:
        """Whether there is none; cheap where counting all is not."""
        ...

    def bounds(self, step: Any) -> tuple[int, int]:
        """The position that a step starts from, and the one after it."""
        ...

    def part(self, step: Any, rank: int, num_ranks: int) -> Piece: ...


def some_steps(cut: Steps, first: int, every: int) -> Iterable[Any]:
    """The steps *first*, *first* + *every*, … of *cut*."""
    steps = cut.steps()
    return steps[first::every] if isinstance(steps, range) else islice(steps, first, None, every)


class Reporter(Protocol):
    """Tells the daemon what a loader reads next: see ``PlanReporter``."""

    @property
    def plan(self) -> str: ...

    @property
    def news(self) -> PlanNews: ...

    def account(self, account: Callable[[PlanFit], dict[str, Any]]) -> None:
        """Have the daemon told *account*'s answer now and then: the loader's sums."""
        ...

    def stand(self, epoch: int, position: int) -> None: ...

    def end(self) -> None: ...


class Reading(Protocol):
    """Something to read, in an order. Immutable, picklable, thread-safe."""

    @property
    def has_lanes(self) -> bool:
        """Whether the order has lanes; if not, they are 1."""
        ...

    @property
    def row_bytes(self) -> float:
        """About what one sample takes in a batch."""
        ...

    @property
    def title(self) -> str:
        """What is read, for people."""
        ...

    @property
    def name(self) -> str:
        """Whose rows :meth:`Samples.rows` are, for messages."""
        ...

    @property
    def columns(self) -> tuple[Column, ...]:
        """Those of the dataset that are read; empty: its own ones alone."""
        ...

    @property
    def can_mask(self) -> bool:
        """Whether :meth:`Samples.read_masked` works."""
        ...

    def check(self, global_batch_size: int, last_batch: LastBatch) -> None:
        """Raise InvalidRequest if that would give no batch at all."""
        ...

    def epoch(self, epoch: int, lanes: int) -> Samples: ...

    def cut(
        self, epoch: int, position: int, global_batch_size: int, last_batch: LastBatch, lanes: int
    ) -> Steps: ...

    def state(self, epoch: int, position: int, lanes: int) -> dict[str, Any]:
        """The JSON object that says: go on with *position* of *epoch*. O(1)."""
        ...

    def restored(self, state: Mapping[str, Any], lanes: int | None) -> tuple[int, int, int]:
        """(epoch, position, lanes) of a *state*; *lanes*: the ones it must have, None: any.

        InvalidRequest if it is of other samples or another order.
        """
        ...

    def reporter(self, loader: str, parameters: PlanParameters) -> Reporter:
        """The plan of a loader that has the name *loader* for people; to be started."""
        ...


@runtime_checkable
class InBlocksOfState(Protocol):
    """A reading whose order has blocks that a state decides, where nobody chose them."""

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of a window and rows of a block; zeros without blocks."""
        ...

    def blocks_of(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Those that go on with *state*."""
        ...

    def in_blocks(self, window_blocks: int, block_rows: int) -> Reading:
        """The same in these, itself if it has them."""
        ...


class Readable(Protocol):
    """What a loader can be given."""

    def arranged(self, options: OrderOptions) -> Reading:
        """It, in an order. InvalidRequest for options that it does not have."""
        ...


def arrange(given: Any, options: OrderOptions) -> Reading:
    """What a loader was *given*, in an order."""
    arranged = getattr(given, "arranged", None)
    if arranged is None:
        raise InvalidRequest(
            f"expected a dataset from client.dataset(...), a forebay.Mixture, a forebay.Packed or "
            f"forebay.zarr.samples(...), got {type(given).__name__}"
        )
    reading: Reading = arranged(options)
    return reading


def no_drop_of_all(num_samples: int, global_batch_size: int, last_batch: LastBatch) -> None:
    """Raise if ``last_batch="drop"`` leaves nothing of *num_samples*."""
    if last_batch == "drop" and num_samples < global_batch_size:
        raise InvalidRequest(
            f'last_batch="drop" with a global batch of {global_batch_size} would drop all '
            f'{num_samples} samples: use a smaller batch, or "keep" or "pad"'
        )


@dataclass(frozen=True)
class OrderedSamples:
    """One epoch of rows in an order."""

    order: Order
    holes: HoleReader
    source: RowSource
    """What they are read from."""

    @property
    def num_samples(self) -> int:
        return self.order.num_samples

    @property
    def epoch(self) -> int:
        return self.order.epoch

    def rows(self, positions: Numbers) -> Numbers:
        return self.order.at(positions)

    def read(self, rows: Numbers, columns: Sequence[str] | None) -> dict[str, Any]:
        return self.source.read(rows, columns)

    def read_masked(
        self, rows: Numbers, columns: Sequence[str] | None
    ) -> tuple[dict[str, Any], list[Hole]]:
        return self.holes.read(self.source, rows, columns, self.epoch)

    def ids(self, rows: Numbers) -> dict[str, Numbers]:
        return {"_ids": np.array(rows)}


@dataclass(frozen=True)
class DatasetSamples(OrderedSamples):
    """One epoch of a dataset, which is read as *source*."""

    dataset: Dataset

    def rows(self, positions: Numbers) -> Numbers:
        return self.dataset.rows_at(self.order.at(positions))

    def list_lengths(self, rows: Numbers, column: str) -> Numbers:
        return self.dataset.list_lengths(rows, column)

    def list_pieces(
        self, rows: Numbers, starts: Numbers, sizes: Numbers, column: str
    ) -> NDArray[Any]:
        return self.dataset.list_pieces(rows, starts, sizes, column)


class DatasetReading:
    """A dataset in an order."""

    def __init__(self, dataset: Dataset, options: OrderOptions) -> None:
        dataset.columns(options.columns)  # raises for a name that does not exist
        self.dataset = dataset
        self._options = options
        self._layout = block_layout(dataset, options)
        self._holes = HoleReader()
        self.source: RowSource = WithFlatLists(dataset) if options.flat_lists else dataset

    @property
    def has_lanes(self) -> bool:
        return self._layout is not None

    @property
    def row_bytes(self) -> float:
        """By the version's size on disk."""
        return self.dataset.num_bytes / max(1, int(self.dataset.shard_starts[-1]))

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.dataset.columns(self._options.columns)

    @property
    def can_mask(self) -> bool:
        return True

    @property
    def title(self) -> str:
        split = f" split {self.dataset.split}" if self.dataset.split else ""
        return f"{self.dataset.name} v{self.dataset.version}{split}"

    def check(self, global_batch_size: int, last_batch: LastBatch) -> None:
        no_drop_of_all(self.dataset.num_rows, global_batch_size, last_batch)

    def order(self, epoch: int, lanes: int) -> Order:
        """The order of *epoch*: the same on all ranks."""
        dataset, options, layout = self.dataset, self._options, self._layout
        if layout is not None:
            layout = replace(layout, parameters=replace(layout.parameters, lanes=lanes))
        return Order(
            dataset.num_rows, options.shuffle, options.seed, epoch, dataset.identity, layout
        )

    def epoch(self, epoch: int, lanes: int) -> DatasetSamples:
        return DatasetSamples(self.order(epoch, lanes), self._holes, self.source, self.dataset)

    def cut(
        self, epoch: int, position: int, global_batch_size: int, last_batch: LastBatch, lanes: int
    ) -> Cut:
        return Cut(self.dataset.num_rows, global_batch_size, last_batch, position, lanes)

    def state(self, epoch: int, position: int, lanes: int) -> dict[str, Any]:
        return self._state(epoch, position, lanes).to_json()

    def restored(self, state: Mapping[str, Any], lanes: int | None) -> tuple[int, int, int]:
        found = OrderState.from_json(state)
        any_lanes = lanes is None and found.shuffle == self._options.shuffle
        own = self._state(0, 0, found.lanes if any_lanes else lanes or 1)
        found.check_same_samples(own)
        if found.position > self.dataset.num_rows:
            raise InvalidRequest(
                f"the state stands at sample {found.position} of {self.dataset.num_rows}"
            )
        return found.epoch, found.position, found.lanes

    def _state(self, epoch: int, position: int, lanes: int) -> OrderState:
        dataset, options = self.dataset, self._options
        blocks = None if self._layout is None else self._layout.parameters
        return OrderState(
            epoch=epoch,
            position=position,
            seed=options.seed,
            shuffle=options.shuffle,
            dataset=dataset.name,
            version=dataset.version,
            manifest=dataset.manifest_id,
            selection=dataset.selection_id,
            window_blocks=0 if blocks is None else blocks.window_blocks,
            block_rows=0 if blocks is None else blocks.block_rows,
            lanes=lanes,
        )

    def reporter(self, loader: str, parameters: PlanParameters) -> PlanReporter:
        order = self.plan_order(parameters)
        return PlanReporter(self.dataset.endpoint, loader, lambda: order)

    def plan_order(self, parameters: PlanParameters) -> dict[str, Any]:
        """What a plan says of the order (see ``plans.proto``)."""
        told = asdict(parameters)
        if self._layout is not None:
            told = asdict(self._layout.parameters) | told
        else:
            del told["lanes"]
        if self.dataset.manifest.layers:
            names = [column.name for column in self.dataset.columns(self._options.columns)]
            told["columns"] = json.dumps(names)
        return {
            **told,
            "manifest": self.dataset.manifest_id,
            "selection": self.dataset.selection_id,
            "shuffle": self._options.shuffle,
            "seed": self._options.seed,
        }


def refuse_blocks(options: OrderOptions) -> None:
    """InvalidRequest for blocks that were given for another shuffle."""
    if (options.window_blocks, options.block_rows, options.lanes) != (None, None, None):
        raise InvalidRequest(
            'window_blocks, block_rows and lanes belong to shuffle="block", not to '
            f"{options.shuffle!r}"
        )


def block_layout(dataset: Dataset, options: OrderOptions) -> BlockLayout | None:
    """The blocks of a block shuffle, of which only the lanes may not be known yet."""
    lanes, block_rows, window_blocks = options.lanes, options.block_rows, options.window_blocks
    if options.shuffle != "block":
        refuse_blocks(options)
        return None
    if block_rows is not None and block_rows < 1:
        raise InvalidRequest(f"block_rows={block_rows}: at least 1, or None for whole shards")
    parameters = BlockParameters(
        WINDOW_BLOCKS if window_blocks is None else window_blocks,
        block_rows or 0,
        1 if lanes is None else lanes,
    )
    starts: Numbers | None
    if dataset.selection is None:
        starts = dataset.shard_starts
    else:
        counts = dataset.selection.rule.get("counts")  # a stored one keeps the version's order
        starts = None if counts is None else starts_of(counts)
    return parameters.layout(dataset.num_rows, starts)
