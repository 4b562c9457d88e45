"""The trash: what was deleted can be restored for a while, and a recovery knows of it.

While a manifest lies in the trash, the object tier keeps ``trash/<manifest id>`` beside it, the
trash's row as JSON: without it `forebay recover` would bring back what somebody deleted.
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

from forebay_server.catalog import queries_trash as queries
from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_trash import TrashEntry
from forebay_server.locks import NamedLocks
from forebay_server.move.collect import TOMBSTONES
from forebay_server.move.jobs import Progress
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_wire.errors import AlreadyExists

logger = logging.getLogger(__name__)

MAX_ROUNDS: Final = 10
"""How often a manifest may go in and out of the trash while it is written down."""


class Waker(Protocol):
    """What is needed of :class:`forebay_server.move.jobs.Jobs`."""

    def wake(self) -> None:
        """There may be new work."""
        ...


class Tombstones:
    """Handles jobs of the kind ``tombstone``; the target is a manifest id. Idempotent."""

    def __init__(self, catalog: Catalog, tiers: Tiers, locks: NamedLocks) -> None:
        """*locks* are shared with whoever publishes and deletes manifests."""
        self._catalog = catalog
        self._tiers = tiers
        self._locks = locks

    async def __call__(self, progress: Progress) -> None:
        tier, manifest = self._tiers.object, progress.target
        if tier is None:
            return
        async with self._locks.hold(manifest):
            wanted = await self._wanted(manifest)
            for _ in range(MAX_ROUNDS):
                await self._tiers.run(tier, _write, tier, TOMBSTONES + manifest, wanted)
                said, wanted = wanted, await self._wanted(manifest)
                if said == wanted:
                    return
                progress.advance(0)

    async def _wanted(self, manifest: str) -> bytes | None:
        return await self._catalog.read(
            lambda connection: queries.tombstone_of(connection, manifest)
        )


def _write(tier: Tier, name: str, data: bytes | None) -> None:
    """Have *name* hold *data*, None: not be there."""
    if data is None:
        tier.delete(name)
        return
    try:
        tier.put(name, data)
    except AlreadyExists:
        if tier.get(name) != data:
            tier.delete(name)
            tier.put(name, data)


class Trash:
    """Belongs to the event loop; holds no state."""

    def __init__(self, catalog: Catalog, jobs: Waker) -> None:
        self._catalog = catalog
        self._jobs = jobs

    async def list(self) -> list[TrashEntry]:
        """All deletions that can be undone, newest first."""
        return await self._catalog.read(queries.list_trash)

    async def restore(self, which: str) -> TrashEntry:
        """Bring back what a deletion took; *which* is its name or its target.

        :class:`AlreadyExists` if the name is taken by now, :class:`NotFound` if the trash does not
        have it. All or nothing.
        """
        entry = await self._catalog.write(lambda connection: queries.restore(connection, which))
        self._jobs.wake()
        return entry

    async def empty(self, which: str = "") -> int:
        """Let go what a deletion took, or everything; how many deletions. The rest is done in the
        background: it leaves the object tier first."""
        number = await self._catalog.write(
            lambda connection: queries.empty_trash(connection, which)
        )
        self._jobs.wake()
        return number
