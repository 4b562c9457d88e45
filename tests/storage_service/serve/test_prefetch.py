"""What plans need is fetched in time, also while nothing else happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from forebay_server.ahead import Ahead
from forebay_server.serve import prefetch
from forebay_server.testing.faults import FaultyTier
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MIB

SSD_BYTES = 5 * MIB // 2
"""Room for two blobs."""


@asynccontextmanager
async def reading_ahead(folder: Path) -> AsyncIterator[tuple[StorageNode, FaultyTier, Ahead]]:
    ssd = DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=SSD_BYTES, reserve_bytes=0)
    store = FaultyTier(RemoteTier("object", f"file://{folder}/object"))
    async with StorageNode(folder, (ssd, store)) as node:
        ahead = Ahead(node.tiers, node.catalog, node.opener)
        running = asyncio.create_task(ahead.run())
        try:
            yield node, store, ahead
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def blobs_in_store(node: StorageNode, number: int) -> list[str]:
    tables = [await node.add_blob([random_bytes(MIB, seed)], "object") for seed in range(number)]
    return [table.blob_id for table in tables]


async def test_what_is_too_early_for_the_room_of_others_is_fetched_when_its_time_comes(
    tmp_path: Path,
) -> None:
    async with reading_ahead(tmp_path) as (node, _, ahead):
        blobs = await blobs_in_store(node, 3)
        name = new_random_name()
        await ahead.plans.register(name, "a test", None, 0, 0)
        ahead.plans.add_ranges(name, 0, [(1, [one]) for one in blobs])
        await wait_for(lambda: ahead.prefetcher.num_fetched == 2)
        await asyncio.sleep(1.5)  # a slow step: so long will the next one take, too
        ahead.plans.advance(name, 0, 1)
        assert ahead.prefetcher.num_fetched == 2
        await wait_for(lambda: ahead.prefetcher.num_fetched == 3)
        [plan] = ahead.plans.all
        assert plan.position == 1


async def test_what_could_not_be_fetched_is_tried_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "RETRY_SECONDS", 0.3)
    async with reading_ahead(tmp_path) as (node, store, ahead):
        [blob] = await blobs_in_store(node, 1)
        store.fail("read", times=1)
        name = new_random_name()
        await ahead.plans.register(name, "a test", None, 0, 0)
        ahead.plans.add_ranges(name, 0, [(1, [blob])])
        await wait_for(lambda: store.calls["read"] + store.calls["read_whole"] > 0)
        ahead.prefetcher._wake_in(0.02)  # something else is due before
        await wait_for(lambda: ahead.prefetcher.num_fetched == 1)
