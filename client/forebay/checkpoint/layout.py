"""Where each tensor lies in a rank's pack, and where the pack is cut into segments. Pure.

Equal bytes must be cut equally from one save to the next, or nothing could ever be stored once:
so the order depends on names alone, what is trained lies apart from what is frozen, a large
tensor has segments of its own, and small ones share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from forebay_wire.errors import ResourceExhausted
from forebay_wire.limits import (
    MAX_BLOB_BYTES,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENTS_PER_APPEND,
    MAX_SEGMENTS_PER_BLOB,
    MIN_SHARED_SEGMENT_BYTES,
    check_limit,
)
from forebay_wire.segments import even_cuts

ALIGNMENT: Final = 64
"""Bytes: a cache line, and a multiple of every element size, so that tensors can be mapped."""


@dataclass(frozen=True)
class Extent:
    """A thing to place: its stable name, its bytes, and whether training leaves it alone."""

    name: tuple[object, ...]
    num_bytes: int
    frozen: bool = False


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes, in the order of the extents given; segment lengths in pack order."""

    offsets: tuple[int, ...]
    cuts: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return sum(self.cuts)


@dataclass(frozen=True)
class Piece:
    """The bytes [start, stop) of a pack that go through the slot at once."""

    start: int
    stop: int
    cuts: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def padded(num_bytes: int) -> int:
    """*num_bytes* rounded up to :data:`ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def place(extents: Sequence[Extent]) -> Layout:
    """Lay out *extents*: frozen before trained, large before small, then by name.

    Every extent starts at a multiple of :data:`ALIGNMENT`; the bytes between are zero.
    """
    order = sorted(range(len(extents)), key=lambda index: _sort_key(extents[index]))
    offsets = [0] * len(extents)
    cuts: list[int] = []
    end = shared = 0  # `shared`: bytes of the open segment of small ones, which ends at `end`
    group: tuple[bool, bool] | None = None
    for index in order:
        extent = extents[index]
        small = extent.num_bytes < MIN_SHARED_SEGMENT_BYTES
        if shared and (group != (extent.frozen, small) or shared >= MIN_SHARED_SEGMENT_BYTES):
            cuts.append(shared)
            shared = 0
        group = (extent.frozen, small)
        offsets[index] = end
        if small:
            shared += padded(extent.num_bytes)
        else:
            cuts += even_cuts(padded(extent.num_bytes))
        end += padded(extent.num_bytes)
    if shared:
        cuts.append(shared)
    check_limit("segments of a pack", len(cuts), MAX_SEGMENTS_PER_BLOB, "use more ranks")
    check_limit("bytes of a pack", end, MAX_BLOB_BYTES, "use more ranks")
    return Layout(tuple(offsets), tuple(cuts))


def pieces(cuts: Sequence[int], capacity: int) -> Iterator[Piece]:
    """Whole segments in portions that fit a slot of *capacity* bytes and one control message."""
    if cuts and capacity < max(cuts):
        raise ResourceExhausted(
            f"the slot granted has {capacity} bytes and one segment needs {max(cuts)} "
            f"(at most {MAX_SEGMENT_BYTES}): give the ram tier more room (tiers.ram limit)"
        )
    start = stop = 0
    held: list[int] = []
    for cut in cuts:
        if held and (stop - start + cut > capacity or len(held) == MAX_SEGMENTS_PER_APPEND):
            yield Piece(start, stop, tuple(held))
            start, held = stop, []
        held.append(cut)
        stop += cut
    if held:
        yield Piece(start, stop, tuple(held))


def _sort_key(extent: Extent) -> tuple[object, ...]:
    small = extent.num_bytes < MIN_SHARED_SEGMENT_BYTES
    return (not extent.frozen, small, extent.name)
