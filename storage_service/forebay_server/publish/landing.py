"""The way of a slot's bytes into a tier: copied once, digested, written, published.

Each piece of the slot is copied into an aligned buffer of the daemon's own, and *that* copy is
digested and written: stored bytes match their digest whatever the client does to the slot. While
one buffer is written, the next is filled and digested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.store import Tier, TierWriter
from forebay_wire.failpoints import failpoint
from forebay_wire.limits import KIB, MAX_BLOB_BYTES, MAX_SEGMENTS_PER_BLOB, check_limit
from forebay_wire.segments import (
    SegmentTableBuilder,
    encode_trailer,
    file_bytes_for,
)

EXPECTED_SEGMENT_BYTES = 256 * KIB
"""The segment table is reserved for as if segments had this size; a longer one grows the file."""


class SlotBytes(Protocol):
    """What landing needs of :class:`forebay_server.tier.memory.Slot`."""

    capacity_bytes: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy the bytes from *offset* into all of *buffer*."""
        ...


@dataclass(frozen=True)
class PublishedBlob:
    """A durable file that no row names yet."""

    blob: str
    num_bytes: int
    num_segments: int
    file_bytes: int
    """Size of the file: data, segment table, trailer."""


def expected_file_bytes(data_bytes: int) -> int:
    """Room to reserve for a blob of *data_bytes* before its cuts are known."""
    num_segments = min(data_bytes // EXPECTED_SEGMENT_BYTES + 1, MAX_SEGMENTS_PER_BLOB)
    return file_bytes_for(data_bytes, num_segments)


class BlobLanding:
    """One blob on its way into a tier. One thread at a time; ends by ``publish`` or ``abort``."""

    def __init__(self, writer: TierWriter, writing: ThreadPoolExecutor) -> None:
        """*writing* runs the writes that overlap with digesting."""
        self.num_bytes = 0
        self.num_segments = 0
        self._writer = writer
        self._writing = writing
        self._table = SegmentTableBuilder()

    @classmethod
    def begin(
        cls, tier: Tier, file: str, data_bytes: int, writing: ThreadPoolExecutor
    ) -> BlobLanding:
        """A landing of the new *file*, with room for *data_bytes* reserved; blocks."""
        return cls(tier.create(file, expected_file_bytes(data_bytes)), writing)

    def take(self, slot: SlotBytes, num_bytes: int, cuts: Sequence[int]) -> None:
        """Append the first *num_bytes* of *slot*, cut as *cuts* say; blocks.

        On return the slot may be overwritten. After an error only :meth:`abort` is of use.
        """
        check_limit("blob bytes", self.num_bytes + num_bytes, MAX_BLOB_BYTES, "write several blobs")
        check_limit(
            "segments of a blob",
            self.num_segments + len(cuts),
            MAX_SEGMENTS_PER_BLOB,
            "use larger segments",
        )
        offset = 0
        written: Future[None] | None = None
        try:
            for group in _groups(cuts, SEGMENT_BUFFERS.buffer_bytes):
                buffer = SEGMENT_BUFFERS.take()
                try:
                    self._fill(slot, offset, buffer, group)
                    if written is not None:
                        written.result()
                    written = self._writing.submit(self._write_out, buffer, sum(group))
                except BaseException:
                    SEGMENT_BUFFERS.give_back(buffer)
                    raise
                offset += sum(group)
        finally:
            if written is not None:
                written.result()
        self.num_bytes += num_bytes
        self.num_segments += len(cuts)

    def publish(self) -> PublishedBlob:
        """Write table and trailer and publish the file, durable on return; blocks."""
        table = self._table.build()
        self._writer.write(table.encoded)
        self._writer.write(encode_trailer(self.num_bytes, len(table.encoded)))
        failpoint("upload.before_publish")
        self._writer.publish()
        failpoint("upload.after_publish")
        file_bytes = file_bytes_for(table.total_bytes, table.num_segments)
        return PublishedBlob(table.blob_id, table.total_bytes, table.num_segments, file_bytes)

    def abort(self) -> None:
        """Drop what was written; nothing after ``publish``. Idempotent."""
        self._writer.abort()

    def _fill(self, slot: SlotBytes, offset: int, buffer: memoryview, group: Sequence[int]) -> None:
        """Copy one group of segments out of the slot and digest the copy."""
        slot.read_into(offset, buffer[: sum(group)])
        start = 0
        for length in group:
            self._table.add(buffer[start : start + length])
            start += length

    def _write_out(self, buffer: memoryview, num_bytes: int) -> None:
        try:
            self._writer.write(buffer[:num_bytes])
        finally:
            SEGMENT_BUFFERS.give_back(buffer)


def _groups(cuts: Sequence[int], buffer_bytes: int) -> Iterator[list[int]]:
    """Consecutive segments that fit one buffer together."""
    group: list[int] = []
    filled = 0
    for length in cuts:
        if filled + length > buffer_bytes:
            yield group
            group, filled = [], 0
        group.append(length)
        filled += length
    if group:
        yield group
