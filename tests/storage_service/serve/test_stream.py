"""Large blobs of slow tiers: bytes come as they arrive, once, and a copy is made beside."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from contextlib import contextmanager

import pytest

from forebay_server.serve.stream import NUM_BUFFERS, Streams
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import TierReader
from forebay_server.tier.wrap import TierWrapper
from forebay_wire.errors import IntegrityError
from forebay_wire.limits import KIB, MIB

SIZE = 1536 * KIB
"""Of a segment: two are read together."""
PIECES = [random_bytes(SIZE, seed) for seed in range(24)]


class GatedTier(TierWrapper):
    """Counts the bytes that are read of it, and lets through as many large reads as are allowed."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.read_bytes: Counter[str] = Counter()
        self.num_reads = 0
        self.allowed = threading.Semaphore(1_000_000)
        self.bad = range(0)
        """Bytes of files that cannot be read."""

    @contextmanager
    def around(self, operation, name, num_bytes):
        if operation == "read_into" and num_bytes > 64 * KIB:
            assert self.allowed.acquire(timeout=60)
            self.read_bytes[name] += num_bytes
            self.num_reads += 1
        yield

    def surround(self, name, inner):
        return BadSpots(super().surround(name, inner), self)


class BadSpots(TierReader):
    """Fails where a read touches what is bad."""

    def __init__(self, inner, tier) -> None:
        self.size_bytes, self.where = inner.size_bytes, inner.where
        self._inner, self._tier = inner, tier

    def read_into(self, offset, buffer) -> None:
        self._inner.read_into(offset, buffer)
        if any(offset <= at < offset + memoryview(buffer).nbytes for at in self._tier.bad):
            raise IntegrityError("a bad spot")

    def fileno(self):
        return self._inner.fileno()

    def close(self) -> None:
        self._inner.close()


def node(folder, ssd_bytes: int = 0) -> tuple[StorageNode, GatedTier]:
    slow = GatedTier(RemoteTier("object", f"file://{folder}/object"))
    ssd = DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=ssd_bytes, reserve_bytes=0)
    return StorageNode(folder, (ssd, slow)), slow


def segment_of(streams: Streams, stream, index: int, stop: int = 0):
    """A segment; those before *stop* are asked for later."""
    stop_byte = stream.bytes_of(range(index, max(index + 1, stop))).stop
    return streams.part(stream, stream.bytes_of(range(index, index + 1)), stop_byte)


async def read(streams: Streams, stream, order=None) -> bytes:
    found = {}
    for index in order or range(stream.table.num_segments):
        async with segment_of(streams, stream, index) as view:
            found[index] = bytes(view)
    return b"".join(found[index] for index in sorted(found))


async def open_stream(one: StorageNode, blob: str, client: str = "c"):
    [opened] = await one.opener.open(client, [blob], can_stream=True)
    assert opened.stream is not None, opened
    return opened.stream


async def wait_for(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_readers_get_segments_before_the_blob_has_arrived(tmp_path):
    storage, slow = node(tmp_path)
    async with storage:
        table = await storage.add_blob(PIECES, "object")
        slow.allowed = threading.Semaphore(0)
        opening = asyncio.create_task(open_stream(storage, table.blob_id))
        stream = await opening
        slow.allowed.release()
        async with segment_of(storage.opener.streams, stream, 0) as view:
            assert bytes(view) == PIECES[0]
        assert slow.read_bytes.total() < 24 * SIZE
        for _ in PIECES:
            slow.allowed.release()
        assert await read(storage.opener.streams, stream) == b"".join(PIECES)


async def test_many_readers_and_the_copy_read_the_origin_once(tmp_path):
    storage, slow = node(tmp_path)
    async with storage:
        table = await storage.add_blob(PIECES, "object")
        streams = [
            await open_stream(storage, table.blob_id, f"client {number}") for number in range(8)
        ]
        orders = [list(range(24)), [23, *range(23)], list(reversed(range(24)))]
        results = await asyncio.gather(
            *(
                read(storage.opener.streams, stream, orders[number % 3])
                for number, stream in enumerate(streams)
            )
        )
        assert set(results) == {b"".join(PIECES)}
        await wait_for(lambda: storage.tiers.get("ssd").space().num_files == 1)
        assert slow.read_bytes.total() == 24 * SIZE
        for number in range(8):
            storage.opener.close_client(f"client {number}")
        await wait_for(lambda: not storage.opener.streams.is_streaming(table.blob_id))
        [opened] = await storage.opener.open("late", [table.blob_id], can_stream=True)
        assert (opened.tier, opened.stream) == ("ssd", None)
        os.close(opened.fd)


async def test_without_room_the_blob_passes_through_a_few_buffers(tmp_path):
    storage, slow = node(tmp_path, ssd_bytes=2 * MIB)
    async with storage:
        pieces = [random_bytes(2 * MIB + KIB, seed) for seed in range(NUM_BUFFERS + 4)]
        table = await storage.add_blob(pieces, "object")
        before = storage.slots.space().used_bytes
        stream = await open_stream(storage, table.blob_id)
        assert await read(storage.opener.streams, stream) == b"".join(pieces)
        assert slow.read_bytes.total() == sum(map(len, pieces))
        assert storage.tiers.get("ssd").space().used_bytes == 0
        assert storage.slots.space().used_bytes == before
        storage.opener.release("c", [table.blob_id])
        await wait_for(lambda: not storage.opener.streams.is_streaming(table.blob_id))


async def test_a_damaged_segment_is_an_error_and_not_bytes(tmp_path):
    storage, _ = node(tmp_path, ssd_bytes=2 * MIB)
    async with storage:
        table = await storage.add_blob(PIECES, "object")
        path = await storage.path_of(table.blob_id, "object")
        with path.open("r+b") as file:
            file.seek(5 * SIZE + 7)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        stream = await open_stream(storage, table.blob_id)
        async with segment_of(storage.opener.streams, stream, 4) as view:
            assert bytes(view) == PIECES[4]
        with pytest.raises(IntegrityError, match="segment 5 of blob"):
            async with segment_of(storage.opener.streams, stream, 5):
                pass


async def test_a_store_is_asked_for_as_much_as_a_buffer_holds(tmp_path):
    storage, slow = node(tmp_path, ssd_bytes=2 * MIB)
    async with storage:
        pieces = [random_bytes(MIB, seed) for seed in range(12)]
        table = await storage.add_blob(pieces, "object")
        stream = await open_stream(storage, table.blob_id)
        assert await read(storage.opener.streams, stream) == b"".join(pieces)
        assert slow.num_reads == 3


async def test_who_reads_here_and_there_gets_no_more_than_that(tmp_path):
    storage, slow = node(tmp_path, ssd_bytes=2 * MIB)
    async with storage:
        table = await storage.add_blob(PIECES, "object")
        stream = await open_stream(storage, table.blob_id)
        streams = storage.opener.streams
        for index in (11, 5):
            async with segment_of(streams, stream, index) as view:
                assert bytes(view) == PIECES[index]
        assert slow.read_bytes.total() == 4 * SIZE
        async with segment_of(streams, stream, 16, 20) as view:  # and says what comes next
            assert bytes(view) == PIECES[16]
        await wait_for(lambda: slow.read_bytes.total() == 8 * SIZE)
        async with segment_of(streams, stream, 7):  # reads on after 5
            pass
        await wait_for(lambda: slow.read_bytes.total() > 10 * SIZE)


async def test_what_cannot_be_read_takes_nothing_good_with_it(tmp_path):
    storage, slow = node(tmp_path, ssd_bytes=2 * MIB)
    async with storage:
        table = await storage.add_blob(PIECES, "object")
        stream = await open_stream(storage, table.blob_id)
        slow.bad = range(5 * SIZE + 1, 5 * SIZE + 2)
        streams = storage.opener.streams
        async with segment_of(streams, stream, 4) as view:
            with pytest.raises(IntegrityError, match="a bad spot"):
                async with segment_of(streams, stream, 5):
                    pass
            assert bytes(view) == PIECES[4]
        slow.bad = range(0)
        async with segment_of(streams, stream, 5) as view:
            assert bytes(view) == PIECES[5]


async def test_a_client_without_http_is_told_where_to_go_and_holds_nothing(tmp_path):
    storage, _ = node(tmp_path)
    async with storage:
        table = await storage.add_blob(PIECES, "object")
        [opened] = await storage.opener.open("c", [table.blob_id])
        assert (opened.fd, opened.stream) == (-1, None)
        assert storage.opener.open_bytes() == {}
