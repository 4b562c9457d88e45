"""The loader of a training loop: exact order, prefetched by threads, resumable at any batch."""

from __future__ import annotations

import itertools
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import torch

from forebay.dataset.batches import BatchSource, ReadBatch, bytes_of
from forebay.dataset.cache import limit_fetched_bytes
from forebay.dataset.ledger import Ledger, batch_times, habits_of
from forebay.dataset.passes import refuse_lightning
from forebay.dataset.reading import Readable, Reading, Reporter, Steps
from forebay.dataset.report import BatchTimes, LoaderReport
from forebay.dataset.states import check_is_state
from forebay.dataset.transforms import Batch, Transform
from forebay_wire.closing import Closing
from forebay_wire.errors import InvalidRequest
from forebay_wire.limits import GIB, MIB

MEMORY_BUDGET: Final = 2 * GIB
"""Of a loader that was given none."""

SMALLEST_BUDGET: Final = 16 * MIB
"""However many batches are asked for, about so many bytes are prefetched."""


class DataLoader(Closing):
    """Batches of a dataset, a ``Mixture`` or ``Packed`` windows in exact order, cut over the ranks.

    Global batch k is the samples at the positions [k·B, (k+1)·B) of the epoch's order, whatever the
    ranks, threads or interruptions. Batches are plain dicts: a tensor ``(rows, *shape)`` for each
    column, a list for text, bytes and (see *ragged*) lists. Several iterations may run at once:
    each goes its own way from where the loader stood when it was asked for, and the loader stands
    where the one that began last stands. Not thread-safe otherwise. It owns threads: ``close()``
    ends them, and so does forgetting the loader.

    Exactly one of *global_batch_size* (all ranks) and *batch_size* (each rank).

    *shuffle* is "none", "full" (a new permutation each epoch, by *seed*) or "block": blocks of
    *block_rows* rows (default: the shards) in a new order each epoch, their rows mixed within
    windows of *window_blocks* (default: 16), so that few shards are read at a time. *lanes*
    (default: the number of nodes at the first start; the state keeps it) share out its blocks:
    a node reads the blocks of its lanes alone where L, the ranks and the batch divide; the
    samples of a batch then come lane by lane. *last_batch*:
    "keep" (shorter; a rank may get an empty part), "pad" (all parts full, ``_mask`` is False
    where rows repeat), "drop". *transform* turns a batch into a batch, in the
    *num_threads* prefetch threads (0: in the caller's); with a second argument it gets a
    ``numpy.random.Generator`` seeded by the seed, the epoch and the batch's rows; several come
    as a list; ``forebay.per_sample`` makes one of what treats a sample, and
    ``forebay.transforms`` has ready-made ones. *device* is where
    tensors are put. *include_ids* adds ``_ids``: rows of the version; *include_times*
    ``_times``: see :attr:`last_batch_times`.

    *memory_budget* bounds the bytes that are held: a half is for batches, so that fewer than
    *prefetch_batches* are read ahead where they are large (one at least, by the size of those
    that came), the other half for record batches that came over HTTP, of all loaders of the
    process together: the smallest budget counts. Mapped files are the page cache's and no part
    of it.

    *ragged* says what becomes of columns of lists of numbers: "list" (a list of tensors), "pad"
    (one tensor, *pad_value* behind the shorter ones, with an int64 tensor ``<name>_lengths``)
    or "nested" (torch's jagged layout). A missing list is None in a list and else empty.

    *on_error* "mask": a sample that cannot be read (or transformed, by itself) is a hole, zeros
    or None, and ``_mask``, which all batches have then, is False there. Holes are never filled
    by other samples, and change neither order nor state. More than *max_errors* (default: 100)
    different samples in the life of the loader, on this rank, raise TooManyBadSamples.

    *follow* "latest": each new epoch reads the newest version of the dataset (that has the split),
    as it is when the first rank begins it; all ranks read the same one. An epoch that runs, or is
    restored, stays on its version. Ranks that share no torch.distributed agree by the name *run*,
    the same on all of them and another one for each training from the beginning.

    *rank* and *world_size* default to torch.distributed's, then the environment's, at the
    first iteration.
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
        num_threads: int = 2,
        prefetch_batches: int = 4,
        memory_budget: int = MEMORY_BUDGET,
        transform: Transform | Sequence[Transform] | None = None,
        device: torch.device | str | None = None,
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
        if num_threads < 0 or prefetch_batches < 1:
            raise InvalidRequest("num_threads is at least 0, prefetch_batches at least 1")
        self._num_threads = num_threads
        self._prefetch_batches = prefetch_batches
        if memory_budget < SMALLEST_BUDGET:
            raise InvalidRequest(
                f"memory_budget={memory_budget}: at least {SMALLEST_BUDGET} bytes, of which a half "
                "is for batches"
            )
        self._batch_bytes = memory_budget // 2
        limit_fetched_bytes(memory_budget // 2)
        self._device = None if device is None else torch.device(device)
        self._include_times = include_times
        habits = habits_of(dataset, columns, shuffle)
        self._ledger = Ledger(self._source.name, self._source.max_errors, num_threads, habits)
        self._threads: tuple[int, ThreadPoolExecutor] | None = None
        self._epoch = 0
        self._position = 0
        self._turn = 0
        self._leader: object = None
        """Of the iterations that run, the one that moves the loader."""
        self._closed = False
        self._num_epochs = 0
        self._plan: Reporter | None = None
        self._planned_for: Reading | None = None

    @property
    def dataset(self) -> Readable:
        """What the current epoch is read from; before that begins, the last one."""
        return self._source.standing_on(self._epoch)[0]

    def __len__(self) -> int:
        """Steps of a whole epoch, on every rank. TypeError with ``follow="latest"``."""
        self._source.check_length()
        return self._source.cut(0, self._epoch).num_steps

    def epochs(self, num_epochs: int) -> Iterator[Epoch]:
        """The epochs that are left of *num_epochs* in all, counted from epoch 0.

        The first one goes on where the loader stands; one that is left early counts as done.
        """
        if self._plan is not None and self._num_epochs != num_epochs:
            self._plan.end()
            self._plan = None
        self._num_epochs = num_epochs
        while self._epoch < num_epochs:
            number = self._epoch
            yield Epoch(self, number)
            if self._epoch == number:
                self._start_epoch(number + 1, 0)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; if nothing is left of it, the next one."""
        self._source.bind()
        if self._position and self._source.cut(self._position, self._epoch).is_over:
            self._stand(self._epoch + 1, 0)
        return self._rest()

    def _rest(self) -> Iterator[Batch]:
        """The rest of the current epoch, even if that is nothing."""
        self._source.bind()
        return self._batches(self._epoch, self._position, self._turn)

    # Where it stands.

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Stand at the start of *epoch*."""
        if epoch < 0:
            raise InvalidRequest(f"epoch {epoch}: epochs count from 0")
        self._start_epoch(epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """A few integers and names (JSON) that say: go on after the batch handed out last.

        O(1), the same on all ranks; batches that were only prefetched do not count.
        """
        if self._source.following is not None and self._position:
            is_over = self._source.cut(self._position, self._epoch).is_over
            refuse_lightning(sys._getframe(1).f_globals.get("__name__", ""), is_over)
        return self._source.state(self._epoch, self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where *state* was taken, on any number of ranks and with any batch size.

        Raises InvalidRequest if it was taken on another dataset version, split, shuffle or seed.
        """
        check_is_state(state)
        lanes = self._source.lanes
        place = self._source.restored(state)
        if self._source.lanes != lanes and self._plan is not None:
            self._plan.end()  # it tells another order
            self._plan = None
        self._start_epoch(*place)

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._turn += 1  # an iterator that still runs stops with an error instead of mixing epochs
        self._leader = None
        self._stand(epoch, position)

    def _stand(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        if self._plan is not None and self._source.goes_on_with(self._planned_for, epoch):
            self._plan.stand(epoch, position)

    def remaining_steps(self) -> int:
        """Steps to the end of the current epoch."""
        return self._source.cut(self._position, self._epoch).num_steps

    # Reading.

    def report(self) -> LoaderReport:
        """Samples/s, how long was waited for data and for what, and more; for this rank."""
        report = self._ledger.report(None if self._plan is None else self._plan.news)
        return replace(report, reads=self._source.standing_on(self._epoch)[1])

    @property
    def last_batch_times(self) -> BatchTimes:
        """Where the time of the batch went that was handed out last."""
        return self._ledger.last

    def _batches(self, epoch: int, position: int, turn: int) -> Iterator[Batch]:
        self._check_turn(turn)
        self._leader = me = object()  # who began last moves the loader
        plan = self._planned()
        cut = self._source.cut(position, epoch)
        batches = self._prefetched(epoch, cut)
        self._ledger.start_epoch(epoch)
        try:
            for step in cut.steps():
                asked = time.perf_counter()
                read = next(batches)
                loaded = 0.0 if self._device is None else time.perf_counter()
                batch, after = self._on_device(read.batch), cut.bounds(step)[1]
                handed_out = self._ledger.hand_out(read, asked, loaded, after)
                if self._include_times:
                    batch["_times"] = batch_times(self._ledger.last)
                if self._leader is me:
                    self._position = after
                    plan.stand(epoch, after)
                yield batch
                self._ledger.computed(time.perf_counter() - handed_out)
                self._check_turn(turn)
            if self._leader is me:
                self._stand(epoch + 1, 0)
        finally:
            batches.close()

    def _planned(self) -> Reporter:
        """The plan that the daemon has of this loader, standing where it stands."""
        reading = self._source.reading_of(self._epoch)
        if self._plan is not None and self._planned_for is not reading:
            self._plan.end()  # it tells another version
            self._plan = None
        if self._plan is None:
            self._plan = self._source.reporter(self._epoch, self._num_epochs)
            self._planned_for = reading
        self._plan.account(self._ledger.told)
        self._plan.stand(self._epoch, self._position)
        self._source.plan = self._plan.plan
        return self._plan

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise InvalidRequest(
                "this iteration is over: a state was loaded, an epoch was set or the loader was "
                "closed; iterate the loader anew"
            )

    def _prefetched(self, epoch: int, cut: Steps) -> Any:
        """A generator of the steps of *cut*, read ahead in threads, in order."""
        order = self._source.order(epoch)
        if self._num_threads == 0:
            for step in cut.steps():
                yield self._source.read(order, cut, step)
            return
        size, is_known = max(1, self._source.average_batch_bytes), False
        pool = self._pool()
        pending: deque[Future[ReadBatch]] = deque()
        read = _read_pinned if self._pins else _read
        try:
            steps = iter(cut.steps())
            while True:
                room = self._batch_bytes // size - 1  # beside the one that is being used
                if not is_known:  # a transform may make them many times as large
                    room = min(room, self._num_threads)
                ahead = max(1, min(self._prefetch_batches, room))
                for later in itertools.islice(steps, max(0, ahead - len(pending))):
                    pending.append(pool.submit(read, self._source, order, cut, later))
                if not pending:
                    return
                found = [pending.popleft().result()]
                size, is_known = max(size, sum(map(bytes_of, found[0].batch.values()))), True
                yield found.pop()  # and holds it no longer
        finally:
            for future in pending:
                future.cancel()

    @property
    def _pins(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the wanted device; from pinned memory the copy runs beside the caller."""
        if self._device is None:
            return batch
        return {
            name: value.to(self._device, non_blocking=True)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in batch.items()
        }

    # Threads.

    def _pool(self) -> ThreadPoolExecutor:
        if self._closed:
            raise InvalidRequest("this loader is closed: make a new one")
        pid = os.getpid()
        if self._threads is None or self._threads[0] != pid:  # threads do not survive a fork
            pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="forebay-load")
            weakref.finalize(self, _end_pool, pool, pid).atexit = False
            self._threads = (pid, pool)
        return self._threads[1]

    def close(self) -> None:
        """End the threads, and with them a running iteration. Idempotent."""
        self._closed = True
        self._turn += 1
        if self._plan is not None:
            self._plan.end()
        if self._threads is not None and self._threads[0] == os.getpid():
            self._threads[1].shutdown(wait=True, cancel_futures=True)
        self._threads = None


class Epoch:
    """One epoch of a loader, or what is left of it: iterate it once."""

    def __init__(self, loader: DataLoader, number: int) -> None:
        self._loader = loader
        self.number = number
        """Counted from 0."""

    def __len__(self) -> int:
        """Steps that are left, on every rank."""
        return self._loader.remaining_steps() if self._loader.epoch == self.number else 0

    def __iter__(self) -> Iterator[Batch]:
        if self._loader.epoch != self.number:
            raise InvalidRequest(
                f"epoch {self.number} is over, the loader stands in epoch {self._loader.epoch}"
            )
        return self._loader._rest()


def _read(source: BatchSource, *what: Any) -> ReadBatch:
    return source.read(*what)


def _read_pinned(source: BatchSource, *what: Any) -> ReadBatch:
    found = source.read(*what)
    found.batch = {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in found.batch.items()
    }
    began, found.finished = found.finished, time.perf_counter()
    found.times["copy"] = found.times.get("copy", 0.0) + found.finished - began
    return found


def _end_pool(pool: ThreadPoolExecutor, pid: int) -> None:
    if os.getpid() == pid:
        pool.shutdown(wait=False, cancel_futures=True)
