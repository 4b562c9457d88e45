"""The repair job: a good copy takes the place of a quarantined one.

The order is that of every move: copy from a good replica, fsync, verify, add the new row; then, in
one transaction that is guarded by owner and live lease, remove the bad row and note in the job's
journal which files that leaves; then unlink them. Without a good replica, and where others share
the damaged file, it is mended from good segments (``move/mend.py``). A copy of which a segment is
good nowhere stays quarantined, with its file.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from typing import Final, Protocol

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import BlobLocation
from forebay_server.catalog.queries_damage import (
    EVERYTHING,
    quarantined_blobs,
    remove_replaced,
)
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_mending import is_shared
from forebay_server.locks import NamedLocks
from forebay_server.move.copy import parse_target
from forebay_server.move.jobs import Progress
from forebay_server.move.mend import REMOVED, Mender
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import ForebayError, IntegrityError, StorageError
from forebay_wire.failpoints import failpoint

logger = logging.getLogger(__name__)

BATCH: Final = 100


class Copier(Protocol):
    """What is needed of :class:`forebay_server.move.copy.Copier`."""

    async def copy_locked(self, blob: str, tier: str, progress: Progress) -> bool:
        """Have a live, verified copy of *blob* in the landing tier *tier*; whether one was made."""
        ...


class Publisher(Protocol):
    """What is needed of :class:`forebay_server.publish.manifests.ObjectPublisher`."""

    async def publish_locked(self, blob: str, progress: Progress) -> None:
        """Have a live, verified copy of *blob* in the object tier; the caller holds its lock."""
        ...


class Repairer:
    """Handles jobs of the kind ``repair``. Belongs to the event loop. Idempotent."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        copier: Copier,
        mender: Mender,
        publisher: Publisher | None,
        locks: NamedLocks,
        *,
        return_good: Callable[[str], Awaitable[bool]],
        forget: Callable[[str], object] = lambda blob: None,
    ) -> None:
        """*return_good* has what turns out to be good serve again; *locks* are shared with whoever
        publishes, moves and collects; *forget* is told the id of a blob whose copies changed."""
        self._catalog = catalog
        self._tiers = tiers
        self._names = frozenset(tier.name for tier in tiers.own)
        self._landing = frozenset(tier.name for tier in tiers.landing)
        self._copier = copier
        self._mender = mender
        self._publisher = publisher
        self._locks = locks
        self._return_good = return_good
        self._forget = forget
        self.num_done: Counter[str] = Counter(repaired=0, failed=0)
        """Blobs since the start."""

    async def __call__(self, progress: Progress) -> None:
        await self._mender.unlink(progress)  # what an earlier try has left
        if progress.target == EVERYTHING:
            await self._repair_all(progress)
        else:
            blob, tier = parse_target(progress.target, 2)
            await self._repair(blob, progress, {tier})

    async def _repair_all(self, progress: Progress) -> None:
        """One blob after the other; those that cannot be repaired are named at the end."""
        after, problems = "", list[str]()
        while found := await self._next(after):
            for blob in found:
                progress.advance(0)
                try:
                    await self._repair(blob, progress, self._names)
                except (IntegrityError, StorageError) as error:
                    problems.append(error.message)
            after = found[-1]
        if problems:
            raise IntegrityError(f"{len(problems)} blobs are not repaired; first: {problems[0]}")

    async def _next(self, after: str) -> list[str]:
        return await self._catalog.read(
            lambda connection: quarantined_blobs(connection, after, BATCH)
        )

    async def _repair(self, blob: str, progress: Progress, tiers: Collection[str]) -> None:
        """Replace the quarantined copies of *blob* in *tiers*."""
        await self._return_good(blob)  # a tier that was away condemns what is good
        async with self._locks.hold(blob):
            location = await self._locate(blob)
            bad = [tier for tier in self._bad_tiers(location) if tier in tiers]
            if location is None or not bad:
                return
            try:
                for tier in bad:
                    await self._replace(location, tier, progress)
            except IntegrityError as error:
                await self._give_up(blob, error)
                raise
        self.num_done["repaired"] += 1
        logger.warning("blob %s is repaired in %s", blob, ", ".join(bad))

    def _bad_tiers(self, location: BlobLocation | None) -> list[str]:
        """The tiers of this daemon with a quarantined copy."""
        copies = location.replicas if location is not None else ()
        return sorted({one.tier for one in copies if one.state == "quarantined"} & self._names)

    async def _replace(self, location: BlobLocation, tier: str, progress: Progress) -> None:
        """Have a good copy in *tier*, then remove the bad ones there."""
        blob = location.blob
        failpoint("repair.before_copy")
        if not await self._is_mended(location, tier, progress):
            if self._tiers.object is not None and tier == self._tiers.object.name:
                assert self._publisher is not None, "there is one wherever there is an object tier"
                await self._publisher.publish_locked(blob, progress)
            else:
                await self._copier.copy_locked(blob, tier, progress)
        failpoint("repair.before_remove")

        def remove(connection: Connection) -> None:
            gone = remove_replaced(connection, blob, tier)
            progress.note(connection, {REMOVED: [[ref.tier, ref.file] for ref in gone]})
            failpoint("repair.inside_remove")

        await self._catalog.write(remove)
        self._forget(blob)
        failpoint("repair.after_remove")
        await self._mender.unlink(progress)
        failpoint("repair.after_unlink")

    async def _is_mended(self, location: BlobLocation, tier: str, progress: Progress) -> bool:
        """Whether the copy in *tier* was put together from good segments. A whole copy that nothing
        shares is made from a good one, if there is one."""
        blob, has_good = location.blob, bool(location.live())
        if has_good and not await self._is_shared(blob, tier):
            return False
        for name in self._landing_first(location, tier, only=has_good):
            try:
                await self._mender.mend(blob, name, progress)
            except IntegrityError:
                if not has_good and name == tier:
                    raise
            else:
                return name == tier
        if not has_good:
            await self._mender.rebuild(blob, progress)
        return False

    def _landing_first(self, location: BlobLocation, tier: str, *, only: bool) -> list[str]:
        """The landing tiers whose copy is to be mended for the one in *tier*: that one, and
        without a good copy anywhere those from which another could be made."""
        if tier in self._landing:
            return [tier]
        return [] if only else [name for name in self._bad_tiers(location) if name in self._landing]

    async def _is_shared(self, blob: str, tier: str) -> bool:
        return await self._catalog.read(lambda connection: is_shared(connection, blob, tier))

    async def _give_up(self, blob: str, error: ForebayError) -> None:
        self.num_done["failed"] += 1
        reason = error.message
        await self._catalog.write(
            lambda connection: record(connection, f"blob {blob}", "not repaired", reason)
        )

    async def _locate(self, blob: str) -> BlobLocation | None:
        return (await self._catalog.locate([blob])).get(blob)
