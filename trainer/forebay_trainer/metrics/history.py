"""A run as its events tell it, over all attempts: each step once, as it counts in the end. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forebay_wire.errors import NotFound

Event = Mapping[str, Any]

Point = tuple[float, float]


@dataclass(frozen=True)
class History:
    """Steps, saves and evaluations are in the order of their steps. What a resume took back is
    left out of them, but not out of what it cost."""

    run: str
    starts: Sequence[Event]
    """Of all attempts."""
    steps: Sequence[Event]
    saves: Sequence[Event]
    evaluations: Sequence[Event]
    num_taken: int
    """Steps that were taken, those included that were taken back."""
    joules: Mapping[str, float]
    """Of all that were taken, by the source of the figure."""

    @property
    def metrics(self) -> list[str]:
        """Names of what was evaluated, the loss and the count apart."""
        names = {name for event in self.evaluations for name in event if name.startswith("test_")}
        return sorted(names - {"test_loss", "test_samples"})

    def summary(self) -> list[tuple[str, str]]:
        """What the run comes to, as names and values to read."""
        seconds = [step["step_seconds"] for step in self.steps]
        total = sum(seconds) or 1.0
        wait = sum(step["data_wait_seconds"] for step in self.steps)
        stall = sum(step["stall_seconds"] for step in self.steps)
        rows = [
            ("attempts", f"{len(self.starts)}"),
            ("steps", f"{len(self.steps):,}"),
            ("steps taken again", f"{self.num_taken - len(self.steps):,}"),
            ("samples", f"{sum(step['samples'] for step in self.steps):,}"),
            ("time in steps", f"{sum(seconds):.1f} s"),
        ]
        if seconds:
            rows += [
                ("median step", f"{statistics.median(seconds) * 1e3:.1f} ms"),
                ("waiting for data", f"{wait:.2f} s, {wait / total:.2%}"),
                ("held up by checkpoints", f"{stall:.2f} s, {stall / total:.2%}"),
                ("last loss", f"{self.steps[-1]['loss']:.4f}"),
            ]
        shares = [each["flops_utilisation"] for each in self.steps if "flops_utilisation" in each]
        if shares:
            source = self.starts[-1].get("peak_flops_source", "")
            middle = f"{statistics.median(shares):.1%}"
            rows.append(("median FLOPs utilisation", f"{middle} (peak {source})"))
        for source, joules in self.joules.items():
            rows.append(("energy", f"{joules:,.0f} J ({source})"))
        return rows


def history(events: Iterable[Event], run: str | None = None) -> History:
    """*run*: of those that wrote into one file; by default the one that wrote last.

    Raises NotFound if the events tell of no such run.
    """
    lines = list(events)
    names = [line.get("run", "") for line in lines if line["event"] == "start"]
    if not names or (run is not None and run not in names):
        told = f"only {', '.join(dict.fromkeys(names))}" if names else "no start of any attempt"
        raise NotFound(f"no run {run or ''} in these metrics: they have {told}")
    wanted = names[-1] if run is None else run
    kept: dict[str, dict[int, Event]] = {"step": {}, "save": {}, "evaluation": {}}
    starts: list[Event] = []
    num_taken, joules, is_wanted = 0, dict[str, float](), False
    for line in lines:
        kind = line["event"]
        if kind == "start":
            is_wanted = line.get("run", "") == wanted
            if is_wanted:
                starts.append(line)
                for found in kept.values():
                    for step in [step for step in found if step > line["step"]]:
                        del found[step]
        elif is_wanted and kind in kept:
            kept[kind][line["step"]] = line
            num_taken += kind == "step"
            if kind == "step" and "energy_joules" in line:
                source = line.get("energy_source", "unknown")
                joules[source] = joules.get(source, 0.0) + line["energy_joules"]
    ordered = {kind: [found[step] for step in sorted(found)] for kind, found in kept.items()}
    return History(
        wanted,
        starts,
        ordered["step"],
        ordered["save"],
        ordered["evaluation"],
        num_taken,
        joules,
    )


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: of each stretch the lowest and the highest, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    found = []
    num_stretches = most // 2
    for number in range(num_stretches):
        first = len(points) * number // num_stretches
        stretch = points[first : len(points) * (number + 1) // num_stretches]
        lowest = min(stretch, key=lambda point: point[1])
        highest = max(stretch, key=lambda point: point[1])
        found += sorted({lowest, highest})
    return found
