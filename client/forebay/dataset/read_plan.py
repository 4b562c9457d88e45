"""The plan of a reader that has an order of its own: which rows it reads next, and where it is."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from numpy.typing import NDArray

from forebay.dataset.heartbeat import Heartbeat
from forebay.dataset.row_runs import Run, RunsAhead
from forebay.plans import PlanCalls
from forebay.transfer.wanted import reading_for
from forebay_wire.blocks import starts_of
from forebay_wire.closing import Closing
from forebay_wire.errors import ForebayError, InvalidRequest
from forebay_wire.ids import new_random_name

if TYPE_CHECKING:
    from forebay._channel import RpcChannel
    from forebay.dataset.dataset import Dataset

PAGE_RUNS: Final = 1 << 13
"""Runs that one message tells: some 600 KB."""


@dataclass
class _Told:
    """What the reader's thread and the sending one share. Knows nothing of the plan's owner."""

    calls: PlanCalls
    reader: str
    manifest: str
    blobs: Sequence[Sequence[str]]
    """All that are read together, of each stretch of rows that runs are of."""
    ahead: RunsAhead
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of *ahead*; never held while anything is waited for."""
    problem: str = ""
    stop: int | None = None
    """The position after what the daemon knows; None: it knows no such plan. This and the next two
    are the sender's."""
    position: int = 0
    page: int = 0

    def tell(self, *, wait_for_daemon: bool = False) -> None:
        """Tell the daemon where the reader stands, and all that it does not know yet."""
        try:
            while self._tell_page(wait_for_daemon):
                pass
        except BaseException:
            self.stop = None  # it forgot the plan, or who knows what it got: all is told anew
            raise
        self.problem = ""

    def failed(self, error: ForebayError | ValueError) -> None:
        self.problem = str(error)

    def _tell_page(self, wait_for_daemon: bool) -> bool:
        """Whether there is more to tell."""
        with self.lock:
            position = self.ahead.position
            is_new = self.stop is None or position > self.stop
            after = position if is_new or self.stop is None else self.stop
            untold: Iterator[Run] = iter(())
            if after < self.ahead.stop:
                untold = (run for run in self.ahead.runs if run.stop > after)
            runs = list(islice(untold, PAGE_RUNS))
        if is_new:
            self.calls.register(
                self.reader, self.manifest, position, wait_for_daemon=wait_for_daemon
            )
            self.page = 0
        elif position > self.position or not runs:
            self.calls.advance(position)
        self.position, self.stop = position, after
        if not runs:
            return False
        ranges = ((self.blobs[run.shard], run.stop - max(run.start, after)) for run in runs)
        self.calls.add_ranges(self.page, ranges)
        self.page, self.stop = self.page + 1, runs[-1].stop
        return len(runs) == PAGE_RUNS


def _stretches(
    dataset: Dataset, columns: Sequence[str] | None
) -> tuple[NDArray[np.int64], Sequence[Sequence[str]]]:
    """The first rows of the longest stretches of which each of *columns* lies in one shard (and,
    last, the number of rows), and the blobs of each."""
    manifest = dataset.manifest
    if not manifest.layers:
        return dataset.shard_starts, [(shard.blob,) for shard in manifest.shards]
    names = [column.name for column in dataset.columns(columns)]
    places = [manifest.column_shards(layer).shards for layer in manifest.layers_of(names)]
    each = [starts_of([shard.num_rows for shard in shards]) for shards in places]
    starts = np.unique(np.concatenate(each))
    found = [
        [shards[one].blob for one in np.searchsorted(own, starts[:-1], side="right") - 1]
        for shards, own in zip(places, each, strict=True)
    ]
    return starts, list(zip(*found, strict=True))


class ReadPlan(Closing):
    """What :meth:`forebay.Dataset.plan` returns: tells the daemon what is read next.

    Advice, on which nothing depends but speed: after the start no method waits for the daemon, or
    raises what it says (see :attr:`problem`). A daemon that was restarted is told again.

    Not thread-safe; belongs to the process that made it, and owns a thread there, which also says
    that a slow reader lives. Close it, or use it in a ``with``: what the ``with`` block's thread
    reads counts as read for this plan. One nobody refers to any more closes itself, and the plan
    of a process that died ends half a minute later.
    """

    def __init__(self, plan: str, told: _Told) -> None:
        """Registers the plan and tells its first rows."""
        self.plan = plan
        """The plan's random name."""
        self._told = told
        self._pid = os.getpid()
        self._reading: contextlib.AbstractContextManager[None] | None = None
        self._look_ahead()
        told.tell(wait_for_daemon=True)
        self._heartbeat = Heartbeat("forebay-read-plan", told.tell, told.failed, told.calls.end)

    @classmethod
    def start(
        cls,
        dataset: Dataset,
        channel: RpcChannel,
        indices: Iterable[int],
        name: str | None,
        columns: Sequence[str] | None,
    ) -> Self:
        """Register the plan and tell its first rows: see :meth:`forebay.Dataset.plan`."""
        plan = new_random_name()
        split = f" split {dataset.split}" if dataset.split else ""
        reader = name or f"{dataset.name} v{dataset.version}{split}, pid {os.getpid()}"
        starts, blobs = _stretches(dataset, columns)
        ahead = RunsAhead(dataset, starts, indices)
        told = _Told(PlanCalls(channel, plan), reader, dataset.manifest_id, blobs, ahead)
        return cls(plan, told)

    @property
    def position(self) -> int:
        """Rows that were read."""
        return self._told.ahead.position

    @property
    def problem(self) -> str:
        """Why the daemon has no plan now, if so: reading goes on without one, only slower."""
        return self._told.problem

    def advance(self, position: int) -> None:
        """The first *position* rows of the plan were read: counted from its start, not from the
        last call. Takes more of the iterable if need be, and raises what that raises.

        InvalidRequest for a position before the last one, which stays, or beyond the end;
        IndexError for a row ahead that the dataset does not have.
        """
        told, ahead = self._told, self._told.ahead
        self._check_open()
        if position < ahead.position:
            raise InvalidRequest(
                f"the plan stands at position {ahead.position} and cannot go back to {position}: "
                "make another plan to read from there"
            )
        while position > ahead.stop and not ahead.is_whole:
            self._take(ahead.stop)
        if position > ahead.stop:
            raise InvalidRequest(
                f"position {position} is beyond the end of the plan, which has {ahead.stop} rows"
            )
        with told.lock:
            ahead.skip_to(position)
        self._look_ahead()
        self._heartbeat.beat()

    def __iter__(self) -> Iterator[int]:
        """The rows from the position on; one counts as read when the next one is asked for."""
        while (row := self._told.ahead.row()) is not None:
            yield row
            self.advance(self.position + 1)

    def close(self) -> None:
        """End the plan. Idempotent."""
        if self._reading is not None:
            reading, self._reading = self._reading, None
            with contextlib.suppress(ValueError):  # of a thread that is not that of the start
                reading.__exit__(None, None, None)
        self._heartbeat.stop()

    def __enter__(self) -> Self:
        self._check_open()
        self._reading = reading_for(self.plan)
        self._reading.__enter__()
        return self

    def _check_open(self) -> None:
        if not self._heartbeat.is_ours:
            raise InvalidRequest(
                f"this plan belongs to process {self._pid}: advance it there, with what its "
                "workers have read"
            )
        if self._heartbeat.is_over:
            raise InvalidRequest("this plan is closed: make a new one")

    def _look_ahead(self) -> None:
        while self._told.ahead.has_room():
            self._take(self.position)

    def _take(self, position: int) -> None:
        """Know a chunk more; all before *position* may be forgotten."""
        told = self._told
        numbers, runs = told.ahead.take()  # the reader's code: without the lock
        with told.lock:
            told.ahead.append(numbers, runs)
            told.ahead.skip_to(position)
