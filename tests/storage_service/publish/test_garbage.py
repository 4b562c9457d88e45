"""What nothing names any more goes, from everywhere, and nothing else does."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_blobs import remove_replica
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    DELETE,
    GARBAGE,
    Job,
    enqueue,
    list_jobs,
)
from forebay_server.catalog.queries_objects import insert_object_replica
from forebay_server.locks import NamedLocks
from forebay_server.model.extents import ObjectBlob
from forebay_server.move.collect import Collector
from forebay_server.move.jobs import Progress
from forebay_server.publish.recovery import Recovered, recover
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.tier.store import FileInfo
from forebay_wire.errors import Conflict, NotFound
from forebay_wire.ids import GenerationId
from forebay_wire.limits import MIB


def objects(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "object" / kind).glob("*"))


async def save_remote(node: CheckpointNode, step: int, *packs: bytes, attempt: int = 1) -> None:
    saved = await node.save(step, list(packs), attempt=attempt)
    assert (await node.wait(saved, "remote")).durability == "remote"


async def rebuild(folder: Path, target: Path) -> Recovered:
    """Lose everything but the object tier, and recover into *target*."""
    return await recover(f"file://{folder / 'object'}", target)


async def test_a_deleted_generation_leaves_every_place_but_what_others_share(
    tmp_path: Path,
) -> None:
    frozen = os.urandom(MIB)
    async with open_checkpoints(tmp_path) as node:
        await node.begin(num_ranks=2)
        own = [os.urandom(1000) for _ in range(2)]
        await save_remote(node, 1, frozen, own[0])
        await save_remote(node, 2, frozen, own[1])
        assert await node.checkpoints.delete_generation(GenerationId(RUN, 1, 1)) == 1
        assert await node.checkpoints.delete_generation(GenerationId(RUN, 1, 1)) == 0
        await node.settle(DELETE, COLLECT)
        assert await node.restore(GenerationId(RUN, 1, 2)) == [frozen, own[1]]
        assert len(node.storage.files()) == 2
    assert len(objects(tmp_path, "manifests")) == 1
    assert len(objects(tmp_path, "blobs")) == len(objects(tmp_path, "data")) == 2
    found = await rebuild(tmp_path, tmp_path / "recovered")
    assert (found.num_generations, found.left_out) == (1, [])


async def test_the_newest_can_be_deleted_and_latest_is_the_one_before(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        for step in (1, 2, 3):
            await node.wait(await node.save(step, [os.urandom(100)]))
        await node.checkpoints.delete_generation(GenerationId(RUN, 1, 3))
        assert await node.latest() == "1/2"
        await node.begin((1, 2))
        with pytest.raises(Conflict, match="is what attempt 2 restored"):
            await node.checkpoints.delete_generation(GenerationId(RUN, 1, 2))
        await node.wait(await node.save(3, [os.urandom(100)], attempt=2))
        await node.checkpoints.delete_generation(GenerationId(RUN, 1, 2))
        assert await node.latest() == "2/3"
        assert await node.latest(skip=("2/3",)) == "1/1"


async def test_a_deleted_run_is_gone_with_everything(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(100))
        await node.wait(await node.save(2, [os.urandom(100)]))
        half = await node.plan(GenerationId(RUN, 1, 3), 100)
        assert await node.checkpoints.delete_run(RUN) == 3
        with pytest.raises(NotFound):
            await node.latest()
        with pytest.raises(NotFound):
            await node.seal(half, bytes(100))
        await node.settle(DELETE, COLLECT)
        assert node.storage.files() == objects(tmp_path, "data") == []
        assert objects(tmp_path, "manifests") == objects(tmp_path, "blobs") == []
        assert (await node.begin()).attempt == 2  # a name is used once
        await node.wait(await node.save(1, [os.urandom(100)], attempt=2), "remote")


async def test_a_blob_that_a_client_has_open_stays_until_it_is_released(tmp_path: Path) -> None:
    is_open = True
    async with open_checkpoints(tmp_path, is_open=lambda blob: is_open) as node:
        await node.begin()
        await node.wait(await node.save(1, [os.urandom(100)]))
        await node.checkpoints.delete_run(RUN)
        refused = await node.storage.catalog.wait_until(_refused_collection, 20)
        assert refused is not None
        assert "1 deleted blobs are still open" in refused
        assert len(node.storage.files()) == 1
        is_open = False
        await node.settle(COLLECT)
        assert node.storage.files() == []


def _refused_collection(connection: Connection) -> str | None:
    return next((job.error for job in list_jobs(connection, 10) if job.error), None)


async def test_stray_files_go_after_the_grace_period_and_not_before(tmp_path: Path) -> None:
    names = ["0" * 32, "1" * 32]

    async def scatter(node: CheckpointNode) -> None:
        node.storage.tiers.landing[0].put(names[0], b"stray")
        assert node.storage.tiers.object is not None
        node.storage.tiers.object.put(f"data/{names[1]}", b"stray")

    async with open_checkpoints(tmp_path) as node:
        await node.settle(COLLECT)
        await scatter(node)
        await node.storage.catalog.write(lambda c: enqueue(c, COLLECT, GARBAGE))
        node.jobs.wake()
        await node.settle(COLLECT)
        assert node.storage.files() == names[:1]
        assert len(objects(tmp_path, "data")) == 1
    async with open_checkpoints(tmp_path, grace_seconds=-1) as node:
        await node.settle(COLLECT)
        assert node.storage.files() == []
    assert objects(tmp_path, "data") == []


async def test_what_becomes_garbage_after_the_start_goes_without_another_one(
    tmp_path: Path,
) -> None:
    async with open_checkpoints(tmp_path, grace_seconds=-1, repeat_seconds=0.2) as node:
        await node.settle(COLLECT)
        assert node.storage.tiers.object is not None
        node.storage.tiers.object.put(f"data/{'1' * 32}", b"what a killed flush left")
        stray = tmp_path / "object" / "data" / ("1" * 32)
        async with asyncio.timeout(20):
            while stray.exists():  # noqa: ASYNC110 - the search runs by a clock
                await asyncio.sleep(0.02)


async def test_a_scheduled_search_is_no_work_to_wait_for_and_can_be_asked_for(
    tmp_path: Path,
) -> None:
    async with open_checkpoints(tmp_path, grace_seconds=-1) as node:
        await node.settle(COLLECT)
        catalog = node.storage.catalog
        assert await catalog.read(lambda connection: list_jobs(connection, 10)) == []
        node.storage.tiers.landing[0].put("0" * 32, b"stray")
        await catalog.write(lambda c: enqueue(c, COLLECT, GARBAGE))
        node.jobs.wake()
        await node.settle(COLLECT)
        assert node.storage.files() == []


async def test_another_daemons_objects_are_not_stray(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path / "first") as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(MIB))
    shutil.move(tmp_path / "first" / "object", tmp_path / "second" / "object")
    async with open_checkpoints(tmp_path / "second", grace_seconds=-1) as node:
        await node.settle(COLLECT)
    assert len(objects(tmp_path / "second", "data")) == 1


async def test_an_old_object_that_a_flush_takes_over_meanwhile_is_not_stray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush was killed after its extent list; it goes on while stray objects are searched."""
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(MIB))
        tier, catalog = node.storage.tiers.object, node.storage.catalog
        assert tier is not None
        (blob,) = [file.name for file in objects(tmp_path, "blobs")]
        found = ObjectBlob.decode(tier.get(f"blobs/{blob}"), "", blob)
        location = (await catalog.locate([blob]))[blob]
        (replica,) = [one for one in location.live() if one.tier == tier.name]
        await catalog.write(lambda c: remove_replica(c, replica.replica_id))

        def list_while_the_flush_goes_on(prefix: str = "") -> Iterator[FileInfo]:
            listed = list(listing(prefix))
            if prefix == "blobs/":
                adding = catalog.write(lambda c: insert_object_replica(c, blob, tier.name, found))
                asyncio.run_coroutine_threadsafe(adding, loop).result()
            return iter(listed)

        loop, listing = asyncio.get_running_loop(), tier.list
        monkeypatch.setattr(tier, "list", list_while_the_flush_goes_on)
        collector = Collector(catalog, node.storage.tiers, NamedLocks(), grace_seconds=-1)
        await collector.collect(Progress(Job("1", COLLECT, GARBAGE, "running", 0, 0, 0, "")))
    assert len(objects(tmp_path, "data")) == 1
