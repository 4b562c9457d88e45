"""What is on its way is no garbage, and the catalog forgets last."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    COMPACT,
    DELETE,
    GARBAGE,
    SLOW_KINDS,
    enqueue,
    job_of,
)
from forebay_server.catalog.queries_manifests import insert_manifest, read_manifest
from forebay_server.locks import NamedLocks
from forebay_server.move.collect import Collector
from forebay_server.move.jobs import Jobs, Progress
from forebay_server.publish.landing import BlobLanding, PublishedBlob
from forebay_server.testing.checkpoints import RUN, open_checkpoints
from forebay_server.testing.integrity import open_integrity
from forebay_wire.limits import MIB


async def test_a_file_whose_row_is_still_to_come_is_no_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, passes = threading.Event(), threading.Event()
    publish = BlobLanding.publish

    def publish_and_wait(landing: BlobLanding) -> PublishedBlob:
        done = publish(landing)
        arrived.set()
        assert passes.wait(30.0)
        return done

    packs = [os.urandom(MIB)]
    async with open_checkpoints(tmp_path, with_object=False, grace_seconds=-1) as node:
        await node.settle(COLLECT)
        await node.begin()
        monkeypatch.setattr(BlobLanding, "publish", publish_and_wait)
        saved = await node.save(1, packs)
        assert await asyncio.to_thread(arrived.wait, 30.0)
        assert len(node.storage.files()) == 1
        await node.storage.catalog.write(lambda c: enqueue(c, COLLECT, GARBAGE))
        node.jobs.wake()
        await node.settle(COLLECT)
        passes.set()
        await node.wait(saved)
        assert await node.restore(saved) == packs


async def test_the_catalog_forgets_a_manifest_only_once_the_object_tier_has(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        info = await node.wait(await node.save(1, [os.urandom(MIB)]), "remote")
        assert info.manifest is not None
        manifest = info.manifest
        place, away = tmp_path / "object", tmp_path / "away"
        place.rename(away)
        place.write_bytes(b"not a folder")
        await node.checkpoints.delete_run(RUN)

        def failed_try(connection: Connection) -> bool | None:
            job = job_of(connection, DELETE, manifest)
            return True if job is not None and job.error else None

        assert await node.storage.catalog.wait_until(failed_try, 20)
        assert await node.storage.catalog.read(lambda c: read_manifest(c, manifest)) is not None
        place.unlink()
        away.rename(place)
        await node.settle(DELETE)
        assert await node.storage.catalog.read(lambda c: read_manifest(c, manifest)) is None
        assert not (place / "manifests" / manifest).exists()


@pytest.mark.parametrize("tiers", [("ssd",), ("ssd", "object")])
async def test_a_blob_that_is_named_in_the_last_moment_stays(
    tiers: tuple[str, ...], tmp_path: Path
) -> None:
    """Before its rows go, or between its row in the object tier and the others."""
    async with open_integrity(tmp_path) as node:
        write = node.node.catalog.write_now
        blob = (await node.node.add_blob([b"content"], *tiers)).blob_id

        def name_it(named: str) -> bool:
            if named == blob and not node.node.catalog.read_now(
                lambda c: read_manifest(c, "0" * 64)
            ):
                write(lambda c: insert_manifest(c, "0" * 64, 1, b"data", [blob]))
            return False

        hook = {"forget" if "object" in tiers else "is_open": name_it}
        collector = Collector(node.node.catalog, node.node.tiers, NamedLocks(), **hook)
        node.handlers[COLLECT] = collector.collect
        write(lambda c: enqueue(c, COLLECT, "all"))
        ((_, error),) = await node.run_queued(COLLECT)
        assert not error or "go later" in error
        assert ("ssd", "live") in await node.states(blob)
        await node.check_copies(blob)


async def test_compaction_follows_a_collection_at_once(tmp_path: Path) -> None:
    """It has workers of its own, which sleep until they are told."""
    compacted = asyncio.Event()

    async def compact(progress: Progress) -> None:
        compacted.set()

    async with open_integrity(tmp_path) as node:
        catalog = node.node.catalog
        collector = Collector(catalog, node.node.tiers, NamedLocks(), wake=lambda: jobs.wake())
        handlers = {COLLECT: collector.collect, COMPACT: compact}
        jobs = Jobs(catalog, "me", handlers, slow_kinds=SLOW_KINDS)
        working = asyncio.create_task(jobs.run())
        await node.node.add_blob([b"content"], "ssd")  # which nothing names
        await catalog.write(lambda c: enqueue(c, COLLECT, "all"))
        jobs.wake()
        try:
            await asyncio.wait_for(compacted.wait(), 20)
        finally:
            jobs.stop()
            await working
