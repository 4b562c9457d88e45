"""One rank's batches of a dataset as tensors: what both loaders are made of."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.dataset import Dataset
from forebay.dataset.ranks import find_rank
from forebay.transfer.wanted import reading_for
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import (
    Cut,
    LastBatch,
    Order,
    OrderState,
    Shuffle,
    check_last_batch,
    check_shuffle,
)

Batch = dict[str, Any]
"""Column name to tensor ``(rows, *shape)``, or to a list for text, bytes and ragged columns."""

Transform = Callable[[Batch], Batch]


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
        last_batch: str = "keep",
        transform: Transform | None = None,
        columns: Sequence[str] | None = None,
        include_ids: bool = False,
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
        self.transform = transform
        self.shuffle: Shuffle = check_shuffle(shuffle)
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
    def average_batch_bytes(self) -> int:
        """About what one rank's batch takes, by the version's size on disk."""
        _, world_size = self._bound or find_rank(*self._rank)
        rows = max(1, sum(shard.num_rows for shard in self.dataset.manifest.shards))
        return math.ceil(self.dataset.num_bytes / rows * self.global_batch_size / world_size)

    def order_parameters(self, num_epochs: int = 0) -> dict[str, Any]:
        """What a plan says of the order (see ``plans.proto``); *num_epochs* 0: nobody knows."""
        rank, num_ranks = self.bind()
        return {
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
        dataset = self.dataset
        return Order(dataset.num_rows, self.shuffle, self.seed, epoch, dataset.identity)

    def cut(self, position: int) -> Cut:
        """The global batches from *position* on: the same on all ranks."""
        return Cut(self.dataset.num_rows, self.global_batch_size, self.last_batch, position)

    def read(self, order: Order, cut: Cut, step: int) -> tuple[Batch, int, int]:
        """This rank's batch of *step*, transformed; its samples without padding; its bytes."""
        rank, world_size = self.bind()
        part = cut.part(step, rank, world_size)
        indices = order.at(part.positions(self.dataset.num_rows))
        rows = self.dataset.rows_at(indices)
        with reading_for(self.plan):
            arrays = self.dataset.read(rows, self._columns, _torch_memory)
        batch = {name: _as_tensors(values) for name, values in arrays.items()}
        num_bytes = sum(_bytes_of(values) for values in batch.values())
        if self._include_ids:
            batch["_ids"] = torch.from_numpy(np.array(rows))
        if self.last_batch == "pad":
            batch["_mask"] = torch.from_numpy(part.mask())
        if self.transform is not None:
            batch = self.transform(batch)
        return batch, part.stop - part.start, num_bytes

    # Where reading stands.

    def state(self, epoch: int, position: int) -> dict[str, Any]:
        """The JSON object that says: go on with *position* of *epoch*. O(1)."""
        return self._state(epoch, position).to_json()

    def restored(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """(epoch, position) of a *state*; InvalidRequest if it is of other samples or order."""
        found = OrderState.from_json(state)
        found.check_same_samples(self._state(0, 0))
        if found.position > self.dataset.num_rows:
            raise InvalidRequest(
                f"the state stands at sample {found.position} of {self.dataset.num_rows}"
            )
        return found.epoch, found.position

    def _state(self, epoch: int, position: int) -> OrderState:
        dataset = self.dataset
        return OrderState(
            epoch=epoch,
            position=position,
            seed=self.seed,
            shuffle=self.shuffle,
            dataset=dataset.name,
            version=dataset.version,
            manifest=dataset.manifest_id,
            selection=dataset.selection_id,
        )


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
