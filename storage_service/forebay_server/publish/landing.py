"""The way of a slot's bytes into a tier: copied once, digested, written, published.

Each piece of the slot is copied into an aligned buffer of the daemon's own, and *that* copy is
digested and written: stored bytes match their digest whatever the client does to the slot. While
one buffer is written, the next ones are filled and digested.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.store import Tier, TierWriter
from forebay_wire.failpoints import failpoint
from forebay_wire.limits import KIB, MAX_BLOB_BYTES, MAX_SEGMENTS_PER_BLOB, check_limit
from forebay_wire.segments import (
    SegmentDigests,
    SegmentTableBuilder,
    digest_segment,
    encode_trailer,
    file_bytes_for,
)

EXPECTED_SEGMENT_BYTES = 256 * KIB
"""The segment table is reserved for as if segments had this size; a longer one grows the file."""

MAX_FILLING = 2
"""Buffers of one landing that are filled and digested at a time."""

MAX_AHEAD = 3
"""Filled buffers of one landing that wait for the disk or are being written: a thread that comes
late to fill the next one leaves the disk something to do."""


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

    def __init__(self, writer: TierWriter, threads: ThreadPoolExecutor) -> None:
        """*threads* copy, digest and write; what they are given waits for nothing."""
        self.num_bytes = 0
        self.num_segments = 0
        self._writer = writer
        self._threads = threads
        self._table = SegmentTableBuilder()

    @classmethod
    def begin(
        cls, tier: Tier, file: str, data_bytes: int, threads: ThreadPoolExecutor
    ) -> BlobLanding:
        """A landing of the new *file*, with room for *data_bytes* reserved; blocks."""
        return cls(tier.create(file, expected_file_bytes(data_bytes)), threads)

    def take(self, slot: SlotBytes, offset: int, cuts: Sequence[int]) -> None:
        """Append what lies from *offset* in *slot*, segments as long as *cuts* say; blocks.

        On return that may be overwritten. After an error only :meth:`abort` is of use.
        """
        num_bytes = sum(cuts)
        check_limit("blob bytes", self.num_bytes + num_bytes, MAX_BLOB_BYTES, "write several blobs")
        check_limit(
            "segments of a blob",
            self.num_segments + len(cuts),
            MAX_SEGMENTS_PER_BLOB,
            "use larger segments",
        )
        behind = _WriteBehind(self._writer, self._threads)
        filling: deque[_Filled] = deque()
        try:
            for group in _groups(cuts, SEGMENT_BUFFERS.buffer_bytes):
                buffer = self._buffer(filling, behind)
                work = self._threads.submit(_fill, slot, offset, buffer, group)
                filling.append(_Filled(work, buffer, sum(group)))
                offset += sum(group)
            while filling:
                self._pass_on(filling, behind)
        finally:
            for filled in filling:  # after an error
                wait([filled.digests])
                SEGMENT_BUFFERS.give_back(filled.buffer)
            behind.finish()
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

    def _buffer(self, filling: deque[_Filled], behind: _WriteBehind) -> memoryview:
        """For the next group. Waits only while no other is held: all doing so would wait for
        ever."""
        if len(filling) == MAX_FILLING:
            self._pass_on(filling, behind)
        while filling:
            buffer = SEGMENT_BUFFERS.take_if_free()
            if buffer is not None:
                return buffer
            self._pass_on(filling, behind)
        return SEGMENT_BUFFERS.take()

    def _pass_on(self, filling: deque[_Filled], behind: _WriteBehind) -> None:
        """Have the first of what is being filled written, once it is full."""
        behind.wait_for_room()
        digests = filling[0].digests.result()
        filled = filling.popleft()
        for segment in digests:
            self._table.append(segment)
        behind.write(filled.buffer, filled.num_bytes)


@dataclass(frozen=True)
class _Filled:
    """A buffer that a thread fills with a group of segments."""

    digests: Future[list[SegmentDigests]]
    buffer: memoryview
    num_bytes: int


def _fill(
    slot: SlotBytes, offset: int, buffer: memoryview, group: Sequence[int]
) -> list[SegmentDigests]:
    """Copy a group of segments out of the slot, and digest the copy."""
    slot.read_into(offset, buffer[: sum(group)])
    ends = list(accumulate(group))
    return [
        digest_segment(buffer[end - length : end]) for length, end in zip(group, ends, strict=True)
    ]


class _WriteBehind:
    """Writes filled buffers in order, on one thread of many, and gives them back to their pool.

    Used by one thread. That of the writes waits for nothing, so buffers always come back.
    """

    def __init__(self, writer: TierWriter, threads: ThreadPoolExecutor) -> None:
        self._writer = writer
        self._threads = threads
        self._changed = threading.Condition()
        self._waiting: deque[tuple[memoryview, int]] = deque()
        self._num_ahead = 0
        self._error: BaseException | None = None

    def wait_for_room(self) -> None:
        """Until fewer than MAX_AHEAD buffers are on their way; raises what a write raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_ahead < MAX_AHEAD)
            self._check()

    def write(self, buffer: memoryview, num_bytes: int) -> None:
        """Have the start of *buffer* written, after all that were given before; takes it over."""
        with self._changed:
            self._waiting.append((buffer, num_bytes))
            self._num_ahead += 1
            is_first = self._num_ahead == 1
        if is_first:
            self._threads.submit(self._write_all)

    def finish(self) -> None:
        """Wait for all writes; raises what one of them raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_ahead == 0)
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while True:
            with self._changed:
                buffer, num_bytes = self._waiting.popleft()
            try:
                if self._error is None:
                    self._writer.write(buffer[:num_bytes])
            except BaseException as error:  # noqa: BLE001 - raised by who waits for it
                self._error = error
            SEGMENT_BUFFERS.give_back(buffer)
            with self._changed:
                self._num_ahead -= 1
                self._changed.notify_all()
                if not self._num_ahead:
                    return


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
