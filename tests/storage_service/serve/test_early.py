"""Copies that are read before they are durable: at once, by all, and gone if that fails."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from forebay_server.serve.open import OpenedBlob
from forebay_server.serve.promote import places_of
from forebay_server.testing.faults import StallingTier
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_wire.errors import ForebayError

PIECES = [random_bytes(300_000, 1), random_bytes(200_001, 2)]
DATA = b"".join(PIECES)


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


@pytest.fixture
def ssd(tmp_path: Path, gate: threading.Event) -> StallingTier:
    """Publishes while the gate is open."""
    inner = DirectoryTier("ssd", "ssd", tmp_path / "ssd", reserve_bytes=0)
    return StallingTier(inner, "publish", gate)


@pytest.fixture
def slow(tmp_path: Path) -> StallingTier:
    """Counts its reads."""
    always = threading.Event()
    always.set()
    return StallingTier(RemoteTier("object", f"file://{tmp_path}/object"), "", always)


async def read(node: StorageNode, blob: str, client: str) -> str:
    [opened] = await node.opener.open(client, [blob])
    if isinstance(opened, ForebayError):
        raise opened
    return check(opened)


def check(opened: OpenedBlob) -> str:
    with os.fdopen(opened.fd, "rb") as file:
        assert file.read(opened.length) == DATA
        assert len(file.read()) > opened.table_length
    return opened.tier


async def tiers_of(node: StorageNode, blob: str) -> set[str]:
    return {one.tier for one in (await node.locate(blob)).live()}


async def test_a_reader_does_not_wait_until_its_copy_is_durable(
    tmp_path: Path, ssd: StallingTier, slow: StallingTier, gate: threading.Event
) -> None:
    async with StorageNode(tmp_path, (ssd, slow)) as node:
        blob = (await node.add_blob(PIECES, "object")).blob_id
        try:
            async with asyncio.timeout(30):
                assert await read(node, blob, "one") == "ssd"
                num_reads = slow.calls["read_into"]
                assert await read(node, blob, "two") == "ssd"
                cached = node.opener.open_cached("three", [blob])
                [source] = places_of(await node.locate(blob))
                ahead = asyncio.create_task(node.opener.bring_ahead(source, ssd))
                await asyncio.sleep(0)
                assert not ahead.done()  # it waits until the copy is durable
            assert cached is not None
            assert check(cached[0]) == "ssd"
            assert slow.calls["read_into"] == num_reads
            assert await tiers_of(node, blob) == {"object"}  # nobody is told of it yet
            assert list(ssd.list()) == []
        finally:
            gate.set()
        await node.opener.settle()
        await ahead
        assert await tiers_of(node, blob) == {"object", "ssd"}
        assert await read(node, blob, "four") == "ssd"
        assert slow.calls["read_into"] == num_reads
        assert ssd.space().reserved_bytes == 0


async def test_a_copy_that_does_not_become_durable_is_forgotten_and_its_readers_go_on(
    tmp_path: Path, ssd: StallingTier, slow: StallingTier, gate: threading.Event
) -> None:
    async with StorageNode(tmp_path, (ssd, slow)) as node:
        blob = (await node.add_blob(PIECES, "object")).blob_id
        ssd.fail("publish", code=errno.EIO)
        [opened] = await node.opener.open("one", [blob])
        gate.set()
        await node.opener.settle()
        assert isinstance(opened, OpenedBlob)
        assert check(opened) == "ssd"
        assert await tiers_of(node, blob) == {"object"}
        assert list(ssd.list()) == []
        assert ssd.space().reserved_bytes == 0
        assert await read(node, blob, "two") == "ssd"
        await node.opener.settle()
        assert await tiers_of(node, blob) == {"object", "ssd"}


async def test_an_end_waits_for_what_is_on_its_way(
    tmp_path: Path, ssd: StallingTier, slow: StallingTier, gate: threading.Event
) -> None:
    async with StorageNode(tmp_path, (ssd, slow)) as node:
        blob = (await node.add_blob(PIECES, "object")).blob_id
        await read(node, blob, "one")
        closing = asyncio.create_task(node.opener.close())
        done, _ = await asyncio.wait([closing], timeout=0.2)
        assert not done
        gate.set()
        await closing
        assert await tiers_of(node, blob) == {"object", "ssd"}


async def test_a_blob_with_a_flipped_bit_is_not_handed_over(
    tmp_path: Path, ssd: StallingTier, slow: StallingTier, gate: threading.Event
) -> None:
    gate.set()
    async with StorageNode(tmp_path, (ssd, slow)) as node:
        blob = (await node.add_blob(PIECES, "object")).blob_id
        [stored] = [path for path in (tmp_path / "object" / "data").rglob("*") if path.is_file()]
        content = bytearray(stored.read_bytes())
        content[400_000] ^= 1
        stored.write_bytes(content)
        with pytest.raises(ForebayError, match="no undamaged replica"):
            await read(node, blob, "one")
        assert list(ssd.list()) == []
        assert ssd.space().reserved_bytes == 0
