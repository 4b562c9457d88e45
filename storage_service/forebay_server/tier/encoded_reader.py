"""An encoded blob file, read as if it were raw."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from typing import Final

import numpy as np

from forebay_server.model.encodings import Method
from forebay_server.tier.buffers import PLAIN_BUFFERS, BufferPool
from forebay_server.tier.codecs import CODEC_THREADS, decode_segment, shares
from forebay_server.tier.encoded import EncodedIndex
from forebay_server.tier.image import ImageReader
from forebay_server.tier.store import TierReader
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import xxh3

STORED_BUFFERS: Final = BufferPool(16)
"""For what was read and is not decoded yet. Taken by threads that may hold a segment buffer."""


class EncodedReader(ImageReader):
    """An encoded blob file as its raw image. Thread-safe, except for ``close``."""

    def __init__(self, inner: TierReader, index: EncodedIndex) -> None:
        """Takes *inner* over."""
        table = index.table
        super().__init__(table, inner.where)
        self._inner = inner
        self._index = index
        self._starts: list[int] = table.offsets.tolist()

    def close(self) -> None:
        self._inner.close()

    def _read_data(self, offset: int, view: memoryview) -> None:
        wanted = self._table.covering(offset, len(view))
        with STORED_BUFFERS.borrow() as buffer:
            for group in self._groups(wanted, len(buffer)):
                start = self._index.offsets[group.start]
                stored = buffer[: self._index.offsets[group.stop] - start]
                self._inner.read_into(start, stored)
                self._decode_group(group, stored, offset, view)

    def _decode_group(
        self, group: range, stored: memoryview, offset: int, view: memoryview
    ) -> None:
        """Decode the segments *group* of *stored*, on several threads where that is worth it."""
        parts = shares(group, len(stored))
        others = [
            CODEC_THREADS.submit(self._decode_part, part, group.start, stored, offset, view)
            for part in parts[1:]
        ]
        try:
            self._decode_part(parts[0], group.start, stored, offset, view)
        finally:
            wait(others)
        for other in others:
            other.result()

    def _decode_part(
        self, part: range, first: int, stored: memoryview, offset: int, view: memoryview
    ) -> None:
        """Decode segments of *stored*, which begins with segment *first*."""
        borders = self._index.offsets
        for index in part:
            start, stop = borders[index] - borders[first], borders[index + 1] - borders[first]
            self._decode(index, stored[start:stop], offset, view)

    def _groups(self, wanted: range, limit: int) -> Iterator[range]:
        """Consecutive segments that are read in one call."""
        offsets = self._index.offsets
        first = wanted.start
        for index in wanted:
            if offsets[index + 1] - offsets[first] > limit:
                yield range(first, index)
                first = index
        yield range(first, wanted.stop)

    def _decode(self, index: int, stored: memoryview, offset: int, view: memoryview) -> None:
        """Put the part of segment *index* that *view* wants, from blob offset *offset*, there."""
        start, stop = self._starts[index], self._starts[index + 1]
        if offset <= start and stop <= offset + len(view):
            self._decode_whole(index, stored, view[start - offset : stop - offset])
            return
        first, last = max(start, offset), min(stop, offset + len(view))
        with PLAIN_BUFFERS.borrow() as buffer:
            plain = buffer[: stop - start]
            self._decode_whole(index, stored, plain)
            target = np.frombuffer(view[first - offset : last - offset], np.uint8)
            np.copyto(target, np.frombuffer(plain[first - start : last - start], np.uint8))

    def _decode_whole(self, index: int, stored: memoryview, target: memoryview) -> None:
        way = self._index.way(index)
        if way.method is not Method.RAW and xxh3(stored) != int(self._index.entries["xxh3"][index]):
            raise IntegrityError(
                f"stored segment {index} of blob {self._table.blob_id} does not match its digest "
                f"({self.where}); another replica or generation has to serve"
            )
        try:
            decode_segment(way, stored, target)
        except IntegrityError as error:
            raise IntegrityError(f"segment {index}: {error.message} ({self.where})") from error
        self._table.check(index, target, self.where)
