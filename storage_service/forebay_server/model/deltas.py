"""When a segment is stored as its difference (XOR) from the same place of an older pack.

Weights of a few steps ago have most of their high bits in common with those of now: what is left
of the XOR shrinks further. To read one back the older segment is read, too, and what that stands
on; so it has to pay, and the chain is short.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from forebay_server.model.sharing import Division, Placed, Source
from forebay_wire.segments import SegmentTable

MAX_LAYERS: Final = 4
"""Stored segments that one is the XOR of, itself included. So every fourth one is whole: that saves
three quarters of what an endless chain would, and a restore reads at most 3.25 times as much as if
all were whole (see :data:`LARGEST_SHARE`)."""

LARGEST_SHARE: Final = 3 / 4
"""A difference has at most this share of what the segment takes by itself, by a sample of both:
above, less than a fifth of the room is saved in the end, for twice the reading."""


@dataclass(frozen=True)
class Base:
    """A pack of which segments lie in the tier, and may be what others are differences from."""

    blob: str
    places: Mapping[tuple[int, int], Placed]
    """``(offset, length)`` of a segment of the pack to where it lies."""

    def place(self, offset: int, num_bytes: int) -> Placed | None:
        """Where the segment lies that has this place in the pack, if it may be used."""
        return self.places.get((offset, num_bytes))


def base_of(blob: str, source: Source, usable: Collection[str]) -> Base:
    """What of pack *blob*, which lies as *source* says, others may be differences from: what lies
    in the files *usable*, where one more layer fits."""
    allowed = frozenset(usable)
    return Base(
        blob,
        {
            (offset, placed.num_bytes): placed
            for offset, _, placed in source.segments()
            if len(placed.below) + 1 < MAX_LAYERS and allowed.issuperset(placed.files)
        },
    )


def on_base(
    division: Division, base: Base, table: SegmentTable, is_delta: Sequence[bool]
) -> tuple[Placed, ...]:
    """Where the segments of a blob with *table* lie if those of its own ones for which *is_delta*
    are differences from *base*."""
    offsets = table.offsets.tolist()
    changed: dict[Placed, Placed] = {}
    for number, differs in zip(division.own, is_delta, strict=True):
        own = division.placed[number]
        below = base.place(offsets[number], own.num_bytes)
        if differs:
            assert below is not None, "it was compared with that"
            changed[own] = replace(own, below=below.layers)
    return tuple(changed.get(one, one) for one in division.placed)


def pays(delta_bytes: int, whole_bytes: int) -> bool:
    """Whether a segment whose sample takes *whole_bytes* is stored as a difference, whose sample
    takes *delta_bytes*."""
    return delta_bytes <= whole_bytes * LARGEST_SHARE
