"""The run's measurements: events that rank 0 writes to every sink.

Each event has ``event``, ``time`` (Unix seconds) and ``attempt``. Events and their other fields:

- ``start``: ``step`` (restored, or 0), ``num_ranks``, ``num_epochs``, ``steps_per_epoch``,
  ``skipped`` (generations that could not be verified)
- ``step``: ``step``, ``epoch``, ``loss`` (mean over the global batch), ``samples`` and ``tokens``
  (of all ranks), ``learning_rate``, ``gradient_norm`` (before clipping),
  ``step_seconds`` (from the end of the step before to the end of this one),
  ``data_wait_seconds`` (of them, waiting for the batch; mean over the ranks),
  ``stall_seconds`` (of them, in the checkpointer; rank 0); a recipe with a step of its own adds
  its own values
- ``save``: ``step``, ``stall_seconds`` (rank 0)
- ``evaluation``: ``epoch``, ``step``, ``test_loss``, ``test_samples``, and ``test_…`` for each
  metric of the recipe
- ``end``: ``step``, ``reason`` ("done", "stopped early" or "terminated")
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest

Event = dict[str, Any]


class Sink(Protocol):
    """Where events go. Used from one thread, closed by its owner."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """All sinks of this rank; none on any rank but the first."""

    def __init__(self, sinks: Sequence[Sink], attempt: int) -> None:
        self._sinks = sinks
        self._attempt = attempt

    def write(self, event: str, **values: Any) -> None:
        if not self._sinks:
            return
        line = {"event": event, "time": round(time.time(), 6), "attempt": self._attempt, **values}
        for sink in self._sinks:
            sink.write(line)

    def close(self) -> None:
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    sinks: tuple[str, ...] = setting(("jsonl",), "where measurements go: jsonl")

    def build(self, folder: Path, attempt: int, *, is_main: bool) -> Metrics:
        """Opens the sinks, on rank 0 alone. InvalidRequest for one that does not exist."""
        from forebay_trainer.metrics.sinks import SINKS

        for name in self.sinks:
            if name not in SINKS:
                raise InvalidRequest(f"metrics.sinks: {name!r} is none of {', '.join(SINKS)}")
        if not is_main:
            return Metrics([], attempt)
        return Metrics([SINKS[name](self, folder, attempt) for name in self.sinks], attempt)
