"""What the workers of one rank book together: sums and bad samples in memory that they share."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.advice import Habits, PlanFit, Workload, advise
from forebay.dataset.batches import ReadBatch
from forebay.dataset.holes import ErrorBudget, table_size
from forebay.dataset.ledger import available_cpus, told
from forebay.dataset.report import LoaderReport
from forebay.stopwatch import CAUSES
from forebay_wire.ids import new_random_name

NUM_ROWS: Final = 64
"""Workers with a row of their own; further ones share, and may lose a batch's sums now and then."""

_SAMPLES, _BATCHES, _BYTES, _MASKED, _IDLE, _FELT, _FIRST_CAUSE = range(7)
_PLACES: Final = {cause: number for number, cause in enumerate(CAUSES, _FIRST_CAUSE)}


class SharedSums:
    """Of one StreamingDataset, in all its processes. A row has one writer at a time, mostly."""

    def __init__(self, where: str, max_errors: int, habits: Habits) -> None:
        """*where*: whose rows, for messages; *max_errors*: -1 if the first one raises."""
        self.name = new_random_name()
        self._where = where
        self._habits = habits
        self._max_errors = max_errors
        shape = (NUM_ROWS, len(_PLACES) + _FIRST_CAUSE)
        self._sums = torch.zeros(shape, dtype=torch.float64)
        self._sums.share_memory_()  # type: ignore[no-untyped-call]
        size = table_size(max_errors) if max_errors >= 0 else 0
        self._bad = torch.full((size,), -1, dtype=torch.int64)
        self._bad.share_memory_()  # type: ignore[no-untyped-call]

    def book(self, read: ReadBatch, worker: int | None) -> None:
        """A batch is about to be handed out by *worker*; None: in the training loop's process,
        which waited for all of it. TooManyBadSamples if its holes exceed the budget."""
        if read.holes:
            self._budget.spend(read.holes)
        row = self._row(worker)
        took = sum(read.times.values())
        row[: _FELT + 1] += (
            *(read.num_samples, 1, read.num_bytes, len(read.holes), 0.0),
            took if worker is None else 0.0,
        )
        for cause, seconds in read.times.items():
            row[_PLACES[cause]] += seconds

    def idle(self, seconds: float, worker: int | None) -> None:
        """Nobody asked *worker* for the next batch; without workers, the training loop computed."""
        self._row(worker)[_IDLE] += seconds

    def report(self, fit: PlanFit | None = None) -> LoaderReport:
        """The sums of all workers, and what they say; *fit*: what the daemon says of the plan."""
        table = self._sums.numpy().copy()
        sums = table.sum(axis=0)
        reading = {cause: float(sums[place]) for cause, place in _PLACES.items() if sums[place]}
        busy, idle, felt = sum(reading.values()), float(sums[_IDLE]), float(sums[_FELT])
        num_workers = int((table[:, _BATCHES] > 0).sum())
        is_felt = felt > 0.0
        seconds = busy + idle
        work = Workload(
            seconds,
            reading,
            busy,
            1 if is_felt else max(1, num_workers),
            available_cpus(),
            option="num_workers",
            whole="the step" if is_felt else "the workers' time",
            habits=self._habits,
        )
        return LoaderReport(
            samples=int(sums[_SAMPLES]),
            batches=int(sums[_BATCHES]),
            bytes_read=int(sums[_BYTES]),
            seconds=seconds / max(1, 1 if is_felt else num_workers),
            wait_seconds=felt,
            stalls=reading if is_felt else {},
            reading=reading,
            masked_samples=int(sums[_MASKED]),
            bad_samples=self._budget.rows if self._max_errors >= 0 else (),
            covers="" if is_felt else _covers(num_workers, busy, seconds),
            advice=advise(work, fit),
        )

    def told(self, fit: PlanFit) -> dict[str, Any]:
        """What the daemon is told."""
        return told(self.name, self.report(fit))

    @property
    def _budget(self) -> ErrorBudget:
        return ErrorBudget(self._max_errors, self._where, self._bad.numpy())

    def _row(self, worker: int | None) -> NDArray[np.float64]:
        row: NDArray[np.float64] = self._sums[(worker or 0) % NUM_ROWS].numpy()
        return row


def _covers(num_workers: int, busy: float, seconds: float) -> str:
    """What the figures of workers are."""
    if not seconds:
        return ""
    return (
        f"figures of {num_workers} workers, busy {busy / seconds * 100:.0f} % of their time; they "
        "do not know how long the training loop waited"
    )
