"""What a machine does while it trains: adds rates, memory and energy to the run's events."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from forebay_trainer.metrics.energy import Energy
from forebay_trainer.metrics.flops import Flops, Peak

STATM: Final = Path("/proc/self/statm")

SENT: Final = ("wire_bytes", "wire_bytes_plain")
"""Only there where gradients are compressed."""

SUMMED: Final = ("samples", "tokens", "step_seconds", "data_wait_seconds", "stall_seconds")


class Meter:
    """Of one rank; only the first one's sees events. Used from one thread, closed by its owner."""

    def __init__(
        self,
        *,
        flops: Flops,
        peak: Peak | None,
        energy: Energy,
        device: torch.device,
        num_ranks: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flops = flops
        self._peak = peak
        self._energy = energy
        self._device = device
        self._num_ranks = num_ranks
        self._sums: dict[str, dict[str, float]] = {
            "save": defaultdict(float),
            "epoch": defaultdict(float),
            "end": defaultdict(float),
        }
        self._clock = clock
        self._asked = clock()
        self._interval = math.nan
        self._watts = math.nan

    def joules(self) -> float:
        """That this rank answers for, since the last call; NaN if nobody knows."""
        now = self._clock()
        self._interval, self._asked = now - self._asked, now
        return self._energy.joules()

    def add(self, event: dict[str, Any]) -> None:
        """Adds what is known of it to an event that is about to be written."""
        kind = event["event"]
        if kind == "start":
            self._add_sources(event)
        elif kind == "step":
            self._add_rates(event)
        elif kind == "save":
            # The save is a part of the next step's energy, which is not known yet.
            event["stall_energy_joules"] = self._watts * event["stall_seconds"]
            event["energy_joules"] = self._take("save").get("energy_joules", math.nan)
        elif kind in ("epoch", "end"):
            event |= self._totals(kind)
        for name in ("energy_joules", "stall_energy_joules"):
            if math.isnan(event.get(name, 0.0)):  # of some rank nobody knows it
                del event[name]
        if "energy_joules" in event:
            event["energy_source"] = self._energy.source

    def _add_sources(self, event: dict[str, Any]) -> None:
        if self._energy.source is not None:
            event["energy_source"] = self._energy.source
        if self._peak is not None:
            event["peak_flops"] = self._peak.flops_per_second * self._num_ranks
            event["peak_flops_source"] = self._peak.source

    def _add_rates(self, event: dict[str, Any]) -> None:
        seconds = event["step_seconds"]
        self._watts = event.get("energy_joules", math.nan) / self._interval
        for sums in self._sums.values():
            for name in (*SUMMED, "energy_joules"):
                sums[name] += event.get(name, 0)
            for name in event.keys() & SENT:
                sums[name] += event[name]
            sums["losses"] += event["loss"]
            sums["steps"] += 1
        event["samples_per_second"] = event["samples"] / seconds
        if event["tokens"]:
            event["tokens_per_second"] = event["tokens"] / seconds
        if self._peak is not None:
            flops = self._flops(event["samples"], event["tokens"])
            possible = self._peak.flops_per_second * self._num_ranks * seconds
            event["flops_utilisation"] = flops / possible
        event |= memory(self._device)

    def _totals(self, kind: str) -> dict[str, Any]:
        sums = self._take(kind)
        found: dict[str, Any] = {"steps": int(sums["steps"])}
        if sums["steps"]:
            found["mean_loss"] = sums["losses"] / sums["steps"]
        for name in ("samples", "tokens"):
            found[name] = int(sums[name])
        found |= {name: int(sums[name]) for name in SENT if name in sums}
        names = {"step_seconds": "seconds"}
        for name in ("step_seconds", "data_wait_seconds", "stall_seconds", "energy_joules"):
            found[names.get(name, name)] = sums[name]
        return found

    def _take(self, kind: str) -> dict[str, float]:
        """What was added up since the last event of that kind."""
        sums = self._sums[kind]
        self._sums[kind] = defaultdict(float)
        return sums

    def close(self) -> None:
        self._energy.close()


def memory(device: torch.device) -> dict[str, int]:
    """``rss_bytes`` of this process now; ``gpu_peak_bytes`` since the last call."""
    found = {}
    if STATM.exists():
        found["rss_bytes"] = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return found
