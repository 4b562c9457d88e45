"""A storage node that scrubs, repairs, checks and collects, its jobs run one by one by the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_datasets import insert_version
from forebay_server.catalog.queries_history import list_events
from forebay_server.catalog.queries_jobs import COPY, FLUSH, Job, claim, enqueue, fail, finish
from forebay_server.integrity import Integrity
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.copy import Copier
from forebay_server.move.flush import Flush
from forebay_server.move.jobs import Handler, Jobs, Progress
from forebay_server.move.scrub import Report, read_report, scrub_target
from forebay_server.publish.manifests import ObjectPublisher
from forebay_server.testing.node import StorageNode
from forebay_server.tier.encode import open_plain
from forebay_server.tier.verify import verify_file
from forebay_wire.ids import new_random_name
from forebay_wire.manifest import DatasetManifest, ShardRef

OWNER = "me-0"


@dataclass(frozen=True)
class IntegrityNode:
    """A node with all that finds damage and mends it; no job runs by itself."""

    node: StorageNode
    integrity: Integrity
    handlers: dict[str, Handler]

    async def add_dataset(self, *blobs: Sequence[bytes], tiers: Sequence[str] = ("ssd",)) -> Any:
        """A dataset of *blobs*, each given by its segments, in *tiers*, its flush queued:
        manifest id, blob ids."""
        tables = [await self.node.add_blob(list(pieces), *tiers) for pieces in blobs]
        shards = tuple(
            ShardRef(blob=one.blob_id, num_bytes=one.total_bytes, num_rows=1, batch_rows=(1,))
            for one in tables
        )
        name = f"d{new_random_name()[:8]}"
        manifest = DatasetManifest(
            dataset=name, version=1, parent=None, schema="", shards=shards, metadata={}
        )
        identity, data = manifest.encode()

        def commit(connection: Connection) -> None:
            insert_version(connection, manifest, identity, data, new_random_name())
            enqueue(connection, FLUSH, identity)

        await self.node.catalog.write(commit)
        return identity, [one.blob_id for one in tables]

    async def run(self, kind: str, target: str) -> Job:
        """Queue a job and run what is queued of that kind, which must work; the last one, as it was
        begun."""
        await self.node.catalog.write(lambda connection: enqueue(connection, kind, target))
        job, error = (await self.run_queued(kind))[-1]
        assert not error, error
        return job

    async def run_queued(self, *kinds: str) -> list[tuple[Job, str]]:
        """Run all due jobs of *kinds*, each once, those that they queue too: jobs and errors."""
        done: list[tuple[Job, str]] = []
        while (job := await self._claim(kinds)) is not None:
            error = ""
            try:
                await self.handlers[job.kind](Progress(job, OWNER))
            except Exception as caught:  # noqa: BLE001 - as the worker loop: the text is the outcome
                error = str(caught)
            await self._end(job, error)
            done.append((job, error))
        return done

    async def scrub(self, tier: str = "") -> Report:
        """Read everything now."""
        target = scrub_target(tier, self.node.tiers)
        job = await self.run("scrub", target)
        found = await self.integrity.look_at_scrub(job.job)
        return read_report(found.job.journal)

    async def states(self, blob: str) -> list[tuple[str, str]]:
        """Tier and state of all copies of *blob*, in order."""
        found = (await self.node.locate(blob)).replicas
        return sorted((one.tier, one.state) for one in found)

    async def events(self, subject: str) -> list[str]:
        """What happened to *subject*, oldest first."""
        found = await self.node.catalog.read(
            lambda connection: list_events(connection, [subject], 100)
        )
        return [one.event for one in reversed(found)]

    async def check_copies(self, blob: str) -> None:
        """Raise unless all live copies of *blob* are good."""
        for replica in (await self.node.locate(blob)).live():
            tier = self.node.tiers.get(replica.tier)
            with open_plain(tier, replica.extents[0].file, replica.encoding, blob) as reader:
                verify_file(reader, blob)

    def files(self, tier: str) -> list[str]:
        """The names of all files in *tier*."""
        return sorted(info.name for info in self.node.tiers.get(tier).list())

    async def _claim(self, kinds: Sequence[str]) -> Job | None:
        return await self.node.catalog.write(
            lambda connection: claim(connection, OWNER, 3600, kinds)
        )

    async def _end(self, job: Job, error: str) -> None:
        def end(connection: Connection) -> bool:
            if error:
                return fail(connection, job.job, OWNER, error)
            return finish(connection, job.job, OWNER)

        await self.node.catalog.write(end)


@asynccontextmanager
async def open_integrity(folder: Path, **options: Any) -> AsyncIterator[IntegrityNode]:
    """A node in *folder*; *options* are those of :class:`Integrity`."""
    async with StorageNode(folder) as node:
        locks, budget = NamedLocks(), Budget({})
        assert node.tiers.object is not None
        publisher = ObjectPublisher(
            node.catalog, node.tiers, node.tiers.object, locks, forget=node.opener.forget
        )
        integrity = Integrity(
            node.catalog, node.tiers, node.opener, publisher, locks, budget, **options
        )
        handlers: dict[str, Handler] = {
            **integrity.handlers,
            FLUSH: Flush(node.catalog, publisher, locks, budget),
            COPY: Copier(node.opener.bringer, budget, locks),
        }
        await integrity.start(Jobs(node.catalog, "me", handlers))
        yield IntegrityNode(node, integrity, handlers)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of the file at *path*, in place; again: it is as it was."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
