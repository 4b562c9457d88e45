"""What a run's metrics add up to. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Numbers over all attempts of a run."""

    num_steps: int
    """Optimizer steps, those that were rolled back included."""
    test_accuracy: float | None
    """After the last epoch, 0 to 1; None without validation."""
    samples_per_second: float
    """While stepping: starts and validation are not in it."""
    data_wait_share: float
    """Of the time of all steps but each attempt's first, 0 to 1, spent waiting for batches."""
    first_waits_seconds: tuple[float, ...]
    """For each attempt the wait for its first batch: the start of the loader."""
    num_saves: int
    stall_p50_seconds: float
    stall_p99_seconds: float


def summarise(events: Sequence[Event]) -> Summary:
    steps = [event for event in events if event["event"] == "step"]
    stalls = [event["stall_seconds"] for event in events if event["event"] == "save"]
    accuracies = [event["test_accuracy"] for event in events if event["event"] == "evaluation"]
    firsts = {step["attempt"]: step for step in reversed(steps)}
    later = [step for step in steps if step is not firsts[step["attempt"]]]
    seconds = sum(step["step_seconds"] for step in steps) or math.nan
    return Summary(
        num_steps=len(steps),
        test_accuracy=accuracies[-1] if accuracies else None,
        samples_per_second=sum(step["samples"] for step in steps) / seconds,
        data_wait_share=sum(step["data_wait_seconds"] for step in later)
        / (sum(step["step_seconds"] for step in later) or math.nan),
        first_waits_seconds=tuple(
            firsts[attempt]["data_wait_seconds"] for attempt in sorted(firsts)
        ),
        num_saves=len(stalls),
        stall_p50_seconds=percentile(stalls, 50),
        stall_p99_seconds=percentile(stalls, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all values do not exceed; NaN of none."""
    if not values:
        return math.nan
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(0, rank - 1)]
