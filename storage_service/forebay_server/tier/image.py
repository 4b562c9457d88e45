"""The raw image of a blob whose bytes lie in another way: data, segment table, trailer."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from forebay_server.tier.store import TierReader
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import SegmentTable, encode_trailer, file_bytes_for

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class ImageReader(TierReader):
    """Reads as a blob file would that has the data at its start. Thread-safe, except for
    ``close``."""

    def __init__(self, table: SegmentTable, where: str) -> None:
        self.size_bytes = file_bytes_for(table.total_bytes, table.num_segments)
        self.where = where
        self._table = table

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        stop = offset + len(view)
        if stop > self.size_bytes:
            raise IntegrityError(
                f"file is cut short: it ends before byte {stop} ({self.where}); another replica or "
                "generation has to serve"
            )
        total = self._table.total_bytes
        data_bytes = max(0, min(stop, total) - offset)
        if data_bytes:
            self._read_data(offset, view[:data_bytes])
        if data_bytes < len(view):
            end = self._table.encoded + encode_trailer(total, len(self._table.encoded))
            start = max(0, offset - total)
            view[data_bytes:] = end[start : stop - total]

    def fileno(self) -> None:
        return None

    @abstractmethod
    def _read_data(self, offset: int, view: memoryview) -> None:
        """Fill *view*, which lies inside the data, with what starts at *offset*."""
