"""The run's measurements: events that rank 0 writes to every sink.

Each event has ``event``, ``time`` (Unix seconds), ``attempt`` and ``step``. Their other fields:

- ``start``: ``run``, ``step`` (restored, or 0), ``num_ranks``, ``num_epochs``,
  ``steps_per_epoch``, ``skipped`` (generations that could not be verified), ``energy_source``,
  ``peak_flops`` (of all ranks, a second), ``peak_flops_source``
- ``step``: ``epoch``, ``loss`` (mean over the global batch), ``samples`` and ``tokens``
  (of all ranks), ``learning_rate``, ``gradient_norm`` (before clipping),
  ``step_seconds`` (from the end of the step before to the end of this one),
  ``data_wait_seconds`` (of them, waiting for the batch; mean over the ranks),
  ``stall_seconds`` (of them, in the checkpointer; rank 0), ``samples_per_second``,
  ``tokens_per_second``, ``flops_utilisation`` (share of ``peak_flops``), ``rss_bytes`` (rank 0),
  ``gpu_peak_bytes`` (allocated in the step, rank 0), ``energy_joules`` (of all ranks since the
  step before), ``wire_bytes`` and ``wire_bytes_plain`` (where gradients are compressed: what rank 0
  sent of them, and would have sent without); a recipe with a step of its own adds its own values
- ``save``: ``stall_seconds`` (rank 0), ``energy_joules`` (since the save before: what a failure
  would have cost), ``stall_energy_joules`` (the step's mean power times the stall)
- ``evaluation``: ``epoch``, ``test_loss``, ``test_samples``, and ``test_…`` for each metric of the
  recipe
- ``epoch``: ``epoch``, and of the steps that this attempt took in it: ``steps``, ``seconds``,
  ``samples``, ``tokens``, ``mean_loss``, ``data_wait_seconds``, ``stall_seconds``,
  ``energy_joules``, ``wire_bytes``, ``wire_bytes_plain``
- ``end``: ``reason`` ("done", "stopped early" or "terminated"), and the same of the whole attempt

Figures of energy are left out where nobody knows them; ``energy_source`` stands beside each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import torch

from forebay_trainer.config import setting
from forebay_trainer.metrics.energy import Energy
from forebay_trainer.metrics.flops import Flops, peak
from forebay_trainer.metrics.meter import Meter
from forebay_wire.errors import InvalidRequest

Event = dict[str, Any]

NOT_PLOTTED: Final = ("event", "time", "attempt", "step")


class Sink(Protocol):
    """Where events go. Used from one thread, closed by its owner."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None: ...


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event that can be drawn over its step, by ``event/field``."""
    return {
        f"{event['event']}/{name}": value
        for name, value in event.items()
        if name not in NOT_PLOTTED
        and isinstance(value, int | float)
        and not isinstance(value, bool)
    }


class Metrics:
    """All sinks of this rank, none on any rank but the first; and its meter."""

    def __init__(self, sinks: Sequence[Sink], attempt: int, meter: Meter) -> None:
        self._sinks = sinks
        self._attempt = attempt
        self._meter = meter

    def joules(self) -> float:
        """That this rank answers for, since the last call; NaN if nobody knows. The sum over the
        ranks belongs into the event ``step``, as ``energy_joules``."""
        return self._meter.joules()

    def write(self, event: str, **values: Any) -> None:
        if not self._sinks:
            return
        line = {"event": event, "time": round(time.time(), 6), "attempt": self._attempt, **values}
        self._meter.add(line)
        for sink in self._sinks:
            sink.write(line)

    def close(self) -> None:
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    sinks: tuple[str, ...] = setting(
        ("console", "jsonl"),
        "where measurements go: console, jsonl, tensorboard, prometheus, wandb",
    )
    console_seconds: float = setting(
        0.0, "of console: at most one step's line in so many seconds; 0: every step"
    )
    port: int = setting(9470, "of prometheus, on 127.0.0.1; 0: any free one, which is printed")
    wandb_project: str = setting("forebay", "of wandb: the project that the run belongs to")
    wandb_mode: Literal["online", "offline"] = setting(
        "online", "of wandb; offline: files for `wandb sync`, without a network"
    )
    watts: float | None = setting(
        None, "power of a machine, for its energy where it has no counter; none: none is claimed"
    )
    peak_flops: float | None = setting(
        None, "of a rank, a second; none: of a GPU from a table, of a CPU measured at the start"
    )

    def __post_init__(self) -> None:
        from forebay_trainer.metrics.sinks import check

        for name in self.sinks:
            check(name)
        if not 0 <= self.port < 65536:
            raise InvalidRequest(f"port must be from 0 to 65535, not {self.port}")
        for name in ("watts", "peak_flops"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise InvalidRequest(f"{name} must be above 0, not {number}")

    def meter(
        self,
        flops: Flops,
        device: torch.device,
        precision: str,
        *,
        num_ranks: int,
        is_main: bool,
    ) -> Meter:
        """Starts to count energy, on every rank; measures a CPU on rank 0 alone."""
        return Meter(
            flops=flops,
            peak=peak(device, precision, self.peak_flops) if is_main and self.sinks else None,
            energy=Energy.open(device, self.watts),
            device=device,
            num_ranks=num_ranks,
        )

    def build(self, folder: Path, attempt: int, meter: Meter, *, is_main: bool) -> Metrics:
        """Opens the sinks, on rank 0 alone. InvalidRequest for one that cannot be opened."""
        from forebay_trainer.metrics.sinks import SINKS

        sinks: list[Sink] = []
        with ExitStack() as stack:
            for name in self.sinks if is_main else ():
                sinks.append(SINKS[name](self, folder, attempt))
                stack.callback(sinks[-1].close)
            stack.pop_all()
        return Metrics(sinks, attempt, meter)
