"""One rank's batches of a dataset as tensors: what both loaders are made of."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.dataset import Dataset
from forebay.dataset.holes import Hole, HoleReader, check_on_error
from forebay.dataset.ranks import find_nodes, find_rank
from forebay.dataset.transforms import Batch, Rows, Transform, Transforms
from forebay.stopwatch import Stopwatch
from forebay.transfer.wanted import reading_for
from forebay_wire.blocks import BlockLayout, BlockParameters, starts_of
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import (
    Cut,
    LastBatch,
    Order,
    OrderState,
    Part,
    Shuffle,
    check_last_batch,
    check_shuffle,
)

WINDOW_BLOCKS: Final = 16
"""Blocks that a block shuffle mixes unless told otherwise: 1 GiB of shards of the usual size."""


@dataclass(slots=True)
class ReadBatch:
    """One rank's batch of a step."""

    batch: Batch
    num_samples: int
    """Without padding and holes."""
    num_bytes: int
    holes: list[Hole]
    """Its samples that could not be read."""
    times: dict[str, float] = field(default_factory=dict)
    """Where the time of its thread went: cause to seconds."""
    finished: float = 0.0
    """When, by ``time.perf_counter``."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.batch, self.num_samples, self.num_bytes))


class BatchSource:
    """Turns (epoch, position, step) into this rank's batch. Thread-safe once bound, picklable."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int | None = None,
        batch_size: int | None = None,
        shuffle: str = "none",
        seed: int = 0,
        window_blocks: int | None = None,
        block_rows: int | None = None,
        lanes: int | None = None,
        last_batch: str = "keep",
        transform: Transform | Sequence[Transform] | None = None,
        columns: Sequence[str] | None = None,
        include_ids: bool = False,
        on_error: str = "raise",
        max_errors: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise InvalidRequest(
                f"expected a dataset from client.dataset(...), got {type(dataset).__name__}"
            )
        if (global_batch_size is None) == (batch_size is None):
            raise InvalidRequest(
                "give exactly one of global_batch_size (all ranks together) and batch_size (each)"
            )
        self.dataset = dataset
        self._transforms = Transforms(transform)
        self.max_errors = check_on_error(on_error, max_errors)
        """Bad samples that may be masked; -1: the first one raises."""
        self._hole_reader = HoleReader() if self.max_errors >= 0 else None
        self.shuffle: Shuffle = check_shuffle(shuffle)
        self._layout = _layout(dataset, shuffle, window_blocks, block_rows, lanes)
        self._lanes = lanes
        """What was asked for, or what a restored state had; None: to be chosen."""
        self._are_lanes_fixed = lanes is not None
        self.seed = seed
        self.last_batch: LastBatch = check_last_batch(last_batch)
        self._sizes = (global_batch_size, batch_size)
        self._columns = None if columns is None else list(columns)
        self._include_ids = include_ids
        self._rank = (rank, world_size)
        self._bound: tuple[int, int] | None = None
        self.plan = ""
        """Name of the plan that the daemon knows this reading by."""
        dataset.columns(columns)  # raises for a name that does not exist
        if min(size for size in self._sizes if size is not None) < 1:
            raise InvalidRequest("a batch holds at least one sample")

    def bind(self) -> tuple[int, int]:
        """(rank, number of ranks), found at the first call and kept."""
        if self._bound is None:
            self._bound = find_rank(*self._rank)
            self._lanes = self.lanes
            size = self.global_batch_size
            if self.last_batch == "drop" and self.dataset.num_rows < size:
                raise InvalidRequest(
                    f'last_batch="drop" with a global batch of {size} would drop all '
                    f'{self.dataset.num_rows} samples: use a smaller batch, or "keep" or "pad"'
                )
        return self._bound

    @property
    def global_batch_size(self) -> int:
        """Samples of one step on all ranks together."""
        global_size, own_size = self._sizes
        if global_size is not None:
            return global_size
        assert own_size is not None
        _, world_size = self._bound or find_rank(*self._rank)
        return own_size * world_size

    @property
    def lanes(self) -> int:
        """Lanes of the order: as asked for or restored, else as many as there are nodes."""
        if self._layout is None:
            return 1
        if self._lanes is not None:
            return self._lanes
        _, world_size = self._bound or find_rank(*self._rank)
        return find_nodes(world_size)

    def take_lanes(self, lanes: int) -> None:
        """Have the order these *lanes*, which another process chose."""
        self._lanes = lanes

    @property
    def average_batch_bytes(self) -> int:
        """About what one rank's batch takes, by the version's size on disk."""
        _, world_size = self._bound or find_rank(*self._rank)
        rows = max(1, sum(shard.num_rows for shard in self.dataset.manifest.shards))
        return math.ceil(self.dataset.num_bytes / rows * self.global_batch_size / world_size)

    def order_parameters(self, num_epochs: int = 0) -> dict[str, Any]:
        """What a plan says of the order (see ``plans.proto``); *num_epochs* 0: nobody knows."""
        rank, num_ranks = self.bind()
        blocks: dict[str, Any] = {}
        if self._layout is not None:
            blocks = asdict(self._layout.parameters) | {"lanes": self.lanes}
        return {
            **blocks,
            "manifest": self.dataset.manifest_id,
            "selection": self.dataset.selection_id,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "last_batch": self.last_batch,
            "rank": rank,
            "num_ranks": num_ranks,
            "num_epochs": num_epochs,
        }

    @property
    def title(self) -> str:
        """Whose reading this is, for people."""
        rank, num_ranks = self.bind()
        split = f" split {self.dataset.split}" if self.dataset.split else ""
        return (
            f"{self.dataset.name} v{self.dataset.version}{split}, rank {rank} of {num_ranks}, "
            f"pid {os.getpid()}"
        )

    def order(self, epoch: int) -> Order:
        """The order of *epoch*: the same on all ranks."""
        dataset, layout = self.dataset, self._layout
        if layout is not None:
            layout = replace(layout, parameters=replace(layout.parameters, lanes=self.lanes))
        return Order(dataset.num_rows, self.shuffle, self.seed, epoch, dataset.identity, layout)

    def cut(self, position: int) -> Cut:
        """The global batches from *position* on: the same on all ranks."""
        size, lanes = self.global_batch_size, self.lanes
        return Cut(self.dataset.num_rows, size, self.last_batch, position, lanes)

    def read(self, order: Order, cut: Cut, step: int) -> ReadBatch:
        """This rank's batch of *step*, transformed."""
        watch = Stopwatch("decode")
        try:
            found = self._read(order, cut, step, watch)
        finally:
            finished = watch.stop()
        found.times, found.finished = watch.seconds, finished
        return found

    def _read(self, order: Order, cut: Cut, step: int, watch: Stopwatch) -> ReadBatch:
        rank, world_size = self.bind()
        part = cut.part(step, rank, world_size)
        indices = order.at(part.positions(self.dataset.num_rows))
        rows = self.dataset.rows_at(indices)
        holes: list[Hole] = []
        with reading_for(self.plan):
            if self._hole_reader is None:
                arrays = self.dataset.read(rows, self._columns, _torch_memory)
            else:
                arrays, holes = self._hole_reader.read(
                    self.dataset, rows, self._columns, _torch_memory, order.epoch
                )
        watch.switch("collate")
        batch = {name: _as_tensors(values) for name, values in arrays.items()}
        num_bytes = sum(_bytes_of(values) for values in batch.values())
        if self._include_ids:
            batch["_ids"] = torch.from_numpy(np.array(rows))
        if self._hole_reader is not None:
            return self._masked(batch, num_bytes, part, order, rows, holes, watch)
        if self.last_batch == "pad":
            batch["_mask"] = torch.from_numpy(part.mask())
        if self._transforms:
            watch.switch("transform")
            named = Rows(self.seed, order.epoch, rows, self.dataset.name)
            batch, _ = self._transforms.apply(batch, named, None, masks=False)
        return ReadBatch(batch, part.num_samples, num_bytes, holes)

    def _masked(
        self,
        batch: Batch,
        num_bytes: int,
        part: Part,
        order: Order,
        rows: NDArray[np.int64],
        holes: list[Hole],
        watch: Stopwatch,
    ) -> ReadBatch:
        """The batch whose *holes* are masked, and those that a transform makes."""
        real = part.mask()
        good = np.ones(len(rows), dtype=np.bool_)
        good[[hole.position for hole in holes]] = False
        batch["_mask"] = torch.from_numpy(real & good)
        if self._transforms:
            watch.switch("transform")
            named = Rows(self.seed, order.epoch, rows, self.dataset.name)
            batch, failed = self._transforms.apply(batch, named, good, masks=True)
            if failed:
                holes = holes + failed
                good[[hole.position for hole in failed]] = False
        # A row that pads the batch is counted where it stands itself.
        holes = [hole for hole in holes if real[hole.position]]
        return ReadBatch(batch, int((real & good).sum()), num_bytes, holes)

    # Where reading stands.

    def state(self, epoch: int, position: int) -> dict[str, Any]:
        """The JSON object that says: go on with *position* of *epoch*. O(1)."""
        return self._state(epoch, position).to_json()

    def restored(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """(epoch, position) of a *state*; InvalidRequest if it is of other samples or order.

        The order has the state's lanes from now on.
        """
        found = OrderState.from_json(state)
        own = self._state(0, 0)
        if not self._are_lanes_fixed and found.shuffle == own.shuffle:
            own = replace(own, lanes=found.lanes)
        found.check_same_samples(own)
        if found.position > self.dataset.num_rows:
            raise InvalidRequest(
                f"the state stands at sample {found.position} of {self.dataset.num_rows}"
            )
        self._lanes = found.lanes
        return found.epoch, found.position

    def _state(self, epoch: int, position: int) -> OrderState:
        dataset = self.dataset
        blocks = None if self._layout is None else self._layout.parameters
        return OrderState(
            epoch=epoch,
            position=position,
            seed=self.seed,
            shuffle=self.shuffle,
            dataset=dataset.name,
            version=dataset.version,
            manifest=dataset.manifest_id,
            selection=dataset.selection_id,
            window_blocks=0 if blocks is None else blocks.window_blocks,
            block_rows=0 if blocks is None else blocks.block_rows,
            lanes=self.lanes,
        )


def _layout(
    dataset: Dataset,
    shuffle: str,
    window_blocks: int | None,
    block_rows: int | None,
    lanes: int | None,
) -> BlockLayout | None:
    """The blocks of a block shuffle, of which only the lanes may not be known yet."""
    if shuffle != "block":
        if (window_blocks, block_rows, lanes) != (None, None, None):
            raise InvalidRequest(
                f'window_blocks, block_rows and lanes belong to shuffle="block", not to {shuffle!r}'
            )
        return None
    if block_rows is not None and block_rows < 1:
        raise InvalidRequest(f"block_rows={block_rows}: at least 1, or None for whole shards")
    parameters = BlockParameters(
        WINDOW_BLOCKS if window_blocks is None else window_blocks,
        block_rows or 0,
        1 if lanes is None else lanes,
    )
    counts: Sequence[int] | None
    if dataset.selection is None:
        counts = [shard.num_rows for shard in dataset.manifest.shards]
    else:
        counts = dataset.selection.rule.get("counts")  # a stored one keeps the version's order
    return parameters.layout(dataset.num_rows, None if counts is None else starts_of(counts))


def _torch_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An ordinary torch allocation seen as an array, so that the batch is the tensor's own."""
    array: NDArray[Any] = torch.empty(shape, dtype=_TORCH_TYPES[dtype.name]).numpy()
    return array


_TORCH_TYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}


def _as_tensors(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values)
    if any(isinstance(value, np.ndarray) for value in values):  # ragged: one tensor a sample
        return [None if value is None else torch.from_numpy(value) for value in values]
    return values


def _bytes_of(values: Any) -> int:
    if isinstance(values, torch.Tensor):
        return values.nbytes
    return sum(_bytes_of(v) if isinstance(v, torch.Tensor) else _length(v) for v in values)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes)) else 8
