"""A blob of which segments lie as differences from other segments, read as if it were one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Final

import numpy as np

from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.tier.buffers import SEGMENT_BUFFERS, BufferPool
from forebay_server.tier.image import ImageReader
from forebay_server.tier.pieces import PiecesReader
from forebay_server.tier.store import TierReader
from forebay_server.tier.verify import segment_groups

WHOLE_BUFFERS: Final = BufferPool(8)
"""For segments of which only a part is wanted. Taken by threads that may hold a segment buffer."""
LAYER_BUFFERS: Final = BufferPool(8)
"""For what is XORed to others. Taken by threads that may hold one of those, too."""


def xor_into(target: memoryview, other: memoryview) -> None:
    """*target* becomes the XOR of both, which are equally long; without the GIL."""
    found = np.frombuffer(target, np.uint8)
    np.bitwise_xor(found, np.frombuffer(other, np.uint8), out=found)


class LayeredReader(ImageReader):
    """The raw image (data, segment table, trailer) of a blob. Thread-safe, except for ``close``.

    Each layer of a range is read once. What lies in several is checked by XXH3 when it is put
    together, so what was made from a wrong one is never given out.
    """

    def __init__(self, found: ObjectBlob, readers: Mapping[str, TierReader], where: str) -> None:
        """Takes *readers* over: file to its plain image."""
        super().__init__(found.table, where)
        lowest = tuple(one for one in found.extents if one.layer == 0)
        self._lowest = PiecesReader(replace(found, extents=lowest), readers, where)
        self._readers = readers
        num_layers = max(one.layer for one in found.extents)
        self._layers = [
            _Layer(one for one in found.extents if one.layer == number)
            for number in range(1, num_layers + 1)
        ]
        self._offsets: list[int] = found.table.offsets.tolist()

    def close(self) -> None:
        self._lowest.close()

    def _read_data(self, offset: int, view: memoryview) -> None:
        stop = offset + len(view)
        wanted = self._table.covering(offset, len(view))
        for is_layered, group in groupby(wanted, self._is_layered):
            numbers = list(group)
            if is_layered:
                self._read_layered(range(numbers[0], numbers[-1] + 1), offset, view)
                continue
            first = max(offset, self._offsets[numbers[0]])
            last = min(stop, self._offsets[numbers[-1] + 1])
            self._lowest.read_into(first, view[first - offset : last - offset])

    def _is_layered(self, index: int) -> bool:
        return self._layers[0].covers(self._offsets[index])

    def _read_layered(self, segments: range, offset: int, view: memoryview) -> None:
        """Put what *view*, which starts at *offset*, wants of *segments* there."""
        borders = self._offsets[segments.start : segments.stop + 1]
        for group in segment_groups(borders, LAYER_BUFFERS.buffer_bytes):
            numbers = range(segments.start + group.start, segments.start + group.stop)
            start, stop = borders[group.start], borders[group.stop]
            if offset <= start and stop <= offset + len(view):
                self._compose(numbers, view[start - offset : stop - offset])
                continue
            first, last = max(start, offset), min(stop, offset + len(view))
            with WHOLE_BUFFERS.borrow() as buffer:
                self._compose(numbers, buffer[: stop - start])
                target = np.frombuffer(view[first - offset : last - offset], np.uint8)
                np.copyto(target, np.frombuffer(buffer[first - start : last - start], np.uint8))

    def _compose(self, segments: range, target: memoryview) -> None:
        """Fill *target* with whole *segments*."""
        start, stop = self._offsets[segments.start], self._offsets[segments.stop]
        self._lowest.read_into(start, target)
        with LAYER_BUFFERS.borrow() as buffer:
            for layer in self._layers:
                for one in layer.within(start, stop):
                    first = max(start, one.blob_offset)
                    last = min(stop, one.blob_offset + one.num_bytes)
                    part = buffer[: last - first]
                    self._readers[one.file].read_into(
                        one.file_offset + first - one.blob_offset, part
                    )
                    xor_into(target[first - start : last - start], part)
        for index in segments:
            found = target[self._offsets[index] - start : self._offsets[index + 1] - start]
            self._table.check(index, found, self.where)


def check_borders(reader: TierReader, found: ObjectBlob) -> None:
    """Read the first and the last segment of each range that lies in the same pieces throughout,
    out of several: if these are put together right, the list is right.

    :class:`IntegrityError` or :class:`NotFound` if one is not.
    """
    borders = {one.blob_offset for one in found.extents}
    borders |= {one.blob_offset + one.num_bytes for one in found.extents}
    layered = _Layer(one for one in found.extents if one.layer == 1)
    offsets = found.table.offsets.tolist()
    numbers: set[int] = set()
    for start, stop in pairwise(sorted(borders)):
        if layered.covers(start):
            covered = found.table.covering(start, stop - start)
            numbers |= {covered[0], covered[-1]}
    with SEGMENT_BUFFERS.borrow() as buffer:
        for number in sorted(numbers):
            reader.read_into(offsets[number], buffer[: offsets[number + 1] - offsets[number]])


class _Layer:
    """The pieces of one layer, in the order of the blob."""

    def __init__(self, extents: Iterable[ObjectExtent]) -> None:
        self._extents = sorted(extents, key=lambda one: one.blob_offset)
        self._starts = [one.blob_offset for one in self._extents]

    def covers(self, offset: int) -> bool:
        return next(self.within(offset, offset + 1), None) is not None

    def within(self, start: int, stop: int) -> Iterator[ObjectExtent]:
        """Those that have any of the blob's bytes [start, stop)."""
        first = max(0, bisect_right(self._starts, start) - 1)
        for number in range(first, bisect_left(self._starts, stop)):
            one = self._extents[number]
            if one.blob_offset + one.num_bytes > start:
                yield one
