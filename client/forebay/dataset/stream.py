"""The same batches for torch's own DataLoader (and what wraps it): an iterable of whole batches.

``torch.utils.data.DataLoader(StreamingDataset(...), batch_size=None, num_workers=N)``: worker w of
W yields the rank's batches w, w + W, …, and torch asks its workers in turn, so the order comes out
whole for any number of workers.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils.data

from forebay.dataset.batches import BatchSource
from forebay.dataset.begun import NUMBERS_EACH, Begun, as_numbers, identities_of
from forebay.dataset.ledger import habits_of
from forebay.dataset.passes import Pass, refuse_accelerate, torchdata_state
from forebay.dataset.reading import Readable, Reading, Reporter, some_steps
from forebay.dataset.report import LoaderReport
from forebay.dataset.shared_sums import SharedSums
from forebay.dataset.states import check_is_state
from forebay.dataset.transforms import Batch, Transform
from forebay.dataset.turns import Turns
from forebay_wire.errors import ForebayError, InvalidRequest

# Slots of the memory that parent and workers share.
_WORKERS_READ, _LANES, _WINDOW_BLOCKS, _BLOCK_ROWS = range(4)


class StreamingDataset(torch.utils.data.IterableDataset[Batch]):
    """Whole batches of a dataset in exact order, cut over ranks and workers.

    Give it to a loader with ``batch_size=None``. Workers (fork, forkserver, spawn) open their own
    connection for bytes and use no gRPC. Each batch carries ``_position``, an int64 tensor
    ``[epoch, samples consumed after it]`` (and, of one that follows, ids of the versions it was
    read from): so ``state_dict(after=batch)`` is right whatever the workers read ahead. Each
    iteration is an epoch of its own: the first one what is left of the epoch where
    :meth:`load_state_dict` or :meth:`set_epoch` made it stand, each further one the next whole
    epoch, even if one was left early. Several may run at once. In torchdata's StatefulDataLoader
    the loader's own state is exact, too; on other workers or batch sizes, give that state to
    :meth:`load_state_dict` instead.
    """

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
        include_times: bool = False,
        on_error: str = "raise",
        max_errors: int | None = None,
        ragged: str = "list",
        pad_value: float = 0,
        rank: int | None = None,
        world_size: int | None = None,
        follow: str | None = None,
        run: str | None = None,
    ) -> None:
        """The arguments mean what they mean for ``forebay.DataLoader``."""
        super().__init__()
        self._source = BatchSource(
            dataset,
            global_batch_size=global_batch_size,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            window_blocks=window_blocks,
            block_rows=block_rows,
            lanes=lanes,
            last_batch=last_batch,
            transform=transform,
            columns=columns,
            include_ids=include_ids,
            on_error=on_error,
            max_errors=max_errors,
            ragged=ragged,
            pad_value=pad_value,
            rank=rank,
            world_size=world_size,
            follow=follow,
            run=run,
        )
        self.dataset = dataset
        # Both are read at the start of each iteration, so that a new epoch or a restored position
        # reaches persistent workers.
        self._shared = torch.zeros(4, dtype=torch.int64).share_memory_()
        self._turns = Turns()
        self._reached: list[int] | None = None
        """``_position`` of the batch that this process handed out last, without workers."""
        self._plan: Reporter | None = None
        self._planned_for: Reading | None = None
        following = self._source.following
        num_datasets = 0 if following is None else following.num_datasets
        self._begun = Begun(num_datasets)
        """What the parent restored, for workers."""
        self._taken = Begun(num_datasets)
        """What an iteration reads, for the parent to report."""
        self._include_times = include_times
        habits = habits_of(dataset, columns, shuffle)
        self._sums = SharedSums(self._source.name, self._source.max_errors, habits)

    def __len__(self) -> int:
        """Steps of a whole epoch, on every rank. TypeError with ``follow="latest"``."""
        self._source.check_length()
        return self._source.cut(0, self._turns.place[0]).num_steps

    def __iter__(self) -> Pass:
        """A pass over the next epoch, or over what is left of the one it was told to stand in."""
        refuse_accelerate(self, sys.modules)
        self._source.bind()
        worker = torch.utils.data.get_worker_info()
        self._take_versions()
        if worker is None:
            place = self._turns.take(self._has_rest)
        else:
            self._shared[_WORKERS_READ] = 1
            place = self._turns.agree(worker.id, worker.seed - worker.id, self._has_rest)
        identities = self._source.identities_of(place[0])  # decided here: the pass has begun
        if worker is not None and worker.id == 0:
            self._taken.tell(place[0], identities)
        return Pass(self, place, *((0, 1) if worker is None else (worker.id, worker.num_workers)))

    def _has_rest(self, position: int) -> bool:
        return position == 0 or not self._source.cut(position, self._turns.place[0]).is_over

    def _read(
        self, place: tuple[int, int], first: int, every: int
    ) -> Iterator[tuple[Batch, tuple[int, int]]]:
        """The batches of the steps *first*, *first* + *every*, … of the pass that began at *place*,
        and where each one ends."""
        self._take_order()
        epoch, position = place
        cut, order = self._source.cut(position, epoch), self._source.order(epoch)
        worker = torch.utils.data.get_worker_info()
        number = None if worker is None else worker.id
        versions = as_numbers(self._source.identities_of(epoch))
        plan = self._planned(epoch) if not number else None
        is_planned = False
        for step in some_steps(cut, first, every):
            if plan is not None and not is_planned:
                plan.stand(epoch, cut.bounds(step)[0])
                is_planned = True
            read = self._source.read(order, cut, step)
            self._sums.book(read, number)
            batch = read.batch
            if self._include_times:
                batch["_times"] = read.times
            after = cut.bounds(step)[1]
            batch["_position"] = torch.tensor([epoch, after, *versions])
            if worker is None:
                self._reached = [epoch, after, *versions]
            if plan is not None:
                plan.stand(epoch, after)
            handed_out = time.perf_counter()
            yield batch, (epoch, after)
            self._sums.idle(time.perf_counter() - handed_out, number)
        if plan is not None and self._source.goes_on_with(self._planned_for, epoch + 1):
            plan.stand(epoch + 1, 0)

    def _went(self, epoch: int, identities: Sequence[str]) -> None:
        self._turns.went(epoch)
        self._tell_order()
        if torch.utils.data.get_worker_info() is not None:
            self._taken.tell(epoch, identities)

    def _take_versions(self) -> None:
        """Those of the state that the parent restored, if it did since."""
        following = self._source.following
        news = None if following is None else self._begun.news()
        if following is not None and news is not None:
            following.go_on_with(*news)

    def _tell_order(self) -> None:
        """Lanes and blocks of a state that was restored, to the parent and all workers."""
        self._shared[_LANES] = self._source.lanes
        self._shared[_WINDOW_BLOCKS], self._shared[_BLOCK_ROWS] = self._source.blocks

    def _take_order(self) -> None:
        """Those that were told, if they were: 0 says no."""
        self._source.take_blocks(*self._shared[[_WINDOW_BLOCKS, _BLOCK_ROWS]].tolist())
        lanes = int(self._shared[_LANES])
        if lanes and lanes != self._source.lanes:
            self._source.take_lanes(lanes)
            if self._plan is not None:
                self._plan.end()  # it tells another order
                self._plan = None

    def _planned(self, epoch: int) -> Reporter:
        """The plan of all workers of this rank: the first one tells it, as they read in turn."""
        reading = self._source.reading_of(epoch)
        if self._plan is not None and self._planned_for is not reading:
            self._plan.end()  # it tells another version
            self._plan = None
        if self._plan is None:
            self._plan = self._source.reporter(epoch)
            self._planned_for = reading
            self._plan.account(self._sums.told)
        self._source.plan = self._plan.plan
        return self._plan

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of *epoch*, in persistent workers too from their next iteration on."""
        if epoch < 0:
            raise InvalidRequest(f"epoch {epoch}: epochs count from 0")
        refuse_accelerate(self, sys.modules)  # it sets an epoch on all ranks before it reads
        self._stand_at(epoch, 0)

    def report(self) -> LoaderReport:
        """What all workers of this rank did since this dataset was made, and where their time went.

        Workers do not know how long the training loop waits: of them it says how busy they were
        (see ``covers``). Without workers it waits for all that is read. For all processes that got
        this dataset by fork, or with torch's workers.
        """
        epoch, _ = self._turns.place
        told, identities = self._taken.last
        reads = self._source.standing_on(epoch)[1]
        if told == epoch and identities and self._source.following is not None:
            with contextlib.suppress(ForebayError):  # it was deleted, or is being told just now
                reads = self._source.following.title_of(identities)
        return replace(self._sums.report(), reads=reads)

    def state_dict(self, after: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A few integers and names (JSON) that say: go on with the batch that follows *after*.

        Without *after*, where this process's own iteration stands; that raises InvalidRequest once
        workers read, because they run ahead of the training loop.
        """
        if after is not None:
            return self._state_after(_position_of(after))
        if torch.utils.data.get_worker_info() is not None:
            return {}  # torchdata asks the worker's copy: its pass knows
        if int(self._shared[_WORKERS_READ]):
            raise InvalidRequest(
                "workers read ahead of the training loop, so this process does not know what it "
                "consumed: pass the last batch, state_dict(after=batch)"
            )
        if self._reached is not None:
            return self._state_after(self._reached)
        return self._source.state(*self._turns.place)

    def _state_after(self, position: Sequence[int]) -> dict[str, Any]:
        """That of a batch's ``_position``."""
        epoch, after, *versions = position
        following = self._source.following
        num_versions = 0 if following is None else NUMBERS_EACH * following.num_datasets
        if len(versions) != num_versions:
            raise InvalidRequest(
                f"the batch's _position has {len(position)} numbers, this dataset's have "
                f"{2 + num_versions}: pass a batch that came from this dataset"
            )
        self._take_order()
        return self._source.state_of_begun(epoch, after, identities_of(versions))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where *state* was taken, on any ranks, workers and batch size. The state of a
        torchdata StatefulDataLoader around such a dataset will do, too.

        Raises InvalidRequest if it was taken on another dataset version, split, shuffle or seed.
        """
        if torch.utils.data.get_worker_info() is not None:
            return  # likewise
        check_is_state(state)
        place = self._source.restored(torchdata_state(state) or state)
        self._tell_order()
        self._begun.tell(place[0], self._source.identities_of(place[0]) if place[1] else [])
        self._stand_at(*place)

    def _stand_at(self, epoch: int, position: int) -> None:
        self._shared[_WORKERS_READ] = 0
        self._reached = None
        self._turns.stand(epoch, position)

    def __getstate__(self) -> dict[str, Any]:
        self._source.bind()  # a spawned worker knows nothing of torch.distributed
        return {**self.__dict__, "_plan": None, "_planned_for": None}


def _position_of(batch: Mapping[str, Any]) -> list[int]:
    position = batch.get("_position")
    if not isinstance(position, torch.Tensor) or position.ndim != 1 or len(position) < 2:
        raise InvalidRequest(
            "the batch carries no _position: pass one as it came from this dataset, read by a "
            "loader with batch_size=None"
        )
    numbers: list[int] = position.tolist()
    return numbers
