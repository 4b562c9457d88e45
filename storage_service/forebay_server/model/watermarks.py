"""When a tier must give space back, and what it still accepts until then.

Three fill levels of a tier: eviction starts above *high* and goes on until *low* is reached, so
that it runs rarely and for a while (hysteresis); above *stop* no cache fill is accepted. Writes
that must land (uploads, checkpoints) may use all usable bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Watermarks:
    """Fill levels as fractions of the usable bytes; 0 < *low* <= *high* <= *stop* <= 1."""

    low: float = 0.85
    high: float = 0.92
    stop: float = 0.97

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= self.stop <= 1:
            raise ValueError(
                f"watermarks low {self.low}, high {self.high}, stop {self.stop}: "
                "they must be fractions in ascending order, above 0 and at most 1"
            )

    @classmethod
    def parse(cls, text: str) -> Watermarks:
        """From percentages: ``85,92,97``. ValueError for anything else."""
        low, high, stop = (float(part) / 100 for part in text.split(","))
        return cls(low, high, stop)


@dataclass(frozen=True)
class WatermarkState:
    """What one step hands to the next."""

    is_evicting: bool = False


START: Final = WatermarkState()


@dataclass(frozen=True)
class Verdict:
    """What to do now, and the state for the next step."""

    state: WatermarkState
    evict_bytes: int
    """Give back so many; 0 unless evicting. Never more than the files that nobody has open."""
    fill_room_bytes: int
    """The largest cache fill that stays at or below *stop*."""
    write_room_bytes: int
    """The largest write that fits; evicting makes more room, but that takes time."""

    @property
    def admit_cache_fill(self) -> bool:
        return self.fill_room_bytes > 0

    @property
    def admit_writes(self) -> bool:
        return self.write_room_bytes > 0


def step(
    marks: Watermarks,
    state: WatermarkState,
    *,
    used_bytes: int,
    reserved_bytes: int,
    open_bytes: int,
    usable_bytes: int,
) -> Verdict:
    """Compare what a tier holds with its levels.

    *used_bytes*: published files. *reserved_bytes*: promised to uploads and fetches under way.
    *open_bytes*: the part of *used_bytes* that cannot go because clients have it open (or it is
    pinned or dirty). *usable_bytes*: what the tier may hold, the smaller of its limit and what the
    file system gives it.
    """
    taken = used_bytes + reserved_bytes
    low_bytes = math.floor(marks.low * usable_bytes)
    if taken > marks.high * usable_bytes:
        is_evicting = True
    else:
        is_evicting = state.is_evicting and taken > low_bytes
    movable = max(0, used_bytes - open_bytes)
    return Verdict(
        state=WatermarkState(is_evicting),
        evict_bytes=min(taken - low_bytes, movable) if is_evicting else 0,
        fill_room_bytes=max(0, math.floor(marks.stop * usable_bytes) - taken),
        write_room_bytes=max(0, usable_bytes - taken),
    )
