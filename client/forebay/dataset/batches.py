"""One rank's batches of a dataset as tensors: what both loaders are made of."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.following import FollowingReading, check_follow
from forebay.dataset.holes import Hole, check_on_error
from forebay.dataset.lists import Lists
from forebay.dataset.ragged import Ragged
from forebay.dataset.ranks import find_nodes, find_rank
from forebay.dataset.reading import (
    InBlocksOfState,
    OrderOptions,
    Piece,
    PlanParameters,
    Readable,
    Reading,
    Reporter,
    Samples,
    Steps,
    arrange,
)
from forebay.dataset.steps import StepPages
from forebay.dataset.transforms import Batch, Examples, Rows, Transform, Transforms
from forebay.stopwatch import Stopwatch
from forebay.transfer.wanted import reading_for
from forebay_wire.errors import InvalidRequest
from forebay_wire.order import LastBatch, check_last_batch, check_shuffle

NUM_EXAMPLES: Final = 8
"""Samples that show what a transform makes of them, where a rank has none."""


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


class BatchSource:
    """Turns (epoch, position, step) into this rank's batch. Thread-safe once bound, picklable."""

    def __init__(
        self,
        dataset: Readable,
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
        ragged: str = "list",
        pad_value: float = 0,
        rank: int | None = None,
        world_size: int | None = None,
        follow: str | None = None,
        run: str | None = None,
    ) -> None:
        if (global_batch_size is None) == (batch_size is None):
            raise InvalidRequest(
                "give exactly one of global_batch_size (all ranks together) and batch_size (each)"
            )
        self.dataset = dataset
        self._transforms = Transforms(transform)
        self._ragged = Ragged(ragged, pad_value)
        self.max_errors = check_on_error(on_error, max_errors)
        """Bad samples that may be masked; -1: the first one raises."""
        self._masks_holes = self.max_errors >= 0
        self.seed = seed
        names = None if columns is None else tuple(columns)
        options = OrderOptions(
            check_shuffle(shuffle), seed, window_blocks, block_rows, lanes, names, ragged != "list"
        )
        self.following: FollowingReading | None = None
        """What is read, if it moves on to other versions."""
        if check_follow(follow, run):
            self.following = FollowingReading(dataset, options, run, (rank, world_size))
        self._reading: Reading = self.following or arrange(dataset, options)
        self._transforms.learn(dataset)
        self._lists = {c.name: c for c in self._reading.columns if c.kind == "list"}
        self._ragged.check(self._lists.values(), [c.name for c in self._reading.columns])
        if self._masks_holes and not self._reading.can_mask:
            raise InvalidRequest(
                'on_error="mask" is for samples, not for packed windows: where a document ends '
                "decides where all after it in its group lie, and what one rank cannot read "
                "another one, or the next start, may; so nothing would be exact. `forebay dataset "
                "verify` names what is damaged; leave it out by a selection (define_selection)"
            )
        self._lanes = lanes if self._reading.has_lanes else 1
        """What was asked for, or what a restored state had; None: to be chosen."""
        self._fixed_lanes = self._lanes
        self.last_batch: LastBatch = check_last_batch(last_batch)
        self._sizes = (global_batch_size, batch_size)
        self._columns = None if columns is None else list(columns)
        self._include_ids = include_ids
        self._rank = (rank, world_size)
        self._bound: tuple[int, int] | None = None
        self._pages = StepPages()
        self.plan = ""
        """Name of the plan that the daemon knows this reading by."""
        if min(size for size in self._sizes if size is not None) < 1:
            raise InvalidRequest("a batch holds at least one sample")
        if self.following is not None:
            self.following.check_batches = self._check_batches

    def _check_batches(self, reading: Reading) -> None:
        """Raise InvalidRequest if what might be read next could not come in such batches."""
        columns = reading.columns
        lists = [column for column in columns if column.kind == "list"]
        self._ragged.check(lists, [column.name for column in columns])
        reading.check(self.global_batch_size, self.last_batch)

    def bind(self) -> tuple[int, int]:
        """(rank, number of ranks), found at the first call and kept."""
        if self._bound is None:
            self._bound = find_rank(*self._rank)
            self._lanes = self.lanes
            if self.following is not None:
                self.following.bind(self._bound[1])
            self._reading.check(self.global_batch_size, self.last_batch)
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
        if self._lanes is not None:
            return self._lanes
        _, world_size = self._bound or find_rank(*self._rank)
        return find_nodes(world_size)

    def take_lanes(self, lanes: int) -> None:
        """Have the order these *lanes*, which another process chose."""
        self._lanes = lanes

    @property
    def blocks(self) -> tuple[int, int]:
        """Of the order, where a state may decide them; zeros otherwise."""
        return self._reading.blocks if isinstance(self._reading, InBlocksOfState) else (0, 0)

    def take_blocks(self, window_blocks: int, block_rows: int) -> None:
        """Have the order these blocks, which another process found in a state; zeros: as it has."""
        if window_blocks and isinstance(self._reading, InBlocksOfState):
            self._reading = self._reading.in_blocks(window_blocks, block_rows)

    @property
    def average_batch_bytes(self) -> int:
        """About what one rank's batch takes."""
        _, world_size = self._bound or find_rank(*self._rank)
        return math.ceil(self._reading.row_bytes * self.global_batch_size / world_size)

    def reading_of(self, epoch: int) -> Reading:
        """What *epoch* is read from; of a loader that follows, of its version."""
        return self._reading if self.following is None else self.following.of(epoch).reading

    def goes_on_with(self, reading: Reading | None, epoch: int) -> bool:
        """Whether *epoch* is read from *reading* for certain."""
        if self.following is None or reading is None:
            return self.following is None
        return self.following.reads(epoch, reading)

    def check_length(self) -> None:
        """Raise TypeError, by which Python and frameworks know that there is no length."""
        if self.following is not None:
            raise TypeError(
                'a loader with follow="latest" has no len(): each epoch may have another one, and '
                "who asks once (such as Lightning) would cut later ones short. forebay.DataLoader "
                "says it epoch by epoch: len(epoch) of epochs(n), and remaining_steps()"
            )

    def standing_on(self, epoch: int) -> tuple[Readable, str]:
        """What *epoch* is read from, and its title, if that is decided; else what was last."""
        if self.following is None:
            return self.dataset, self._reading.title
        versions = self.following.standing(epoch)
        return versions.given, versions.reading.title

    def reporter(self, epoch: int, num_epochs: int = 0) -> Reporter:
        """The plan of what is read from *epoch* on, for the daemon; *num_epochs* 0: nobody
        knows."""
        rank, num_ranks = self.bind()
        reading = self.reading_of(epoch)
        parameters = PlanParameters(
            self.global_batch_size, self.last_batch, rank, num_ranks, self.lanes, num_epochs
        )
        loader = f"{reading.title}, rank {rank} of {num_ranks}, pid {os.getpid()}"
        return reading.reporter(loader, parameters)

    @property
    def name(self) -> str:
        """Whose rows it reads, for messages."""
        return self._reading.name

    def order(self, epoch: int) -> Samples:
        """The samples of *epoch* in their order: the same on all ranks."""
        return self._reading.epoch(epoch, self.lanes)

    def cut(self, position: int, epoch: int = 0) -> Steps:
        """The global batches from *position* of *epoch* on: the same on all ranks."""
        size, lanes = self.global_batch_size, self.lanes
        return self._reading.cut(epoch, position, size, self.last_batch, lanes)

    def read(self, order: Samples, cut: Steps, step: Any) -> ReadBatch:
        """This rank's batch of *step*, transformed."""
        watch = Stopwatch("decode")
        try:
            found = self._read(order, cut, step, watch)
        finally:
            finished = watch.stop()
        found.times, found.finished = watch.seconds, finished
        return found

    def _read(self, order: Samples, cut: Steps, step: Any, watch: Stopwatch) -> ReadBatch:
        rank, world_size = self.bind()
        part, rows = self._pages.at(order, cut, step, rank, world_size)
        holes: list[Hole] = []
        with reading_for(self.plan):
            if self._masks_holes:
                arrays, holes = order.read_masked(rows, self._columns)
            else:
                arrays = order.read(rows, self._columns)
        watch.switch("collate")
        batch = self._tensors(arrays)
        num_bytes = sum(map(bytes_of, batch.values()))
        batch |= self._ids(order, rows)
        if self._masks_holes:
            return self._masked(batch, num_bytes, part, order, rows, holes, watch)
        if self.last_batch == "pad":
            batch["_mask"] = _both(batch.get("_mask"), torch.from_numpy(part.mask()))
        if self._transforms:
            watch.switch("transform")
            named, examples = self._named(order, rows), partial(self._examples, order)
            batch, _ = self._transforms.apply(batch, named, None, masks=False, examples=examples)
        return ReadBatch(batch, part.num_samples, num_bytes, holes)

    def _named(self, order: Samples, rows: NDArray[np.int64]) -> Rows:
        return Rows(self.seed, order.epoch, rows, self._reading.name)

    def _ids(self, order: Samples, rows: NDArray[np.int64]) -> Batch:
        if not self._include_ids:
            return {}
        return {name: torch.from_numpy(ids) for name, ids in order.ids(rows).items()}

    def _examples(self, order: Samples) -> Examples | None:
        """A few samples from all over the epoch, for a rank that has none yet."""
        count = min(order.num_samples, NUM_EXAMPLES)
        if count == 0:
            return None
        rows = order.rows(np.arange(count, dtype=np.int64) * order.num_samples // count)
        good = np.ones(count, dtype=np.bool_)
        with reading_for(self.plan):
            if self._reading.can_mask:
                arrays, holes = order.read_masked(rows, self._columns)
                good[[hole.position for hole in holes]] = False
            else:
                arrays = order.read(rows, self._columns)
        batch = self._tensors(arrays) | self._ids(order, rows)
        batch["_mask"] = _both(batch.get("_mask"), torch.from_numpy(good))
        return Examples(batch, replace(self._named(order, rows), are_examples=True), good)

    def _tensors(self, arrays: Mapping[str, Any]) -> Batch:
        batch: Batch = {}
        for name, values in arrays.items():
            column = self._lists.get(name) if self._ragged.is_flat else None
            if isinstance(values, Lists):  # of a column, maybe, that only newer versions have
                batch |= self._ragged.tensors(name, values)
            elif column is None:
                batch[name] = _as_tensors(values)
            else:
                batch |= self._ragged.tensors(name, Lists.of(values, column.dtype))
        return batch

    def _masked(
        self,
        batch: Batch,
        num_bytes: int,
        part: Piece,
        order: Samples,
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
            named, examples = self._named(order, rows), partial(self._examples, order)
            batch, failed = self._transforms.apply(
                batch, named, good, masks=True, examples=examples
            )
            if failed:
                holes = holes + failed
                good[[hole.position for hole in failed]] = False
        # A row that pads the batch is counted where it stands itself.
        holes = [hole for hole in holes if real[hole.position]]
        return ReadBatch(batch, int((real & good).sum()), num_bytes, holes)

    # Where reading stands.

    def state(self, epoch: int, position: int) -> dict[str, Any]:
        """The JSON object that says: go on with *position* of *epoch*. O(1)."""
        return self._reading.state(epoch, position, self.lanes)

    def state_of_begun(
        self, epoch: int, position: int, identities: Sequence[str] = ()
    ) -> dict[str, Any]:
        """As :meth:`state`, of an epoch that has begun: one that is followed stays on its version
        even if nothing of it was read, on those of *identities* if there are some."""
        if self.following is None:
            return self.state(epoch, position)
        return self.following.state_of_begun(epoch, position, self.lanes, identities)

    def identities_of(self, epoch: int) -> list[str]:
        """By which the versions are known that *epoch* reads; none if nothing is followed."""
        return [] if self.following is None else self.following.identities_of(epoch)

    def resumed(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """As :meth:`restored`, of what :meth:`state_of_begun` said."""
        if self.following is None:
            return self.restored(state)
        epoch, position, self._lanes = self.following.resumed(state, self._fixed_lanes)
        return epoch, position

    def restored(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """(epoch, position) of a *state*; InvalidRequest if it is of other samples or order.

        The order has the state's lanes from now on, and its blocks if nobody chose others.
        """
        reading = self._reading
        if isinstance(reading, InBlocksOfState):
            reading = reading.in_blocks(*reading.blocks_of(state))
        epoch, position, self._lanes = reading.restored(state, self._fixed_lanes)
        self._reading = reading
        return epoch, position


def _both(mask: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """What is there of the *rows* that are there; *mask*: of what is in them, if that varies."""
    return rows if mask is None else mask & rows[:, None]


def _as_tensors(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values)
    if any(isinstance(value, np.ndarray) for value in values):  # ragged: one tensor a sample
        return [None if value is None else torch.from_numpy(value) for value in values]
    return values


def bytes_of(values: Any) -> int:
    """About what one column of a batch takes."""
    if isinstance(values, torch.Tensor):
        return values.values().nbytes if values.is_nested else values.nbytes
    return sum(bytes_of(v) if isinstance(v, torch.Tensor) else _length(v) for v in values)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes)) else 8
