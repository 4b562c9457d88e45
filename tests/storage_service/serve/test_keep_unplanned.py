"""What a small tier keeps of what no plan announced: epochs, one-shot scans, checkpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from forebay_server.ahead import Ahead
from forebay_server.catalog.queries_checkpoints import open_attempt
from forebay_server.catalog.tables import generations, manifest_blobs, manifests
from forebay_server.model.watermarks import Watermarks
from forebay_server.serve.open import OpenedBlob
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB

BLOB_BYTES = 64 * KIB
FILE_BYTES = BLOB_BYTES + 4096
NUM_FIT = 8
NUM_BLOBS = 12


@asynccontextmanager
async def open_node(
    folder: Path, marks: Watermarks | None = None
) -> AsyncIterator[tuple[StorageNode, Ahead]]:
    """A node whose local tier holds :data:`NUM_FIT` blobs; nothing runs in the background."""
    limit = NUM_FIT * FILE_BYTES
    tiers = (
        DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=limit, reserve_bytes=0),
        RemoteTier("object", f"file://{folder}/object"),
    )
    async with StorageNode(folder, tiers) as node:
        ahead = Ahead(
            node.tiers, node.catalog, node.opener, marks=marks or Watermarks(1.0, 1.0, 1.0)
        )
        await ahead.evictor.keep_marks(node.tiers.get("ssd"))
        yield node, ahead


async def add(node: StorageNode, first: int, number: int) -> list[str]:
    return [
        (await node.add_blob([random_bytes(BLOB_BYTES, seed)], "object")).blob_id
        for seed in range(first, first + number)
    ]


async def scan(node: StorageNode, blobs: Sequence[str]) -> list[bool]:
    """Read *blobs* one after the other; whether the local tier had each."""
    hits = []
    for blob in blobs:
        hits.append("ssd" in {replica.tier for replica in (await node.locate(blob)).live()})
        [opened] = await node.opener.open("reader", [blob])
        assert isinstance(opened, OpenedBlob)
        opened.close()
        node.opener.release("reader", [blob])
    return hits


async def cached(node: StorageNode, blobs: Sequence[str]) -> set[str]:
    located = await node.catalog.locate(list(blobs))
    return {blob for blob in blobs if "ssd" in {one.tier for one in located[blob].live()}}


async def test_epochs_over_more_than_fits_keep_a_part(tmp_path: Path) -> None:
    async with open_node(tmp_path) as (node, ahead):
        blobs = await add(node, 0, NUM_BLOBS)
        assert not any(await scan(node, blobs))
        kept = await cached(node, blobs)
        assert len(kept) >= NUM_FIT - 1
        for _ in range(4):
            assert sum(await scan(node, blobs)) >= NUM_FIT - 2
        assert len(kept & await cached(node, blobs)) >= NUM_FIT - 2
        assert ahead.evictor.evicted_bytes["ssd"] <= 2 * FILE_BYTES


async def test_epochs_keep_a_part_between_fill_levels_too(tmp_path: Path) -> None:
    """Each epoch, the evictor looks as well: it must not take what the next one needs."""
    async with open_node(tmp_path, Watermarks(0.7, 0.8, 0.95)) as (node, ahead):
        ssd = node.tiers.get("ssd")
        blobs = await add(node, 0, NUM_BLOBS)
        hits = []
        for _ in range(5):
            hits.append(sum(await scan(node, blobs)))
            await ahead.evictor.keep_marks(ssd)
        least = int(0.7 * NUM_FIT) - 1
        assert all(found >= least for found in hits[1:])


async def test_one_shot_reads_leave_what_epochs_need(tmp_path: Path) -> None:
    async with open_node(tmp_path) as (node, _):
        blobs = await add(node, 0, NUM_BLOBS)
        for _ in range(3):
            await scan(node, blobs)
        kept = await cached(node, blobs)
        await scan(node, await add(node, 1000, 2 * NUM_BLOBS))
        assert len(kept & await cached(node, blobs)) >= len(kept) - 1
        assert sum(await scan(node, blobs)) >= NUM_FIT - 3


@pytest.mark.parametrize("is_checkpoint", [False, True])
async def test_a_checkpoint_read_again_and_again_takes_no_room(
    tmp_path: Path, is_checkpoint: bool
) -> None:
    """As data it would drive out what was read before and is read no more."""
    async with open_node(tmp_path) as (node, _):
        blobs = await add(node, 0, NUM_FIT)
        for _ in range(2):
            await scan(node, blobs)
        kept = await cached(node, blobs)
        others = await add(node, 1000, NUM_FIT)
        if is_checkpoint:
            await name_generation(node, others)
        for _ in range(12):
            await scan(node, others)
        left = len(kept & await cached(node, blobs))
        assert (left == len(kept)) == is_checkpoint


async def name_generation(node: StorageNode, blobs: Sequence[str]) -> None:
    """A generation that consists of *blobs*."""

    def insert(connection: object) -> None:
        open_attempt(connection, "r", None, 1, new_random_name())
        manifest = "ab" * 32
        connection.execute(manifests.insert().values(manifest=manifest, kind=1, data=b""))
        connection.execute(
            manifest_blobs.insert(), [{"manifest": manifest, "blob": blob} for blob in blobs]
        )
        connection.execute(
            generations.insert().values(
                run="r", attempt=1, step=1, state="committed", num_ranks=1, manifest=manifest
            )
        )

    await node.catalog.write(insert)
