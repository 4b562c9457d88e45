"""Reading blob files with every byte checked: tables, whole files, copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.store import TierReader
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import (
    TRAILER,
    SegmentTable,
    decode_trailer,
    encode_trailer,
    file_bytes_for,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class BlobSink(Protocol):
    """Where a copy goes: a tier's writer, or a window."""

    def write(self, buffer: ReadableBuffer) -> None:
        """Append all of *buffer*."""
        ...


def read_table(reader: TierReader, blob_id: str | None) -> SegmentTable:
    """The segment table at the end of a blob file: with *blob_id* proven to be that blob's.

    Also checks that data, table and trailer make up the whole file, so a truncated one is found
    without reading its data. :class:`IntegrityError` names the file.
    """
    trailer = bytearray(TRAILER.size)
    if reader.size_bytes < len(trailer):
        raise IntegrityError(f"blob file is cut short: {reader.size_bytes} bytes ({reader.where})")
    reader.read_into(reader.size_bytes - len(trailer), trailer)
    offset, length = decode_trailer(trailer, reader.where)
    if offset + length + len(trailer) != reader.size_bytes:
        raise IntegrityError(
            f"blob file has {reader.size_bytes} bytes, its trailer speaks of "
            f"{offset + length + len(trailer)} ({reader.where}); it is damaged"
        )
    encoded = bytearray(length)
    reader.read_into(offset, encoded)
    table = SegmentTable.decode(encoded, reader.where, blob_id)
    if table.total_bytes != offset:
        raise IntegrityError(
            f"blob file has {offset} bytes of data, its table speaks of {table.total_bytes} "
            f"({reader.where}); it is damaged"
        )
    return table


def verify_file(
    reader: TierReader,
    blob_id: str | None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> SegmentTable:
    """Read the whole blob file and check every segment by BLAKE3; its table.

    *advance* is told how many bytes were checked; it may wait, or raise to end it.
    :class:`IntegrityError` names the first segment that does not match.
    """
    table = read_table(reader, blob_id)
    for piece in _checked_pieces(reader, table):
        advance(len(piece))
    return table


def copy_verified(reader: TierReader, sink: BlobSink, blob_id: str | None) -> SegmentTable:
    """Copy a blob file into *sink*, checking by BLAKE3 what is written; its table.

    The caller publishes or aborts. :class:`IntegrityError` if the source is damaged.
    """
    table = read_table(reader, blob_id)
    for piece in _checked_pieces(reader, table):
        sink.write(piece)
    sink.write(table.encoded)
    sink.write(encode_trailer(table.total_bytes, len(table.encoded)))
    return table


def copy_bytes(table: SegmentTable) -> int:
    """Size in bytes of the file that :func:`copy_verified` writes for a blob with *table*."""
    return file_bytes_for(table.total_bytes, table.num_segments)


def checked_ranges(
    reader: TierReader, table: SegmentTable, wanted: Iterable[range]
) -> Iterator[tuple[int, memoryview]]:
    """Blob offset and bytes of the segments *wanted*, in pieces of whole ones, each checked by
    BLAKE3 and valid until the next is asked for: where the reader has it, else in a pooled buffer.

    *wanted*: ranges of segment numbers, in order, without overlaps.
    """
    offsets = table.offsets.tolist()
    with ExitStack() as stack:
        buffer: memoryview | None = None
        for segments in wanted:
            borders = offsets[segments.start : segments.stop + 1]
            for group in segment_groups(borders, SEGMENT_BUFFERS.buffer_bytes):
                start, end = borders[group.start], borders[group.stop]
                piece = reader.view(start, end - start)
                if piece is None:
                    if buffer is None:
                        buffer = stack.enter_context(SEGMENT_BUFFERS.borrow())
                    piece = buffer[: end - start]
                    reader.read_into(start, piece)
                for index in group:
                    view = piece[borders[index] - start : borders[index + 1] - start]
                    table.check_identity(segments.start + index, view, reader.where)
                yield start, piece


def _checked_pieces(reader: TierReader, table: SegmentTable) -> Iterator[memoryview]:
    """The blob's data in order, as :func:`checked_ranges` has it."""
    for _, piece in checked_ranges(reader, table, [range(table.num_segments)]):
        yield piece


def segment_groups(offsets: list[int], limit: int) -> Iterator[range]:
    """Ranges of consecutive segments of at most *limit* bytes together."""
    first = 0
    for index in range(1, len(offsets)):
        if offsets[index] - offsets[first] > limit:
            yield range(first, index - 1)
            first = index - 1
    if first < len(offsets) - 1:
        yield range(first, len(offsets) - 1)
