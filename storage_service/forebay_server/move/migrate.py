"""The migrate job: a blob comes into a tier, then leaves another one.

Copy, fsync, verify, add the new row; then, in one transaction that is guarded by owner and live
lease, remove the old row and note in the job's journal which files that leaves; then unlink them. A
crash anywhere leaves a copy too many or a file that the journal names, never a blob too few; the
next try goes on where the journal says. Names are never reused, so a late unlink hits nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_moves import give_up_replica
from forebay_server.locks import NamedLocks
from forebay_server.move.copy import Copier, parse_target
from forebay_server.move.jobs import Progress
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import Conflict
from forebay_wire.failpoints import failpoint

REMOVED: Final = "removed"
"""Key of the journal: ``[[tier, file], …]`` whose rows are gone."""


class Migrator:
    """Handles jobs of the kind ``migrate``; the target is ``BLOB FROM TO``. Idempotent."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        copier: Copier,
        locks: NamedLocks,
        *,
        is_open: Callable[[str], bool] = lambda blob: False,
        moved: Callable[[str, str], object] = lambda tier, blob: None,
    ) -> None:
        """*is_open* tells whether a client has a blob in hand: then it stays, and the job is tried
        again later; *moved* is told the tier that a blob has left, and its id."""
        self._catalog = catalog
        self._tiers = tiers
        self._copier = copier
        self._locks = locks
        self._is_open = is_open
        self._moved = moved

    async def __call__(self, progress: Progress) -> None:
        blob, source, target = parse_target(progress.target, 3)
        if REMOVED not in progress.journal:
            # One lock for both steps: nobody takes the new copy away before the old one goes.
            async with self._locks.hold(blob):
                await self._copier.copy_locked(blob, target, progress)
                await self._remove(blob, source, target, progress)
        for tier, file in progress.journal[REMOVED]:
            found = self._tiers.get(tier)
            await self._tiers.run(found, found.delete, found.blob_name(file))
        failpoint("migrate.after_unlink")

    async def _remove(self, blob: str, source: str, target: str, progress: Progress) -> None:
        if self._is_open(blob):
            raise Conflict(f"blob {blob} is open in a client: it leaves tier {source} later")
        failpoint("migrate.before_remove")
        among = await self._tiers.answering()

        def remove(connection: Connection) -> None:
            reason = f"it is in {target} now"
            gone = give_up_replica(connection, blob, source, "moved", reason, among=among)
            journal: dict[str, Any] = {REMOVED: [[ref.tier, ref.file] for ref in gone]}
            progress.note(connection, journal)
            failpoint("migrate.inside_remove")

        await self._catalog.write(remove)
        self._moved(source, blob)
        failpoint("migrate.after_remove")


def migrate_target(blob: str, source: str, target: str) -> str:
    """The target of the job that moves *blob* from tier *source* to tier *target*."""
    return f"{blob} {source} {target}"
