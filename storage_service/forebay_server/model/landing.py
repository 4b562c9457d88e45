"""Which tier takes new bytes, and which copy serves a read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_READ_ORDER: Final = {"ssd": 0, "hdd": 1, "object": 2}
"""Tier kind to preference."""


@dataclass(frozen=True)
class Room:
    """What a landing tier has free, in bytes."""

    tier: str
    free_bytes: int


def choose_landing(num_bytes: int, rooms: Sequence[Room]) -> tuple[str, ...]:
    """The tiers that have room for a file of *num_bytes*, in the order of *rooms* (best first).

    Several, because room may be gone when it is asked for; empty: no tier has it.
    """
    return tuple(room.tier for room in rooms if room.free_bytes >= num_bytes)


def reading_order(kinds: Sequence[str]) -> list[int]:
    """Indices of copies in tiers of these *kinds*, the one to read first at the front."""
    return sorted(range(len(kinds)), key=lambda index: _READ_ORDER[kinds[index]])
