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
from forebay_server.tier.wrap import TierWrapper
from forebay_wire.errors import IntegrityError
from forebay_wire.limits import KIB, MIB

PIECES = [random_bytes(512 * KIB, seed) for seed in range(24)]


class GatedTier(TierWrapper):
    """Counts the bytes that are read of it, and lets through as many large reads as are allowed."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.read_bytes: Counter[str] = Counter()
        self.allowed = threading.Semaphore(1_000_000)

    @contextmanager
    def around(self, operation, name, num_bytes):
        if operation == "read_into" and num_bytes > 64 * KIB:
            assert self.allowed.acquire(timeout=60)
            self.read_bytes[name] += num_bytes
        yield


def node(folder, ssd_bytes: int = 0) -> tuple[StorageNode, GatedTier]:
    slow = GatedTier(RemoteTier("object", f"file://{folder}/object"))
    ssd = DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=ssd_bytes, reserve_bytes=0)
    return StorageNode(folder, (ssd, slow)), slow


async def read(streams: Streams, stream, order=None) -> bytes:
    found = {}
    for index in order or range(stream.table.num_segments):
        async with streams.segment(stream, index) as view:
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
        async with storage.opener.streams.segment(stream, 0) as view:
            assert bytes(view) == PIECES[0]
        assert slow.read_bytes.total() < 24 * 512 * KIB
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
        assert slow.read_bytes.total() == 24 * 512 * KIB
        for number in range(8):
            storage.opener.close_client(f"client {number}")
        await wait_for(lambda: not storage.opener.streams.is_streaming(table.blob_id))
        [opened] = await storage.opener.open("late", [table.blob_id], can_stream=True)
        assert (opened.tier, opened.stream) == ("ssd", None)
        os.close(opened.fd)


async def test_without_room_the_blob_passes_through_a_few_buffers(tmp_path):
    storage, slow = node(tmp_path, ssd_bytes=2 * MIB)
    async with storage:
        pieces = [random_bytes(1 * MIB, seed) for seed in range(NUM_BUFFERS + 8)]
        table = await storage.add_blob(pieces, "object")
        before = storage.slots.space().used_bytes
        stream = await open_stream(storage, table.blob_id)
        assert await read(storage.opener.streams, stream) == b"".join(pieces)
        assert slow.read_bytes.total() == len(pieces) * MIB
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
            file.seek(5 * 512 * KIB + 7)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        stream = await open_stream(storage, table.blob_id)
        async with storage.opener.streams.segment(stream, 4) as view:
            assert bytes(view) == PIECES[4]
        with pytest.raises(IntegrityError, match="segment 5 of blob"):
            async with storage.opener.streams.segment(stream, 5):
                pass


async def test_a_client_without_http_is_told_where_to_go_and_holds_nothing(tmp_path):
    storage, _ = node(tmp_path)
    async with storage:
        table = await storage.add_blob(PIECES, "object")
        [opened] = await storage.opener.open("c", [table.blob_id])
        assert (opened.fd, opened.stream) == (-1, None)
        assert storage.opener.open_bytes() == {}
