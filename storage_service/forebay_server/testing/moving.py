"""A storage node whose background work moves blobs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_datasets import insert_version
from forebay_server.catalog.queries_jobs import (
    COPY,
    MIGRATE,
    PIN,
    SLOW_KINDS,
    Job,
    are_settled,
    enqueue,
    job_of,
)
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.copy import Copier
from forebay_server.move.jobs import Handler, Jobs
from forebay_server.move.migrate import Migrator
from forebay_server.move.pins import Pins
from forebay_server.testing.node import StorageNode
from forebay_server.tier.store import Tier
from forebay_wire.ids import new_random_name
from forebay_wire.manifest import DatasetManifest, ShardRef


@dataclass(frozen=True)
class MovingNode:
    """A node with jobs that copy and migrate."""

    node: StorageNode
    jobs: Jobs
    copier: Copier
    migrator: Migrator
    pins: Pins

    async def add_dataset(self, name: str, *sizes: int, tiers: Sequence[str] = ("object",)) -> Any:
        """A dataset with a shard of each size, in *tiers*; the ids of its blobs."""
        tables = [await self.node.add_blob([os.urandom(size)], *tiers) for size in sizes]
        await self.name_blobs(name, [(one.blob_id, one.total_bytes) for one in tables])
        return [one.blob_id for one in tables]

    async def name_blobs(self, name: str, found: Sequence[tuple[str, int]]) -> None:
        """Commit a dataset whose shards are *found*: blobs with their sizes."""
        shards = tuple(
            ShardRef(blob=blob, num_bytes=size, num_rows=1, batch_rows=(1,)) for blob, size in found
        )
        manifest = DatasetManifest(
            dataset=name, version=1, parent=None, schema="", shards=shards, metadata={}
        )
        identity, data = manifest.encode()
        request = new_random_name()
        await self.node.catalog.write(
            lambda connection: insert_version(connection, manifest, identity, data, request)
        )

    async def queue(self, kind: str, target: str, **options: Any) -> str:
        """Queue a job and wake the workers."""
        job = await self.node.catalog.write(
            lambda connection: enqueue(connection, kind, target, **options)
        )
        self.jobs.wake()
        return job

    async def wait(self, kind: str, target: str) -> Job:
        """The job once it has ended."""
        found = await self.jobs.wait(kind, target, 30.0)
        assert found is not None, "the job goes on"
        return found

    async def look(self, kind: str, target: str) -> Job:
        """The job as it stands."""

        def find(connection: Connection) -> Job | None:
            return job_of(connection, kind, target)

        found = await self.node.catalog.read(find)
        assert found is not None
        return found

    async def tiers_of(self, blob: str) -> list[str]:
        """The tiers with a live copy of *blob*."""
        return sorted(one.tier for one in (await self.node.locate(blob)).live())

    def files(self, tier: str) -> list[str]:
        """The names of all files in *tier*."""
        return sorted(info.name for info in self.node.tiers.get(tier).list())

    async def settle(self, *kinds: str) -> None:
        """Wait until no job of *kinds* is live."""

        def ended(connection: Connection) -> bool | None:
            return are_settled(connection, kinds) or None

        assert await self.node.catalog.wait_until(ended, 30.0), "jobs go on"


@asynccontextmanager
async def open_moving(
    folder: Path,
    *,
    is_open: Any = lambda blob: False,
    budget: Budget | None = None,
    run_jobs: bool = True,
    make_room: Any = None,
    tiers: Sequence[Tier] | None = None,
    more: Any = lambda node: {},
    **options: Any,
) -> AsyncIterator[MovingNode]:
    """A node in *folder*; *more* makes further handlers of it."""
    async with StorageNode(folder, tiers) as node:
        locks = NamedLocks()
        copier = Copier(node.opener.bringer, budget or Budget({}), locks)
        migrator = Migrator(
            node.catalog,
            node.tiers,
            copier,
            locks,
            is_open=is_open,
            moved=lambda tier, blob: node.opener.forget(blob),
        )
        pins = Pins(node.catalog, node.tiers, node.opener.bringer, copier, make_room=make_room)
        handlers: dict[str, Handler] = {
            COPY: copier,
            MIGRATE: migrator,
            PIN: pins.fetch,
            **more(node),
        }
        jobs = Jobs(node.catalog, "me", handlers, slow_kinds=SLOW_KINDS, **options)
        working = asyncio.create_task(jobs.run()) if run_jobs else None
        try:
            yield MovingNode(node, jobs, copier, migrator, pins)
        finally:
            jobs.stop()
            if working is not None:
                await working
