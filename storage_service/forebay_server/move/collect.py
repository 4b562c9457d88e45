"""Reclaims what nothing names any more, in an order in which a crash leaves only garbage behind.

A manifest leaves the object tier first, so that nobody recovers it half; then the catalog forgets
it. A blob that no manifest, pack or session names loses its row in the object tier's name, its
objects there, then its other rows, and last its local files. A file without a row is reclaimed
after a grace period.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import FileRef, orphan_blobs, remove_orphan
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import COMPACT, GARBAGE, enqueue, enqueue_collection
from forebay_server.catalog.queries_objects import (
    OBJECT_TIER,
    may_be_in_tier,
    remove_manifest,
    take_out_of_tier,
    unnamed_files,
    without_object_replica,
)
from forebay_server.locks import NamedLocks
from forebay_server.model.extents import ObjectBlob
from forebay_server.move.jobs import Progress
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import FileInfo, Tier
from forebay_wire.errors import Conflict, IntegrityError, NotFound
from forebay_wire.failpoints import failpoint

logger = logging.getLogger(__name__)

EVERYTHING: Final = "files"
"""The target of a compaction."""
OBJECTS: Final = "objects"
"""Key of the journal: blob to its files in the object tier, whose row is gone."""
GRACE_SECONDS: Final = 3600.0
"""Age at which a file without a row is garbage: longer than any publication takes from its file to
its row, clocks of file servers included."""

BATCH: Final = 500
MANIFESTS: Final = "manifests/"
BLOBS: Final = "blobs/"
TOMBSTONES: Final = "trash/"


class Collector:
    """Removes manifests and blobs from everywhere. Belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        locks: NamedLocks,
        *,
        is_open: Callable[[str], bool] = lambda blob: False,
        forget: Callable[[str], object] = lambda blob: None,
        wake: Callable[[], object] = lambda: None,
        grace_seconds: float = GRACE_SECONDS,
        repeat_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """*locks* are shared with the publisher; *is_open* tells whether a client has a blob in
        hand; *forget* is told the id of a blob that goes; *wake* is called when there is work for
        others; *repeat_seconds* lie between two searches for stray files; *clock* answers Unix
        seconds."""
        self._catalog = catalog
        self._tiers = tiers
        self._names = [one.name for one in tiers.all]
        self._locks = locks
        self._is_open = is_open
        self._forget = forget
        self._wake = wake
        self._grace_seconds = grace_seconds
        self._repeat_seconds = repeat_seconds
        self._clock = clock

    async def delete_manifest(self, progress: Progress) -> None:
        """Handles jobs of the kind ``delete``; the target is a manifest id. Idempotent.

        One that may be in an object tier which this daemon was started without stays as it is: the
        next start with that tier queues it again.
        """
        manifest = progress.target
        async with self._locks.hold(manifest):
            tier = self._tiers.object
            failpoint("collect.before_manifest")
            if tier is not None:
                await self._tiers.run(tier, tier.delete, MANIFESTS + manifest)
                await self._tiers.run(tier, tier.delete, TOMBSTONES + manifest)
                failpoint("collect.after_objects")
            elif await self._catalog.read(
                lambda connection: may_be_in_tier(connection, manifest, OBJECT_TIER)
            ):
                logger.warning("manifest %s stays until the object tier is back", manifest)
                return
            kept = await self._catalog.write(
                lambda connection: _remove(connection, manifest, progress)
            )
        failpoint("collect.after_manifest")
        if kept is None:
            raise Conflict(f"manifest {manifest} is still in use and cannot be deleted")

    async def collect(self, progress: Progress) -> None:
        """Handles jobs of the kind ``collect``: every orphan, and for the target ``garbage``
        every stray file, again and again: what an interrupted flush leaves is garbage only once it
        is old. Idempotent. What lies in tiers that this daemon was started without stays.

        Blobs that clients have in hand stay; :class:`Conflict` then has the job tried again later.
        """
        if progress.target == GARBAGE:
            progress.repeat_after(self._repeat_seconds)
        await self._go_on(progress)
        num_open = await self._collect_orphans(progress)
        if progress.target == GARBAGE:
            for tier in self._tiers.own:
                await self._sweep(tier)
                await self._tiers.run(tier, tier.sweep)
        if num_open:
            raise Conflict(f"{num_open} deleted blobs are still open in clients: they go later")

    # ------------------------------------------------------------------------------------ blobs

    async def _collect_orphans(self, progress: Progress) -> int:
        """Remove all blobs that nothing names; how many stay because they are open."""
        kept: set[str] = set()
        while True:
            found = await self._orphans(BATCH + len(kept))
            fresh = [blob for blob in found if blob not in kept]
            if not fresh:
                self._wake()  # compaction follows: its workers know nothing of it yet
                return len(kept)
            for blob in fresh:
                if self._is_open(blob) or not await self._collect_blob(blob, progress):
                    kept.add(blob)
                progress.advance(0)

    async def _orphans(self, limit: int) -> list[str]:
        return await self._catalog.read(
            lambda connection: orphan_blobs(connection, limit, tiers=self._names)
        )

    async def _collect_blob(self, blob: str, progress: Progress) -> bool:
        """Remove one orphan from everywhere; False if something names it by now."""
        async with self._locks.hold(blob):
            tier = self._tiers.object
            failpoint("collect.before_row")
            if tier is not None:
                name = tier.name
                objects = await self._catalog.write(
                    lambda connection: _take_out(connection, blob, name, progress)
                )
                if objects is None:
                    return False
                failpoint("collect.after_object_row")
                self._forget(blob)
                await self._delete_objects(tier, blob, objects)
                failpoint("collect.after_blob_objects")
            gone = await self._catalog.write(
                lambda connection: _forget(connection, blob, self._names, progress)
            )
            failpoint("collect.after_row")
            self._forget(blob)
            await self._delete(gone)
            failpoint("collect.after_files")
            return True

    async def _go_on(self, progress: Progress) -> None:
        """Delete the objects that an earlier try has taken the row of."""
        tier = self._tiers.object
        if tier is None:
            return
        for blob, names in progress.journal.get(OBJECTS, {}).items():
            files = [FileRef(tier.name, name) for name in names]
            async with self._locks.hold(blob):
                located = (await self._catalog.locate([blob])).get(blob)
                if located is not None and any(one.tier == tier.name for one in located.replicas):
                    await self._delete(files)  # it was published anew, with a list of its own
                else:
                    await self._delete_objects(tier, blob, files)

    async def _delete_objects(self, tier: Tier, blob: str, files: Iterable[FileRef]) -> None:
        """Delete a blob's files, also those that only its list names, and the list last: a crash
        in between leaves a list that leads nowhere, which the next publication replaces."""
        listed = await self._tiers.run(tier, _files_of, tier, blob)
        names = {ref.file for ref in files} | await self._unnamed(tier, listed)
        await self._tiers.run(tier, _delete_named, tier, blob, names)

    async def _delete(self, files: Iterable[FileRef]) -> None:
        for ref in files:
            tier = self._tiers.get(ref.tier)
            await self._tiers.run(tier, tier.delete, tier.blob_name(ref.file))

    # ------------------------------------------------------------------------------------ files

    async def strays(self, tier: Tier) -> list[FileInfo]:
        """The blob files of *tier*, as the catalog would call them, that nothing names and that are
        past the grace period.

        In the object tier those that any extent list names are none. Lists that the catalog does
        not know are read: they may be another daemon's. Rows are looked up last: a flush that takes
        such a list over meanwhile adds the row of an old file.
        """
        prefix = tier.blob_name("")
        old = await self._tiers.run(tier, self._old_files, tier, prefix)
        found = {info.name.removeprefix(prefix): info for info in old}
        files = await self._unnamed(tier, found)
        if files and tier is self._tiers.object:
            files = await self._unnamed(tier, await self._without_list(tier, files))
        return [
            FileInfo(name, found[name].size_bytes, found[name].modified_unix)
            for name in sorted(files)
        ]

    async def _sweep(self, tier: Tier) -> None:
        """Delete the :meth:`strays`."""
        for info in await self.strays(tier):
            logger.info("tier %s: stray file %s is deleted", tier.name, info.name)
            await self._tiers.run(tier, tier.delete, tier.blob_name(info.name))
            await self._log(tier, info.name)

    async def _log(self, tier: Tier, file: str) -> None:
        await self._catalog.write(
            lambda connection: record(
                connection, f"tier {tier.name}", "deleted", f"file {file}: no row names it"
            )
        )

    async def _without_list(self, tier: Tier, files: set[str]) -> set[str]:
        """Those of *files* that no extent list names which the catalog does not know."""
        lists = await self._tiers.run(tier, _names, tier, BLOBS)
        foreign = await self._catalog.read(
            lambda connection: without_object_replica(connection, tier.name, lists)
        )
        left = set(files)
        for blob in foreign:
            left -= await self._tiers.run(tier, _files_of, tier, blob)
        return left

    def _old_files(self, tier: Tier, prefix: str) -> list[FileInfo]:
        limit = self._clock() - self._grace_seconds
        return [info for info in tier.list(prefix) if info.modified_unix < limit]

    async def _unnamed(self, tier: Tier, names: Iterable[str]) -> set[str]:
        listed = list(names)
        return await self._catalog.read(
            lambda connection: unnamed_files(connection, tier.name, listed)
        )


def _remove(connection: Connection, manifest: str, progress: Progress) -> list[str] | None:
    progress.guard(connection)
    kept = remove_manifest(connection, manifest)
    if kept is not None:
        record(connection, f"manifest {manifest}", "deleted", "nothing names it any more")
    if kept:
        enqueue_collection(connection)
    return kept


def _take_out(
    connection: Connection, blob: str, tier: str, progress: Progress
) -> list[FileRef] | None:
    progress.guard(connection)
    gone = take_out_of_tier(connection, blob, tier)
    if gone is not None:
        progress.note(connection, {OBJECTS: {blob: [ref.file for ref in gone]}})
    if gone:
        record(connection, f"blob {blob}", "deleted", f"{tier}: nothing names it any more")
    return gone


def _forget(
    connection: Connection, blob: str, tiers: Sequence[str], progress: Progress
) -> list[FileRef]:
    progress.guard(connection)
    gone = remove_orphan(connection, blob, tiers)
    enqueue(connection, COMPACT, EVERYTHING)  # of what it shared a part may be left
    for ref in gone:
        record(connection, f"blob {blob}", "deleted", f"{ref.tier}: nothing names it any more")
    return gone


def _delete_named(tier: Tier, blob: str, files: Iterable[str]) -> None:
    for file in files:
        tier.delete(tier.blob_name(file))
    tier.delete(BLOBS + blob)


def _files_of(tier: Tier, blob: str) -> set[str]:
    """The files that the object tier's list of *blob* names; none if it is missing or damaged."""
    try:
        found = ObjectBlob.decode(tier.get(BLOBS + blob), f"tier {tier.name}", blob)
    except NotFound:
        return set()
    except IntegrityError as error:
        logger.warning("an extent list is damaged: %s", error)
        return set()
    return {one.file for one in found.extents}


def _names(tier: Tier, prefix: str) -> list[str]:
    return [info.name.removeprefix(prefix) for info in tier.list(prefix)]
