"""An eviction that is killed at every named step: what another tier has is read there, what only
this tier has stays, and the next start leaves no row without its file and no file without its
row."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from forebay_server.ahead import Ahead
from forebay_server.catalog.queries_blobs import known_files
from forebay_server.publish.reconcile import reconcile
from forebay_server.serve.open import OpenedBlob
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.testing.warm import WarmPython
from forebay_server.tier.verify import verify_file
from forebay_wire.failpoints import EVICT, VARIABLE
from forebay_wire.limits import KIB, MIB

PROGRAM = Path(__file__).with_name("evict_some.py")


async def check(node: StorageNode, blobs: list[str]) -> None:
    """All is readable from every copy that a row names, and for a client."""
    for seed, blob in enumerate(blobs):
        for replica in (await node.locate(blob)).live():
            tier = node.tiers.get(replica.tier)
            with tier.read(tier.blob_name(replica.extents[0].file)) as reader:
                verify_file(reader, blob)
        [opened] = await node.opener.open("reader", [blob])
        assert isinstance(opened, OpenedBlob), opened
        assert os.pread(opened.fd, opened.length, 0) == random_bytes(64 * KIB, seed)
        opened.close()
    node.opener.close_client("reader")


async def files_and_rows(node: StorageNode) -> tuple[set[str], set[str]]:
    ssd = node.tiers.get("ssd")
    rows = await node.catalog.read(lambda connection: set(known_files(connection, "ssd")))
    return {info.name for info in ssd.list()}, rows


@pytest.mark.parametrize("point", [*EVICT, *(f"{point}:3" for point in EVICT)])
async def test_an_eviction_that_is_killed_loses_nothing(
    point: str, tmp_path: Path, warm_server: WarmPython
) -> None:
    killed = await asyncio.to_thread(warm_server.run, [PROGRAM, tmp_path], {VARIABLE: point})
    assert killed.returncode == -signal.SIGKILL, "the failpoint was not passed"
    *clean, dirty = killed.stdout.split()
    async with StorageNode(tmp_path) as node:
        # As a start of the daemon does it.
        await reconcile(node.catalog, node.tiers)
        files, rows = await files_and_rows(node)
        assert files == rows
        assert "ssd" in {one.tier for one in (await node.locate(dirty)).live()}
        await check(node, [*clean, dirty])
        # And the next one goes on, also with what the reads above brought back meanwhile.
        (left,) = (await node.locate(dirty)).live()
        ahead = Ahead(node.tiers, node.catalog, node.opener)
        async with asyncio.timeout(60):
            while await files_and_rows(node) != ({left.extents[0].file}, {left.extents[0].file}):
                await ahead.evictor.make_room(node.tiers.get("ssd"), 64 * MIB)
                await asyncio.sleep(0.05)
        await check(node, [*clean, dirty])
