"""A blob that lies in pieces of several files, read as if it were one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.tier.image import ImageReader
from forebay_server.tier.store import TierReader
from forebay_wire.segments import SegmentTable


class PiecesReader(ImageReader):
    """The raw image (data, segment table, trailer) of a blob. Thread-safe, except for ``close``."""

    def __init__(self, found: ObjectBlob, readers: Mapping[str, TierReader], where: str) -> None:
        """Takes *readers* over: file to its plain image."""
        super().__init__(found.table, where)
        self._extents = found.extents
        self._starts = [one.blob_offset for one in found.extents]
        self._readers = readers

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _read_data(self, offset: int, view: memoryview) -> None:
        index = bisect_right(self._starts, offset) - 1
        while view.nbytes:
            one = self._extents[index]
            skip = offset - one.blob_offset
            part = view[: one.num_bytes - skip]
            self._readers[one.file].read_into(one.file_offset + skip, part)
            view, offset, index = view[len(part) :], offset + len(part), index + 1


def segments_of(reader: TierReader, table: SegmentTable, numbers: Sequence[int]) -> PiecesReader:
    """The raw image of a blob that has but the segments *numbers* of the one with *table*, which
    *reader* reads and its owner closes."""
    own = SegmentTable(table.entries[list(numbers)])
    starts = table.offsets.tolist()
    extents = tuple(
        ObjectExtent(int(offset), starts[number], starts[number + 1] - starts[number], 0, "")
        for number, offset in zip(numbers, own.offsets[:-1], strict=True)
    )
    return PiecesReader(ObjectBlob(own, extents, PIECES), {"": reader}, reader.where)
