"""Eviction: only what another tier has, never what is open or pinned; limits hold under load."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from forebay_server.ahead import Ahead
from forebay_server.model.watermarks import Watermarks
from forebay_server.publish.lease import Uploads
from forebay_server.publish.session import Piece
from forebay_server.testing.faults import FaultyTier
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.health import GuardedTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import HEALTHY
from forebay_wire.errors import DaemonUnavailable, ForebayError, ResourceExhausted
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB, MIB

UID = 1000
BLOB_BYTES = 256 * KIB
WHOLE = Watermarks(1.0, 1.0, 1.0)


@asynccontextmanager
async def open_node(folder: Path, ssd_bytes: int, marks: Watermarks = WHOLE):
    """A node with one local tier of *ssd_bytes* and all that looks ahead."""
    ssd = DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=ssd_bytes, reserve_bytes=0)
    tiers = (ssd, RemoteTier("object", f"file://{folder}/object"))
    async with StorageNode(folder, tiers) as node:
        ahead = Ahead(node.tiers, node.catalog, node.opener, marks=marks)
        yield node, ahead


async def add(node: StorageNode, seed: int, *tiers: str) -> str:
    table = await node.add_blob([random_bytes(BLOB_BYTES, seed)], *tiers)
    return table.blob_id


async def tiers_of(node: StorageNode, blob: str) -> set[str]:
    return {replica.tier for replica in (await node.locate(blob)).live()}


async def test_only_copies_of_what_another_tier_has_go(tmp_path):
    async with open_node(tmp_path, 64 * MIB) as (node, ahead):
        clean = [await add(node, seed, "ssd", "object") for seed in range(4)]
        dirty = await add(node, 10, "ssd")
        freed = await ahead.evictor.make_room(node.tiers.get("ssd"), 64 * MIB)
        assert freed >= 4 * BLOB_BYTES
        for blob in clean:
            assert await tiers_of(node, blob) == {"object"}
        assert await tiers_of(node, dirty) == {"ssd"}
        assert node.tiers.get("ssd").space().num_files == 1


async def test_what_a_client_has_open_stays_until_it_is_released(tmp_path):
    async with open_node(tmp_path, 64 * MIB) as (node, ahead):
        blob = await add(node, 1, "ssd", "object")
        [opened] = await node.opener.open("c", [blob])
        opened.close()
        ssd = node.tiers.get("ssd")
        assert await ahead.evictor.make_room(ssd, 1) == 0
        node.opener.release("c", [blob])
        assert await ahead.evictor.make_room(ssd, 1) >= BLOB_BYTES


async def test_fill_levels_have_hysteresis(tmp_path):
    async with open_node(tmp_path, 10 * (BLOB_BYTES + 8192), Watermarks(0.5, 0.8, 0.9)) as (
        node,
        ahead,
    ):
        ssd = node.tiers.get("ssd")
        await ahead.evictor.reload()
        for seed in range(7):
            await add(node, seed, "ssd", "object")
        assert await ahead.evictor.keep_marks(ssd) == 0
        for seed in range(7, 10):
            await add(node, seed, "ssd", "object")
        await ahead.evictor.reload()
        assert await ahead.evictor.keep_marks(ssd) > 0
        assert ssd.space().used_bytes <= 0.5 * ssd.space().limit_bytes


async def test_a_full_tier_gives_up_its_cache_for_an_upload_and_then_refuses(tmp_path):
    async with open_node(tmp_path, 4 * MIB) as (node, _):
        blobs = [await add(node, seed, "ssd", "object") for seed in range(12)]
        uploads = Uploads(node.catalog, node.tiers, lease_seconds=60)
        await uploads.start()
        try:
            await uploads.begin(UID, "run r", 3 * MIB, MIB)
            assert {"object"} in [await tiers_of(node, blob) for blob in blobs]
            with pytest.raises(ResourceExhausted, match=r"bytes needed.*cached copies were given"):
                await uploads.begin(UID, "run r", 3 * MIB, MIB)
        finally:
            await uploads.close()


async def test_copies_in_a_tier_that_cannot_be_reached_do_not_count(tmp_path):
    """Neither in one out of service nor in one that is found to be away only now."""
    ssd = DirectoryTier("ssd", "ssd", tmp_path / "ssd", limit_bytes=64 * MIB, reserve_bytes=0)
    faulty = FaultyTier(RemoteTier("object", f"file://{tmp_path}/object"))
    store = GuardedTier(faulty, clock=lambda: next(seconds))
    seconds = count(0, 60)  # no answer is from just now
    async with StorageNode(tmp_path, (ssd, store)) as node:
        evictor = Ahead(node.tiers, node.catalog, node.opener, marks=WHOLE).evictor
        blobs = [await add(node, seed, "ssd", "object") for seed in range(3)]
        for code in (errno.EHOSTUNREACH, errno.ENODEV):
            await evictor.reload()
            faulty.fail("head", code=code)
            assert await evictor.evict(ssd, blobs) == 0
            store.ask()
        assert store.health != HEALTHY
        await evictor.reload()
        assert await evictor.make_room(ssd, 64 * MIB) == 0
        for blob in blobs:
            assert await tiers_of(node, blob) == {"ssd", "object"}
        assert store.probe()
        await evictor.reload()
        assert await evictor.make_room(ssd, 64 * MIB) >= 3 * BLOB_BYTES


async def test_a_catalog_that_is_away_for_a_while_does_not_end_it(tmp_path, monkeypatch):
    async with open_node(tmp_path, 20 * BLOB_BYTES) as (_, ahead):
        evictor, reload, calls = ahead.evictor, ahead.evictor.reload, []

        async def reload_or_fail() -> None:
            calls.append(1)
            if len(calls) < 3:
                raise DaemonUnavailable("the catalog's server is away")
            await reload()

        monkeypatch.setattr(evictor, "reload", reload_or_fail)
        running = asyncio.create_task(evictor.run())
        async with asyncio.timeout(20):
            while len(calls) < 3:  # noqa: ASYNC110 - it looks again by a clock
                await asyncio.sleep(0.05)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def read_some(node: StorageNode, blobs: list[str], number: int) -> None:
    for turn in range(6):
        wanted = [blobs[(7 * number + 3 * turn + step) % len(blobs)] for step in range(3)]
        for opened in await node.opener.open(f"c{number}", wanted):
            if not isinstance(opened, ForebayError):
                assert os.pread(opened.fd, 1, 0)
                opened.close()
        await asyncio.sleep(0.01)
        node.opener.close_client(f"c{number}")


async def push_some(uploads: Uploads, number: int) -> None:
    for turn in range(3):
        data = random_bytes(BLOB_BYTES, 1000 + 10 * number + turn)
        try:
            grant = await uploads.begin(UID, f"run {number}", len(data), len(data))
        except ResourceExhausted:
            continue
        uploads.slot(grant.session, UID).view[: len(data)] = data
        await uploads.seal(grant.session, UID, Piece(0, len(data), (len(data),)))


@asynccontextmanager
async def sampled(folder: Path):
    """The most bytes that the files of *folder* take at any time inside, as the only item."""
    highest = [0]
    done = asyncio.Event()

    async def sample() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], await asyncio.to_thread(allocated, folder))
            await asyncio.sleep(0.002)

    sampling = asyncio.create_task(sample())
    try:
        yield highest
    finally:
        done.set()
        await sampling


async def test_the_limit_holds_while_many_push_hold_and_prefetch(tmp_path):
    """16 clients upload, open and close what does and does not fit, while a plan is followed."""
    limit = 6 * MIB
    async with open_node(tmp_path, limit, Watermarks(0.7, 0.8, 0.95)) as (node, ahead):
        blobs = [await add(node, seed, "object") for seed in range(40)]
        plan = new_random_name()
        await ahead.plans.register(plan, "test", None, 0, 0)
        ahead.plans.add_ranges(plan, 0, [(1, [one]) for one in blobs * 3])
        uploads = Uploads(node.catalog, node.tiers, lease_seconds=60)
        await uploads.start()

        async def advance() -> None:
            for position in range(1, 100, 3):
                ahead.plans.advance(plan, 0, position)
                await asyncio.sleep(0.02)

        background = asyncio.create_task(ahead.run())
        try:
            async with sampled(tmp_path / "ssd") as highest, asyncio.TaskGroup() as group:
                for number in range(8):
                    group.create_task(read_some(node, blobs, number))
                    group.create_task(push_some(uploads, number))
                group.create_task(advance())
        finally:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
            await uploads.close()
        assert 0 < highest[0] <= limit
        assert ahead.prefetcher.num_fetched > 0


def allocated(folder: Path) -> int:
    """Bytes that the files of a tier take on disk, unfinished ones included: of those that were
    there before and after one moment, each once, whatever its names were."""
    before, after = _files_in(folder), _files_in(folder)
    return sum(num_bytes for file, num_bytes in after.items() if file in before)


def _files_in(folder: Path) -> dict[int, int]:
    """Inode to its bytes on disk."""
    found = {}
    for path, _, names in os.walk(folder):
        if Path(path) == folder:
            continue  # the volume's own small files
        for name in names:
            try:
                status = os.stat(os.path.join(path, name))
            except FileNotFoundError:
                continue
            found[status.st_ino] = status.st_blocks * 512
    return found
