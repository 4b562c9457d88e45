"""The flush job: a committed manifest becomes ``remote``."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_objects import (
    OBJECT_TIER,
    ManifestRecord,
    mark_remote,
    wanted_manifest,
)
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.jobs import Progress


class CopyProgress(Protocol):
    """How far a publication is; its methods may be called from any thread."""

    def plan(self, total_bytes: int) -> None:
        """There are so many bytes to copy in all."""
        ...

    def advance(self, num_bytes: int) -> None:
        """So many more are copied; may wait, or raise to interrupt."""
        ...


class Publisher(Protocol):
    """What is needed of :class:`forebay_server.publish.manifests.ObjectPublisher`."""

    def publish(self, record: ManifestRecord, progress: CopyProgress) -> Awaitable[None]:
        """Bring a manifest and all that it names into the object tier; durable on return."""
        ...


class _Throttled:
    """A job's progress that keeps its copying within the budget of the object tier."""

    def __init__(self, progress: Progress, budget: Budget, tier: str) -> None:
        self._progress = progress
        self._budget = budget
        self._tier = tier

    def plan(self, total_bytes: int) -> None:
        self._progress.plan(total_bytes)

    def advance(self, num_bytes: int) -> None:
        self._budget.take(self._tier, num_bytes, lambda: self._progress.advance(0))
        self._progress.advance(num_bytes)


class Flush:
    """Handles jobs of the kind ``flush``; the target is a manifest id. Idempotent."""

    def __init__(
        self,
        catalog: Catalog,
        publisher: Publisher,
        locks: NamedLocks,
        budget: Budget | None = None,
        tier: str = OBJECT_TIER,
    ) -> None:
        """*tier* is the one that *publisher* brings bytes into."""
        self._catalog = catalog
        self._publisher = publisher
        self._locks = locks
        self._budget = budget or Budget({})
        self._tier = tier

    async def __call__(self, progress: Progress) -> None:
        manifest = progress.target
        # A deletion of the same manifest waits until this is over, and then finds everything.
        async with self._locks.hold(manifest):
            record = await self._catalog.read(
                lambda connection: wanted_manifest(connection, manifest)
            )
            if record is None or record.is_remote:
                return
            await self._publisher.publish(record, _Throttled(progress, self._budget, self._tier))
            await self._catalog.write(lambda connection: _mark(connection, manifest, progress))


def _mark(connection: Connection, manifest: str, progress: Progress) -> None:
    progress.guard(connection)
    mark_remote(connection, manifest)
