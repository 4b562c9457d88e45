"""Blobs on their way from a slow tier: readers get segments as they arrive, a copy is made beside.

Segments are read in groups, as many at a time as a buffer holds: a store takes its time for each
request. Each group is read once however many ask for it at once, checked, and kept in a few pooled
buffers until others need them: never a whole blob in memory. What a copy in a local tier has passed
already is read there once the copy is complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from forebay_server.serve.promote import Foreground, Place, Promoter, nobody
from forebay_server.serve.shared import Shared
from forebay_server.tier.buffers import aligned_buffer
from forebay_server.tier.encode import open_plain
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier, TierReader
from forebay_server.tier.verify import read_table, segment_groups
from forebay_wire.errors import IntegrityError, ResourceExhausted, StorageError
from forebay_wire.limits import MAX_SEGMENT_BYTES, MIB
from forebay_wire.segments import SegmentTable

logger = logging.getLogger(__name__)

SMALLEST_BYTES: Final = 8 * MIB
"""Smaller blobs are not worth it: they are fetched whole, and handed over then."""

NUM_BUFFERS: Final = 16
"""Groups in memory, of all streams together: 64 MiB."""

NUM_KEPT: Final = 8
"""Of these at most so many wait for a copy that has not come to them."""

NUM_AHEAD: Final = 3
"""Groups that are read after the one that somebody asked for, who reads on."""

Key = tuple[str, int]
"""Blob and group."""

Damaged = dict[int, IntegrityError]
"""Segment to what is wrong with it; the others of its group are good."""


@dataclass(eq=False)
class _Loaded:
    """One group of segments in a buffer, or on its way into it."""

    buffer: memoryview
    work: Shared[Damaged] | None = None
    num_users: int = 0
    is_kept: bool = False
    """For the copy."""


class Stream:
    """One blob that is being streamed. Made, shared and closed by :class:`Streams`."""

    def __init__(self, source: Place) -> None:
        self.source = source
        self.table: SegmentTable
        self.groups: list[range]
        """Segments that are read together."""
        self.group_of: list[int]
        """Segment to its group."""
        self.asked: set[int] = set()
        """Groups that somebody has asked for."""
        self.num_holders = 0
        self.copying: asyncio.Task[Place | None] | None = None
        self.num_copied = 0
        """Groups that the copy has."""
        self.moved = asyncio.Event()
        """Set, and replaced, when the copy has one more, or ends."""
        self.turn = asyncio.Lock()
        """Of reading a disk, which takes one segment after the other."""
        self._readers: list[TierReader] = []
        self.tier = source.tier
        """Where segments are read now."""

    @property
    def reader(self) -> TierReader:
        return self._readers[-1]

    @property
    def is_copying(self) -> bool:
        return self.copying is not None and not self.copying.done()

    def know(self, table: SegmentTable) -> None:
        """Its segments are those of *table*."""
        self.table = table
        self.groups = list(segment_groups(table.offsets.tolist(), MAX_SEGMENT_BYTES))
        self.group_of = [number for number, group in enumerate(self.groups) for _ in group]

    def parts(self, start: int, stop: int) -> Iterator[range]:
        """Bytes [start, stop) of the blob, cut where groups end."""
        while start < stop:
            [segment] = self.table.covering(start, 1)
            end = self.bytes_of(self.groups[self.group_of[segment]]).stop
            yield range(start, min(end, stop))
            start = end

    def bytes_of(self, segments: range) -> range:
        """Where in the blob consecutive *segments* lie."""
        offsets = self.table.offsets
        return range(int(offsets[segments.start]), int(offsets[segments.stop]))

    def move(self, num_copied: int) -> None:
        """The copy has so many groups now."""
        self.num_copied = num_copied
        self.moved.set()
        self.moved = asyncio.Event()

    def read_from(self, tier: str, reader: TierReader) -> None:
        """Read further segments there. The reader before stays open for calls that run."""
        self._readers.append(reader)
        self.tier = tier

    def close(self) -> None:
        """Close the readers, when nothing is read any more."""
        for reader in self._readers:
            reader.close()


class Streams:
    """All streams of the daemon. Belongs to the event loop; ``close`` ends them."""

    def __init__(self, tiers: Tiers, promoter: Promoter, foreground: Foreground = nobody) -> None:
        self._tiers = tiers
        self._promoter = promoter
        self._foreground = foreground
        self._streams: dict[str, Shared[Stream]] = {}
        self._loaded: OrderedDict[Key, _Loaded] = OrderedDict()
        self._free: list[memoryview] = []
        self._num_unmade = NUM_BUFFERS
        self._freed = asyncio.Event()
        self._copies: set[asyncio.Task[Place | None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self.read_bytes: Counter[str] = Counter()
        """Tier to bytes of segments that were read there."""

    async def close(self) -> None:
        """End copies and reads. Idempotent."""
        reads = [one.work.task for one in self._loaded.values() if one.work is not None]
        tasks = [*self._copies, *(one.task for one in self._streams.values()), *reads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._closing, return_exceptions=True)
        self._streams.clear()
        self._loaded.clear()

    async def open(self, source: Place) -> Stream:
        """The stream of the blob at *source*, the same for all; :meth:`release` it.

        The first open has the policy decide whether a copy is made beside. :class:`IntegrityError`
        if the segment table is damaged.
        """
        stream = await self._shared(source)
        stream.num_holders += 1
        return stream

    async def copy(self, source: Place) -> None:
        """Have the copy made, before or beside readers; :class:`ResourceExhausted` without room."""
        stream = await self._shared(source)
        copying = stream.copying
        if copying is None or await asyncio.shield(copying) is None:
            self._drop_if_unused(stream)
            raise ResourceExhausted(f"no tier has room for blob {source.blob}")

    async def _shared(self, source: Place) -> Stream:
        opening = self._streams.get(source.blob)
        if opening is None:
            opening = Shared(self._open(source), f"stream-{source.blob}")
            self._streams[source.blob] = opening
        try:
            return await opening.wait()
        except BaseException:
            if opening.task.done() and self._streams.get(source.blob) is opening:
                del self._streams[source.blob]
            raise

    def release(self, stream: Stream) -> None:
        """Whoever opened it reads it no more."""
        stream.num_holders -= 1
        self._drop_if_unused(stream)

    def is_streaming(self, blob: str) -> bool:
        """Whether somebody reads *blob* so, or a copy of it is being made."""
        return blob in self._streams

    @asynccontextmanager
    async def part(self, stream: Stream, wanted: range, stop: int = 0) -> AsyncIterator[memoryview]:
        """The checked bytes *wanted* of a blob, inside the ``with`` block: one of the ranges of
        :meth:`Stream.parts`. Those before *stop* are going to be asked for, too, if that is known.

        :class:`IntegrityError` if they are damaged; :class:`StorageError`.
        """
        segments = stream.table.covering(wanted.start, len(wanted))
        number = stream.group_of[segments.start]
        await self._wait_for_copy(stream, number)
        last = stream.group_of[stream.table.covering(max(wanted.stop, stop) - 1, 1).start]
        async with self._group(stream, number, last) as (view, damaged):
            for index in segments:
                if index in damaged:
                    raise damaged[index]
            base = stream.bytes_of(stream.groups[number]).start
            yield view[wanted.start - base : wanted.stop - base]

    @asynccontextmanager
    async def _group(
        self, stream: Stream, number: int, last: int
    ) -> AsyncIterator[tuple[memoryview, Damaged]]:
        """The bytes of a group; *last*: that the reader is going to ask for, as far as is known."""
        loaded = await self._load(stream, number)
        loaded.num_users += 1
        try:
            reads_on = number == 0 or number - 1 in stream.asked
            stream.asked.add(number)
            self._load_ahead(stream, number, len(stream.groups) if reads_on else last + 1)
            assert loaded.work is not None, "it is being loaded"
            damaged = await loaded.work.wait()
            yield loaded.buffer[: len(stream.bytes_of(stream.groups[number]))], damaged
        finally:
            loaded.num_users -= 1
            self._freed.set()

    # ---------------------------------------------------------------------------------- opening

    async def _open(self, source: Place) -> Stream:
        stream = Stream(source)
        tier = self._tiers.get(source.tier)
        reader, table = await self._tiers.run(tier, _open_reader, tier, source)
        stream.know(table)
        stream.read_from(source.tier, reader)
        targets = await self._promoter.policy.tiers_for(source)
        if targets:
            stream.copying = Shared(self._copy(stream, targets[0])).task
            self._copies.add(stream.copying)
            stream.copying.add_done_callback(lambda task: self._end_copy(stream, task))
        return stream

    def _end_copy(self, stream: Stream, task: asyncio.Task[Place | None]) -> None:
        self._copies.discard(task)
        for (blob, _), loaded in self._loaded.items():
            if blob == stream.source.blob:
                loaded.is_kept = False
        self._freed.set()
        stream.move(stream.num_copied)
        if not task.cancelled() and task.exception() is None:
            self._drop_if_unused(stream)

    def _drop_if_unused(self, stream: Stream) -> None:
        if stream.num_holders or stream.is_copying:
            return
        if self._streams.pop(stream.source.blob, None) is None:
            return
        running = []
        for key in [key for key in self._loaded if key[0] == stream.source.blob]:
            loaded = self._loaded[key]
            if loaded.work is not None and not loaded.work.task.done():
                running.append(loaded.work.task)
            elif not loaded.num_users:
                self._free.append(self._loaded.pop(key).buffer)
        self._freed.set()
        closing = asyncio.create_task(_close_after(stream, running))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    # ---------------------------------------------------------------------------------- the copy

    async def _copy(self, stream: Stream, tier: Tier) -> Place | None:
        """Copy the blob into *tier* beside its readers; None if there is no room after all."""

        async def pieces() -> AsyncIterator[memoryview]:
            last = len(stream.groups) - 1
            for number in range(len(stream.groups)):
                async with self._group(stream, number, last) as (view, damaged):
                    for error in damaged.values():
                        raise error
                    yield view
                stream.move(number + 1)
                loaded = self._loaded.get((stream.source.blob, number))
                if loaded is not None:
                    loaded.is_kept = False

        try:
            place = await self._promoter.copy_pieces(stream.source, stream.table, tier, pieces())
        except (ResourceExhausted, StorageError) as error:
            logger.info("blob %s is not kept in %s: %s", stream.source.blob, tier.name, error)
            return None
        local = self._tiers.get(place.tier)
        reader, _ = await self._tiers.run(local, _open_reader, local, place)
        stream.read_from(place.tier, reader)
        return place

    async def _wait_for_copy(self, stream: Stream, number: int) -> None:
        """Keep a reader from reading for itself what the copy reads, too: far behind the copy it
        waits for its end, far ahead until it comes near."""
        while stream.is_copying and (stream.source.blob, number) not in self._loaded:
            is_passed = number < stream.num_copied
            if not is_passed and self._num_kept() < NUM_KEPT:
                return
            moved = stream.moved
            await moved.wait()

    # --------------------------------------------------------------------------------- groups

    async def _load(self, stream: Stream, number: int) -> _Loaded:
        key = (stream.source.blob, number)
        while True:
            found = self._loaded.get(key)
            if found is not None and not _has_failed(found):
                self._loaded.move_to_end(key)
                return found
            buffer = self._take_buffer()
            if buffer is not None:
                return self._begin(stream, number, buffer)
            self._freed.clear()
            await self._freed.wait()

    def _load_ahead(self, stream: Stream, number: int, stop: int) -> None:
        stop = min(number + 1 + NUM_AHEAD, stop)
        for following in range(max(number + 1, stream.num_copied), stop):
            key = (stream.source.blob, following)
            if key in self._loaded:
                continue
            if stream.is_copying and self._num_kept() >= NUM_KEPT:
                return
            buffer = self._take_buffer()
            if buffer is None:
                return
            self._begin(stream, following, buffer)

    def _begin(self, stream: Stream, number: int, buffer: memoryview) -> _Loaded:
        loaded = _Loaded(buffer)
        key = (stream.source.blob, number)
        old = self._loaded.pop(key, None)
        if old is not None:
            self._free.append(old.buffer)
        is_ahead = stream.is_copying and number >= stream.num_copied
        loaded.is_kept = is_ahead and self._num_kept() < NUM_KEPT
        self._loaded[key] = loaded
        loaded.work = Shared(self._read(stream, stream.groups[number], buffer))
        loaded.work.task.add_done_callback(self._end_read)
        return loaded

    def _end_read(self, task: asyncio.Task[Damaged]) -> None:
        """What was read ahead, and nobody uses, may go for others now."""
        self._freed.set()
        if not task.cancelled():
            task.exception()  # nobody may have waited for it

    async def _read(self, stream: Stream, group: range, buffer: memoryview) -> Damaged:
        num_bytes, name = len(stream.bytes_of(group)), stream.tier
        tier = self._tiers.get(name)
        async with stream.turn if tier.kind == "hdd" else nullcontext():
            with self._foreground(name) if stream.num_holders else nullcontext():
                view, reader = buffer[:num_bytes], stream.reader
                damaged = await self._tiers.run(
                    tier, _read_checked, reader, stream.table, group, view
                )
        self.read_bytes[name] += num_bytes
        return damaged

    def _num_kept(self) -> int:
        return sum(one.is_kept for one in self._loaded.values())

    def _take_buffer(self) -> memoryview | None:
        if self._free:
            return self._free.pop()
        if self._num_unmade:
            self._num_unmade -= 1
            return aligned_buffer(MAX_SEGMENT_BYTES)
        for key, loaded in self._loaded.items():
            is_done = loaded.work is not None and loaded.work.task.done()
            if is_done and not loaded.num_users and not loaded.is_kept:
                del self._loaded[key]
                return loaded.buffer
        return None


async def _close_after(stream: Stream, running: list[asyncio.Task[Damaged]]) -> None:
    await asyncio.gather(*running, return_exceptions=True)
    stream.close()


def _has_failed(loaded: _Loaded) -> bool:
    """Whether another try is due; not while somebody uses what is good of it."""
    task = None if loaded.work is None else loaded.work.task
    if task is None or not task.done() or loaded.num_users:
        return False
    return task.cancelled() or task.exception() is not None or bool(task.result())


def _open_reader(tier: Tier, place: Place) -> tuple[TierReader, SegmentTable]:
    reader = open_plain(tier, place.file, place.encoding, place.blob)
    try:
        return reader, read_table(reader, place.blob)
    except BaseException:
        reader.close()
        raise


def _read_checked(
    reader: TierReader, table: SegmentTable, group: range, view: memoryview
) -> Damaged:
    """Fill *view* with a group of segments; those that are not what they should be."""
    damaged: Damaged = {}
    offsets: list[int] = table.offsets[group.start : group.stop + 1].tolist()
    is_read = True
    try:
        reader.read_into(offsets[0], view)
    except IntegrityError:  # the others may be good
        is_read = False
    for index, start, stop in zip(group, offsets, offsets[1:], strict=False):
        part = view[start - offsets[0] : stop - offsets[0]]
        try:
            if not is_read:
                reader.read_into(start, part)
            table.check_identity(index, part, reader.where)
        except IntegrityError as error:
            damaged[index] = error
    return damaged
