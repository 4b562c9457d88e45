"""The energy that this rank answers for: its GPU, and on one rank of each machine the processors.

Where the machine has no counter that can be read, the power that `metrics.watts` states is taken,
times the time; without that, no energy is claimed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Protocol

import torch

POWERCAP: Final = Path("/sys/class/powercap")


class Counter(Protocol):
    """Counts up for as long as it is open. Used from one thread."""

    def joules(self) -> float:
        """Since the last call, or since it was opened."""
        ...

    def close(self) -> None: ...


def difference(before: int, now: int, largest: int) -> int:
    """How far a counter went that starts again at 0 behind *largest*, if it did so at most once."""
    return now - before if now >= before else largest - before + now


class Rapl:
    """One zone of the processors' own counters (RAPL), in ``/sys/class/powercap``: all that runs
    on the machine. A zone of 200 W starts again about every 20 minutes: read it more often."""

    def __init__(self, zone: Path) -> None:
        self._path = zone / "energy_uj"
        self._largest = int((zone / "max_energy_range_uj").read_text())
        self._last = self._read()

    @classmethod
    def zones(cls, powercap: Path = POWERCAP) -> list[Rapl]:
        """The packages of the machine and the memory beside them; nothing where they may not be
        read (as a rule only root may)."""
        found = []
        for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's have that name too
            try:
                name = (zone / "name").read_text().strip()
                # `core` and `uncore` lie within their package, `psys` has all of them in it.
                if name.startswith("package") or name == "dram":
                    found.append(cls(zone))
            except (OSError, ValueError):
                return []
        return found

    def _read(self) -> int:
        return int(self._path.read_text())

    def joules(self) -> float:
        now = self._read()
        found = difference(self._last, now, self._largest)
        self._last = now
        return found / 1e6

    def close(self) -> None:
        pass


class Nvml:
    """The counter of one NVIDIA GPU (Volta or newer): all that runs on it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._last = self._read()

    @classmethod
    def open(cls, device: torch.device) -> Nvml | None:
        """None without the package nvidia-ml-py, or where driver or GPU do not tell."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            # Not by number: CUDA counts only what CUDA_VISIBLE_DEVICES leaves, and in its order.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError:
            pynvml.nvmlShutdown()
            return None

    def _read(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def joules(self) -> float:
        now = self._read()
        found = (now - self._last) / 1e3
        self._last = now
        return found

    def close(self) -> None:
        self._nvml.nvmlShutdown()


class Stated:
    """Power that somebody stated, times the time."""

    def __init__(self, watts: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._watts = watts
        self._clock = clock
        self._last = clock()

    def joules(self) -> float:
        now = self._clock()
        found = self._watts * (now - self._last)
        self._last = now
        return found

    def close(self) -> None:
        pass


class Energy:
    """What the counters of this rank add up to; they are closed by `close`."""

    def __init__(self, counters: Sequence[Counter], source: str | None) -> None:
        """*source*: of the figures of all ranks; None if nobody knows any."""
        self.source = source
        self._counters = counters

    @classmethod
    def open(
        cls, device: torch.device, watts: float | None, *, powercap: Path = POWERCAP
    ) -> Energy:
        """*watts*: of a whole machine; used only where what computes has no counter."""
        gpu = Nvml.open(device) if device.type == "cuda" else None
        zones = Rapl.zones(powercap)
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of its machine
        processors: Sequence[Counter] = zones if is_first else []
        if gpu is not None:
            return cls([gpu, *processors], "nvml+rapl" if zones else "nvml")
        if watts is not None and (device.type == "cuda" or not zones):
            return cls([Stated(watts)] if is_first else [], f"stated: {watts:g} W a machine")
        return cls(processors, "rapl") if zones else cls([], None)

    def joules(self) -> float:
        """Of this rank since the last call; NaN if nobody knows."""
        if self.source is None:
            return math.nan
        return math.fsum(counter.joules() for counter in self._counters)

    def close(self) -> None:
        with ExitStack() as stack:
            for counter in self._counters:
                stack.callback(counter.close)
