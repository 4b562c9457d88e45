"""Checkpoints on real tiers in one process, with ranks that save as a client does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_checkpoints import PackPlan
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    COMPACT,
    DELETE,
    FLUSH,
    NOTES,
    RETAIN,
    TOMBSTONE,
    are_settled,
)
from forebay_server.catalog.queries_managing import queue_all_retention
from forebay_server.catalog.queries_manifests import read_manifest
from forebay_server.catalog.queries_objects import enqueue_missing
from forebay_server.catalog.queries_runs import AttemptInfo, GenerationInfo
from forebay_server.locks import NamedLocks
from forebay_server.model.lineage import Point
from forebay_server.move.budget import Budget
from forebay_server.move.collect import Collector
from forebay_server.move.compact import Compactor
from forebay_server.move.flush import Flush
from forebay_server.move.jobs import Handler, Jobs, take_over_jobs
from forebay_server.move.trash import Tombstones, Trash
from forebay_server.publish.checkpoint import Checkpoints, recover_catalog_state
from forebay_server.publish.lease import Grant
from forebay_server.publish.manifests import ObjectPublisher
from forebay_server.publish.retention import Retention
from forebay_server.publish.run_notes import RunNotes
from forebay_server.publish.seal import PackSeal
from forebay_server.testing.storage import UID, Storage, open_storage
from forebay_server.tier.encode import open_plain
from forebay_server.tier.verify import verify_file
from forebay_wire.ids import GenerationId, new_random_name
from forebay_wire.keep import Keep
from forebay_wire.limits import KIB
from forebay_wire.manifest import AnyManifest, GenerationManifest, parse
from forebay_wire.segments import even_cuts

RUN = "run"
CUT_BYTES = 64 * KIB


@dataclass(frozen=True)
class CheckpointNode:
    """A daemon's storage with checkpoints and background work, without its edges."""

    storage: Storage
    checkpoints: Checkpoints
    jobs: Jobs
    trash: Trash
    retention: Retention

    async def begin(
        self,
        parent: tuple[int, int] | None = None,
        *,
        num_ranks: int = 1,
        run: str = RUN,
        fork: GenerationId | None = None,
        keep: Keep | None = None,
    ) -> AttemptInfo:
        """Open the run's next attempt; *keep*: from here on."""
        point = Point(*parent) if parent else None
        keep_json = None if keep is None else keep.to_json()
        return await self.checkpoints.begin_attempt(
            run, point, num_ranks, new_random_name(), fork=fork, keep_json=keep_json
        )

    async def plan(
        self, generation: GenerationId, num_bytes: int, *, rank: int = 0, num_ranks: int = 1
    ) -> Grant:
        """Begin one rank's pack with a slot for all of it."""
        plan = PackPlan(generation, rank, num_ranks, num_bytes)
        return await self.checkpoints.begin_pack(UID, plan, num_bytes + 64 * KIB)

    async def seal(
        self,
        grant: Grant,
        data: bytes,
        description: Mapping[str, Any] | None = None,
        *,
        metrics_json: str = "",
        dataset_json: str = "",
        tags: tuple[str, ...] = (),
        note_json: str = "",
    ) -> bool:
        """Fill the slot with *data* and the description behind it, and seal the pack."""
        text = json.dumps(description or {"tensors": []}).encode()
        slot = self.storage.uploads.slot(grant.session, UID)
        slot.view[: len(data) + len(text)] = data + text
        cuts = tuple(even_cuts(len(data), CUT_BYTES))
        return await self.checkpoints.seal_pack(
            UID,
            PackSeal(
                grant.session,
                0,
                len(data),
                cuts,
                len(text),
                metrics_json,
                dataset_json,
                tags,
                note_json,
            ),
        )

    async def save(
        self,
        step: int,
        packs: list[bytes],
        *,
        attempt: int = 1,
        run: str = RUN,
        **told: Any,
    ) -> GenerationId:
        """Save one generation with all its ranks at once; sealed on return. *told*: what rank 0
        says at its seal."""
        generation = GenerationId(run, attempt, step)

        async def one(rank: int, data: bytes) -> None:
            grant = await self.plan(generation, len(data), rank=rank, num_ranks=len(packs))
            await self.seal(grant, data, {"rank": rank}, **(told if not rank else {}))

        await asyncio.gather(*(one(rank, data) for rank, data in enumerate(packs)))
        return generation

    async def wait(
        self, generation: GenerationId, durability: str = "local", timeout: float = 30.0
    ) -> GenerationInfo:
        """Wait until the generation is that durable."""
        return await self.checkpoints.generations.wait(generation, durability, timeout)

    async def latest(self, skip: tuple[str, ...] = (), durability: str = "local") -> str:
        """``ATTEMPT/STEP`` of the latest generation."""
        points = [Point(*map(int, text.split("/"))) for text in skip]
        found = await self.checkpoints.generations.resolve(RUN, "latest", durability, points, 10.0)
        return f"{found.id.attempt}/{found.id.step}"

    async def manifest(self, generation: GenerationId) -> GenerationManifest:
        """The committed generation's manifest."""
        info = await self.checkpoints.generations.look(generation)
        assert info.manifest is not None
        found = await self.parse_manifest(info.manifest)
        assert isinstance(found, GenerationManifest)
        return found

    async def parse_manifest(self, manifest: str) -> AnyManifest:
        """Any manifest of the catalog, verified."""
        data = await self.storage.catalog.read(
            lambda connection: read_manifest(connection, manifest)
        )
        assert data is not None
        return parse(data, "catalog", manifest)

    async def restore(self, generation: GenerationId) -> list[bytes]:
        """The packs' bytes, rank by rank, verified, from whichever tier has them."""
        packs = (await self.manifest(generation)).packs
        return [await self.read_blob(pack.blob) for pack in packs]

    async def read_blob(self, blob: str) -> bytes:
        """A blob's bytes, verified, from its first live replica."""
        (replica, *_) = (await self.storage.catalog.locate([blob]))[blob].live()
        tier = self.storage.tiers.get(replica.tier)
        with open_plain(tier, replica.extents[0].file, replica.encoding, blob) as reader:
            data = bytearray(verify_file(reader, blob).total_bytes)
            reader.read_into(0, data)
        return bytes(data)

    async def settle(self, *kinds: str) -> None:
        """Wait until all jobs of these kinds have ended well."""

        def ended(connection: Connection) -> bool | None:
            return are_settled(connection, kinds) or None

        assert await self.storage.catalog.wait_until(ended, 30.0), "jobs go on"


@asynccontextmanager
async def open_checkpoints(
    folder: Path,
    *,
    with_object: bool = True,
    run_jobs: bool = True,
    grace_seconds: float = 3600.0,
    repeat_seconds: float = 3600.0,
    is_open: Any = lambda blob: False,
    trash_seconds: float = 0.0,
    **options: Any,
) -> AsyncIterator[CheckpointNode]:
    """A node in *folder*, started and recovered as a daemon does it."""
    async with open_storage(folder, with_object=with_object, **options) as storage:
        locks = NamedLocks()
        collector = Collector(
            storage.catalog,
            storage.tiers,
            locks,
            is_open=is_open,
            grace_seconds=grace_seconds,
            repeat_seconds=repeat_seconds,
        )
        handlers: dict[str, Handler] = {
            COLLECT: collector.collect,
            COMPACT: Compactor(storage.catalog, storage.tiers, Budget({}), is_open=is_open),
            DELETE: collector.delete_manifest,
            TOMBSTONE: Tombstones(storage.catalog, storage.tiers, locks),
        }
        if storage.tiers.object is not None:
            publisher = ObjectPublisher(storage.catalog, storage.tiers, storage.tiers.object, locks)
            handlers[FLUSH] = Flush(storage.catalog, publisher, locks)
            handlers[NOTES] = RunNotes(storage.catalog, storage.tiers, storage.tiers.object, locks)
        handlers[RETAIN] = lambda progress: retention(progress)
        jobs = Jobs(storage.catalog, new_random_name(), handlers)
        checkpoints = Checkpoints(
            storage.catalog, storage.uploads, jobs, trash_seconds=trash_seconds
        )
        retention = Retention(storage.catalog, checkpoints.readers, is_open=is_open, wake=jobs.wake)
        storage.uploads.listen(checkpoints.session_ended)
        await recover_catalog_state(storage.catalog)
        await take_over_jobs(storage.catalog)
        await storage.catalog.write(enqueue_missing)
        await storage.catalog.write(queue_all_retention)
        working = asyncio.create_task(jobs.run()) if run_jobs else None
        try:
            yield CheckpointNode(
                storage, checkpoints, jobs, Trash(storage.catalog, jobs), retention
            )
        finally:
            jobs.stop()
            if working is not None:
                with suppress(asyncio.CancelledError):
                    await working
            await storage.uploads.close()
            await checkpoints.close()
