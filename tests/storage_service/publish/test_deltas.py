"""Packs in the object tier as differences from the ones before: less is stored, nothing is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from forebay_server.catalog.queries_blobs import Replica
from forebay_server.catalog.queries_jobs import COLLECT, DELETE
from forebay_server.model.deltas import MAX_LAYERS
from forebay_server.model.encodings import AUTO, PIECES
from forebay_server.model.extents import ObjectBlob
from forebay_server.publish.recovery import recover
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.tier.encode import open_plain, read_list
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.verify import verify_file
from forebay_wire.ids import GenerationId
from forebay_wire.limits import KIB

PACK_BYTES = 512 * KIB


def at(step: int, attempt: int = 1) -> GenerationId:
    return GenerationId(RUN, attempt, step)


def weights(seed: int = 0, num_bytes: int = PACK_BYTES) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, num_bytes // 4).astype("<f4")


def history(num_steps: int, seed: int = 0) -> list[bytes]:
    """Packs of a run that learns slowly: each is a little off the one before."""
    rng = np.random.default_rng(seed)
    state = weights(seed)
    found = []
    for _ in range(num_steps):
        found.append(state.tobytes())
        state = state * (1 + rng.normal(0, 1e-5, state.size)).astype("<f4")
    return found


@asynccontextmanager
async def open_node(folder: Path, **options: object) -> AsyncIterator[CheckpointNode]:
    tier = RemoteTier("object", f"file://{folder / 'object'}")
    tier.encoding = AUTO
    async with open_checkpoints(
        folder, with_object=False, object_tier=tier, grace_seconds=-1, **options
    ) as node:
        yield node


async def save_all(node: CheckpointNode, packs: list[bytes]) -> None:
    await node.begin()
    for step, data in enumerate(packs):
        await node.wait(await node.save(step, [data]), "remote")


async def remote_copy(node: CheckpointNode, step: int) -> Replica:
    blob = (await node.manifest(at(step))).packs[0].blob
    located = (await node.storage.catalog.locate([blob]))[blob]
    [found] = [one for one in located.live() if one.tier == "object"]
    return found


async def remote_list(node: CheckpointNode, step: int) -> ObjectBlob:
    blob = (await node.manifest(at(step))).packs[0].blob
    tier = node.storage.tiers.get("object")
    return read_list(tier, "", blob)


async def read_remote(node: CheckpointNode, step: int) -> bytes:
    """The first pack of a generation out of the object tier, verified."""
    blob = (await node.manifest(at(step))).packs[0].blob
    copy = await remote_copy(node, step)
    tier = node.storage.tiers.get("object")
    with open_plain(tier, copy.extents[0].file, copy.encoding, blob) as reader:
        data = bytearray(verify_file(reader, blob).total_bytes)
        reader.read_into(0, data)
    return bytes(data)


def num_layers(found: ObjectBlob) -> int:
    return 1 + max(one.layer for one in found.extents)


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "object" / "data").iterdir())


async def test_a_run_that_learns_slowly_is_stored_as_differences(tmp_path: Path) -> None:
    packs = history(2 * MAX_LAYERS + 1)
    async with open_node(tmp_path) as node:
        await save_all(node, packs)
        lists = [await remote_list(node, step) for step in range(len(packs))]
        assert [num_layers(one) for one in lists] == [1, 2, 3, 4, 1, 2, 3, 4, 1]
        sizes = [one.extents[0].file_bytes for one in lists]
        assert max(sizes[1:4]) < 0.75 * sizes[0]
        assert [await read_remote(node, step) for step in range(len(packs))] == packs
        assert (await remote_copy(node, 3)).encoding == PIECES


async def test_what_others_are_differences_from_outlives_its_generation(tmp_path: Path) -> None:
    packs = history(4)
    async with open_node(tmp_path) as node:
        await save_all(node, packs)
        for step in (0, 1, 2):
            await node.checkpoints.delete_generation_now(at(step))
        await node.settle(DELETE, COLLECT)
        assert await read_remote(node, 3) == packs[3]
        assert len({one.file for one in (await remote_list(node, 3)).extents}) == 4
        found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "recovered")
        assert (found.num_generations, found.left_out) == (1, [])
        await node.checkpoints.delete_run_now(RUN)
        await node.settle(DELETE, COLLECT)
        assert stored_bytes(tmp_path) == 0
