"""The run's measurements as JSON lines, written by rank 0, one file for all attempts.

Each line has ``event``, ``time`` (Unix seconds) and ``attempt``. Events and their other fields:

- ``start``: ``step`` (restored, or 0), ``num_ranks``, ``num_epochs``, ``steps_per_epoch``,
  ``skipped`` (generations that could not be verified)
- ``step``: ``step``, ``epoch``, ``loss`` (mean over the global batch), ``samples`` (of all ranks),
  ``learning_rate``, ``step_seconds`` (from the end of the step before to the end of this one),
  ``data_wait_seconds`` (of them, waiting for the batch; mean over the ranks),
  ``stall_seconds`` (of them, in the checkpointer; rank 0)
- ``save``: ``step``, ``stall_seconds`` (rank 0)
- ``epoch``: ``epoch``, ``step``, ``test_accuracy`` (0 to 1), ``test_loss``, ``test_samples``
- ``end``: ``step``, ``reason`` ("done" or "terminated")
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, Any, Self


class MetricsWriter:
    """Appends lines to one file; used from one thread, closed by its owner."""

    def __init__(self, file: IO[str], attempt: int) -> None:
        self._file = file
        self._attempt = attempt

    @classmethod
    def open(cls, path: Path, attempt: int) -> Self:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _end_torn_line(path)
        return cls(path.open("a", buffering=1, encoding="utf-8"), attempt)

    def write(self, event: str, **values: Any) -> None:
        line = {"event": event, "time": round(time.time(), 6), "attempt": self._attempt, **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class NullMetrics(MetricsWriter):
    """What the other ranks have: it writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, event: str, **values: Any) -> None:
        pass

    def close(self) -> None:
        pass


def _end_torn_line(path: Path) -> None:
    """Cuts off a last line that a killed attempt left incomplete."""
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
