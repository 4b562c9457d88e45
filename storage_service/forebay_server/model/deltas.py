"""When a segment is stored as its difference (XOR) from the same place of an older pack.

Weights of a few steps ago have most of their high bits in common with those of now: what is left
of the XOR shrinks further. To read one back the older segment is read, too, and what that stands
on; so it has to pay, and the chain is short.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from forebay_server.model.sharing import Placed, Source

MAX_LAYERS: Final = 4
"""Stored segments that one is the XOR of, itself included: every fourth generation at least is
whole. With three more of them a restore reads at most 3.25 times what a whole one has (see
:data:`LARGEST_SHARE`), and what could be saved beyond is a twentieth of the bytes."""

LARGEST_SHARE: Final = 3 / 4
"""A difference has at most this share of what the segment takes by itself, by a sample of both:
above, a restore would read more than one and a half times as much to save little."""


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
    return Base(
        blob,
        {
            (offset, placed.num_bytes): placed
            for offset, _, placed in source.segments()
            if len(placed.layers) < MAX_LAYERS and all(one.file in usable for one in placed.layers)
        },
    )


def pays(delta_bytes: int, whole_bytes: int) -> bool:
    """Whether a segment whose sample takes *whole_bytes* is stored as a difference, whose sample
    takes *delta_bytes*."""
    return delta_bytes <= whole_bytes * LARGEST_SHARE
