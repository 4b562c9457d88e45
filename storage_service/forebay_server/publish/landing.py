"""The way of a slot's bytes into a tier: copied once, digested, written, published.

What lies in the tier already, as far as the landing is told, is referenced and not written.

Each piece of the slot is copied into an aligned buffer of the daemon's own, and *that* copy is
digested and written: stored bytes match their digest whatever the client does to the slot. While
one buffer is written, the next ones are filled and digested.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.model.sharing import Placed, merged
from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.store import Tier, TierWriter
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import new_random_name
from forebay_wire.limits import (
    KIB,
    MAX_BLOB_BYTES,
    MAX_PIECES_PER_BLOB,
    MAX_SEGMENTS_PER_BLOB,
    check_limit,
)
from forebay_wire.segments import (
    SegmentDigests,
    SegmentTable,
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
    """Size of the file: data, segment table, trailer; 0: there is none, nothing was new."""
    list_file: str = ""
    """The file of the extent list, if the blob shares pieces with others; the first one then has
    but what is new."""
    list_bytes: int = 0
    pieces: tuple[ObjectExtent, ...] = ()

    shared_bytes: int = 0
    """Of the blob, that were not written."""
    table: SegmentTable | None = None


NOTHING_KNOWN: Mapping[bytes, Placed] = {}


def expected_file_bytes(data_bytes: int) -> int:
    """Room to reserve for a blob of *data_bytes* before its cuts are known."""
    num_segments = min(data_bytes // EXPECTED_SEGMENT_BYTES + 1, MAX_SEGMENTS_PER_BLOB)
    return file_bytes_for(data_bytes, num_segments)


class BlobLanding:
    """One blob on its way into a tier. One thread at a time; ends by ``publish`` or ``abort``."""

    def __init__(
        self, tier: Tier, file: str, writer: TierWriter, threads: ThreadPoolExecutor
    ) -> None:
        """*threads* copy, digest and write; what they are given waits for nothing."""
        self.num_bytes = 0
        self.num_segments = 0
        self._tier = tier
        self._file = file
        self._writer = writer
        self._threads = threads
        self._table = SegmentTableBuilder()
        self._own = SegmentTableBuilder()
        self._own_bytes = 0
        self._placed: list[Placed] = []
        self._num_pieces = 0
        self._known: dict[bytes, Placed] = {}
        self._shares = False

    @classmethod
    def begin(
        cls, tier: Tier, file: str, data_bytes: int, threads: ThreadPoolExecutor
    ) -> BlobLanding:
        """A landing of the new *file*, with room for *data_bytes* reserved; blocks."""
        writer = tier.create(file, expected_file_bytes(data_bytes))
        return cls(tier, file, writer, threads)

    def refer(self, known: Mapping[bytes, Placed]) -> None:
        """Before the first :meth:`take`: segments of these BLAKE3 digests lie in the tier already,
        and equal ones of the blob itself are written once."""
        self._known = dict(known)
        self._shares = True

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
                filling.append(_Filled(work, buffer))
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
        if self._own_bytes == self.num_bytes:
            self._publish_file(table)
            file_bytes = file_bytes_for(table.total_bytes, table.num_segments)
            return PublishedBlob(
                table.blob_id, table.total_bytes, table.num_segments, file_bytes, table=table
            )
        return self._publish_pieces(table)

    def _publish_file(self, table: SegmentTable) -> None:
        self._writer.write(table.encoded)
        self._writer.write(encode_trailer(table.total_bytes, len(table.encoded)))
        failpoint("upload.before_publish")
        self._writer.publish()
        failpoint("upload.after_publish")

    def _publish_pieces(self, table: SegmentTable) -> PublishedBlob:
        """What is new as a blob file of its own, then the list: its names are in no row yet."""
        own = self._own.build()
        own_file_bytes = 0
        if own.num_segments:
            self._publish_file(own)
            own_file_bytes = file_bytes_for(own.total_bytes, own.num_segments)
        else:
            self._writer.abort()
        pieces = tuple(merged(self._placed, self._file, own_file_bytes))
        data = ObjectBlob(table, pieces, PIECES).encode()
        list_file = new_random_name()
        failpoint("upload.before_list")
        self._tier.put(list_file, data)
        failpoint("upload.after_list")
        return PublishedBlob(
            table.blob_id,
            table.total_bytes,
            table.num_segments,
            own_file_bytes,
            list_file,
            len(data),
            pieces,
            table.total_bytes - own.total_bytes,
            table,
        )

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
        runs = self._place(digests)
        if runs:
            behind.write(filled.buffer, runs)
        else:
            SEGMENT_BUFFERS.give_back(filled.buffer)

    def _place(self, digests: Sequence[SegmentDigests]) -> list[tuple[int, int]]:
        """Say of each segment of a group where it lies, or is going to; ``(start, stop)`` of those
        bytes of the group that have to be written."""
        runs: list[tuple[int, int]] = []
        start = 0
        for segment in digests:
            length, digest, _ = segment
            self._table.append(segment)
            found = self._known.get(digest) if self._num_pieces < MAX_PIECES_PER_BLOB else None
            if found is None or found.num_bytes != length:
                self._own.append(segment)
                found = Placed("", self._own_bytes, length, 0)
                self._own_bytes += length
                if self._shares:
                    self._known.setdefault(digest, found)
                if runs and runs[-1][1] == start:
                    runs[-1] = (runs[-1][0], start + length)
                else:
                    runs.append((start, start + length))
            if self._shares:
                self._num_pieces += not (self._placed and found.follows(self._placed[-1]))
                self._placed.append(found)
            start += length
        return runs


@dataclass(frozen=True)
class _Filled:
    """A buffer that a thread fills with a group of segments."""

    digests: Future[list[SegmentDigests]]
    buffer: memoryview


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
        self._waiting: deque[tuple[memoryview, Sequence[tuple[int, int]]]] = deque()
        self._num_ahead = 0
        self._error: BaseException | None = None

    def wait_for_room(self) -> None:
        """Until fewer than MAX_AHEAD buffers are on their way; raises what a write raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_ahead < MAX_AHEAD)
            self._check()

    def write(self, buffer: memoryview, runs: Sequence[tuple[int, int]]) -> None:
        """Have the *runs* (start, stop) of *buffer* written, after all that were given before;
        takes it over."""
        with self._changed:
            self._waiting.append((buffer, runs))
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
                buffer, runs = self._waiting.popleft()
            try:
                if self._error is None:
                    for start, stop in runs:
                        self._writer.write(buffer[start:stop])
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
