"""The flush job: a committed manifest becomes ``remote``."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_objects import ManifestRecord, mark_remote, wanted_manifest
from forebay_server.locks import NamedLocks
from forebay_server.move.jobs import Progress


class Publisher(Protocol):
    """What is needed of :class:`forebay_server.publish.manifests.ObjectPublisher`."""

    def publish(self, record: ManifestRecord, progress: Progress) -> Awaitable[None]:
        """Bring a manifest and all that it names into the object tier; durable on return."""
        ...


class Flush:
    """Handles jobs of the kind ``flush``; the target is a manifest id. Idempotent."""

    def __init__(self, catalog: Catalog, publisher: Publisher, locks: NamedLocks) -> None:
        self._catalog = catalog
        self._publisher = publisher
        self._locks = locks

    async def __call__(self, progress: Progress) -> None:
        manifest = progress.target
        # A deletion of the same manifest waits until this is over, and then finds everything.
        async with self._locks.hold(manifest):
            record = await self._catalog.read(
                lambda connection: wanted_manifest(connection, manifest)
            )
            if record is None or record.is_remote:
                return
            await self._publisher.publish(record, progress)
            await self._catalog.write(lambda connection: mark_remote(connection, manifest))
