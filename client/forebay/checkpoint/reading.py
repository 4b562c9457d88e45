"""Many reads of blobs at once: in order, ahead of need, by several threads, through warm memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch

from forebay.transfer import Blob
from forebay.transfer.window import POOL
from forebay_wire.limits import MIB

PIECE_BYTES: Final = 16 * MIB
"""About how much one thread reads in one go."""

AHEAD: Final = 8
"""So many goes ahead the kernel is asked to fetch what is not in its cache yet."""

MAX_THREADS: Final = 8
"""More do not make memory faster."""

MIN_PARALLEL_BYTES: Final = 8 * MIB
"""Below this, threads cost more than they save."""


class Warm:
    """One thread's memory for bytes that cannot go straight to their place."""

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event | None] = []
        self._next = 0

    def lend(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """*num_bytes* of memory used before, until the next call but one."""
        if device.type != "cuda":
            return torch.frombuffer(POOL.lend(num_bytes), dtype=torch.uint8)
        # Two in turn: while one is copied to the device, the other is filled.
        self._next = 1 - self._next
        if not self._pinned:
            nothing = torch.empty(0, dtype=torch.uint8)
            self._pinned, self._copied = [nothing, nothing], [None, None]
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        if self._pinned[self._next].numel() < num_bytes:
            self._pinned[self._next] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[self._next][:num_bytes]

    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """*source*, which lies in the memory lent last, to its *place*."""
        if place.device.type != "cuda":
            place.copy_(source)
            return
        with torch.cuda.device(place.device):
            place.copy_(source, non_blocking=True)
            self._copied[self._next] = torch.cuda.Event()
            self._copied[self._next].record()  # type: ignore[union-attr]

    def finish(self) -> None:
        """Return when everything has arrived."""
        for copied in self._copied:
            if copied is not None:
                copied.synchronize()


@dataclass(frozen=True)
class Reading:
    """Bytes of one blob on their way into (a part of) one tensor."""

    blob: Blob
    offset: int
    num_bytes: int
    act: Callable[[Warm], None]


def run(readings: Sequence[Reading]) -> None:
    """Carry out *readings*, which follow each other in their blobs; all of them, or an exception.

    Then some may not have been carried out, and none is under way any more.
    """
    tasks = _tasks(readings)
    total = sum(reading.num_bytes for reading in readings)
    num_threads = min(num_readers(), len(tasks)) if total >= MIN_PARALLEL_BYTES else 1
    for task in tasks[:AHEAD]:
        _fetch(task)
    if num_threads <= 1:
        warm = Warm()
        for number in range(len(tasks)):
            _carry_out(tasks, number, warm)
        warm.finish()
        return
    own = threading.local()
    all_warm: list[Warm] = []

    def one(number: int) -> None:
        if not hasattr(own, "warm"):
            own.warm = Warm()
            all_warm.append(own.warm)
        _carry_out(tasks, number, own.warm)

    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="forebay-restore")
    try:
        for future in [executor.submit(one, number) for number in range(len(tasks))]:
            future.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for warm in all_warm:
            warm.finish()


def num_readers() -> int:
    """Threads of this process that read at once: the ranks of a node share its cores."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(MAX_THREADS, cores // max(1, int(ranks) if ranks.isdecimal() else 1)))


def _tasks(readings: Sequence[Reading]) -> list[list[Reading]]:
    """Neighbours together, so that a segment they share is mostly read once."""
    tasks: list[list[Reading]] = []
    room = 0
    for reading in readings:
        if room <= 0:
            tasks.append([])
            room = PIECE_BYTES
        tasks[-1].append(reading)
        room -= reading.num_bytes
    return tasks


def _carry_out(tasks: Sequence[Sequence[Reading]], number: int, warm: Warm) -> None:
    if number + AHEAD < len(tasks):
        _fetch(tasks[number + AHEAD])
    for reading in tasks[number]:
        reading.act(warm)


def _fetch(task: Sequence[Reading]) -> None:
    """Have the kernel fetch what *task* reads, neighbours in one go."""
    start = stop = 0
    blob: Blob | None = None
    for reading in task:
        if reading.blob is blob and start <= reading.offset <= stop + MIB:
            stop = max(stop, reading.offset + reading.num_bytes)
            continue
        if blob is not None:
            blob.will_read(start, stop - start)
        blob, start, stop = reading.blob, reading.offset, reading.offset + reading.num_bytes
    if blob is not None:
        blob.will_read(start, stop - start)
