"""Publishes manifests into the object tier: first all that one names, then, create-only, itself.

What lies there: ``data/<random name>`` (blob files), ``blobs/<blob id>`` (a blob's extent list with
its segment table) and ``manifests/<manifest id>``. Whoever finds a manifest there can rely on
everything that it names. Every step may be repeated: what exists is checked and taken over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import BlobLocation, Replica
from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_objects import ManifestRecord, insert_object_replica
from forebay_server.locks import NamedLocks
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.tier.encode import StoredFile, encode_into, open_plain
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import AlreadyExists, IntegrityError, NotFound, StorageError
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import new_random_name

logger = logging.getLogger(__name__)

MANIFESTS: Final = "manifests/"
BLOBS: Final = "blobs/"


class Progress(Protocol):
    """How far a publication is; its methods may be called from any thread."""

    def plan(self, total_bytes: int) -> None:
        """There are so many bytes to copy in all."""
        ...

    def advance(self, num_bytes: int) -> None:
        """So many more are copied; may raise to interrupt."""
        ...


class ObjectPublisher:
    """Brings manifests and blobs into the object tier. Belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        tier: Tier,
        locks: NamedLocks,
        forget: Callable[[str], object] = lambda blob: None,
    ) -> None:
        """*tier* is the object tier; *locks* are shared with whoever deletes there; *forget* is
        told the id of a blob whose replica turned out to be bad."""
        self._catalog = catalog
        self._tiers = tiers
        self._tier = tier
        self._locks = locks
        self._forget = forget

    async def publish(self, record: ManifestRecord, progress: Progress) -> None:
        """Bring *record* and all that it names into the object tier; durable on return.

        :class:`IntegrityError` if a blob has no good copy left.
        """
        located = await self._catalog.locate(record.blobs)
        progress.plan(
            sum(location.num_bytes for location in located.values() if self._row(location) is None)
        )
        for blob in record.blobs:
            # The lock keeps a collector from removing what is found or put here.
            async with self._locks.hold(blob):
                await self.publish_locked(blob, progress)
        failpoint("flush.before_manifest")
        await self._tiers.run(self._tier, self._put, MANIFESTS + record.manifest, record.data)
        failpoint("flush.after_manifest")

    async def publish_locked(self, blob: str, progress: Progress) -> None:
        """Have a live, verified copy of *blob* in the object tier; the caller holds its lock.

        :class:`IntegrityError` if it has no good copy left.
        """
        location = (await self._catalog.locate([blob])).get(blob)
        if location is None:
            raise IntegrityError(f"blob {blob} is named by a manifest and not in the catalog")
        known = self._row(location)
        if known is not None:
            if await self._tiers.run(self._tier, self._is_there, blob, known):
                return
            await self._quarantine(location, known, "it is gone from the object tier")
        found = await self._tiers.run(self._tier, self.find, blob)
        if found is None:
            failpoint("flush.before_blob")
            found = await self._copy(location, progress)
        await self._catalog.write(
            lambda connection: insert_object_replica(connection, blob, self._tier.name, found)
        )

    def _row(self, location: BlobLocation) -> Replica | None:
        """The live replica in the object tier that the catalog knows."""
        replicas = (one for one in location.live() if one.tier == self._tier.name)
        return next(replicas, None)

    async def _quarantine(self, location: BlobLocation, replica: Replica, reason: str) -> None:
        logger.error(
            "blob %s: the copy in tier %s is out of service: %s",
            location.blob,
            replica.tier,
            reason,
        )
        self._forget(location.blob)
        await self._catalog.write(
            lambda connection: quarantine(connection, replica.replica_id, reason)
        )

    # ---------------------------------------------------------- below: on a thread of the tier

    def _is_there(self, blob: str, replica: Replica) -> bool:
        names = [BLOBS + blob, *(self._tier.blob_name(one.file) for one in replica.extents)]
        return all(self._tier.head(name) is not None for name in names)

    def find(self, blob: str) -> ObjectBlob | None:
        """What an earlier try, or another daemon, has put under the blob's id, with every byte
        checked; blocks. A list that leads nowhere stays until another one takes its place."""
        if self._tier.head(BLOBS + blob) is None:
            return None
        try:
            found = ObjectBlob.decode(self._tier.get(BLOBS + blob), self._where(blob), blob)
            extent = found.single(self._where(blob))
            with open_plain(self._tier, extent.file, found.encoding, blob) as reader:
                verify_file(reader, blob)
        except (IntegrityError, NotFound) as error:
            logger.warning("published again: %s", error)
            return None
        return found

    async def _copy(self, location: BlobLocation, progress: Progress) -> ObjectBlob:
        """Copy a blob from its best good replica, verified on both sides."""
        names = {tier.name for tier in self._tiers.all} - {self._tier.name}
        away = [one.tier for one in location.live() if one.tier not in {*names, self._tier.name}]
        for replica in location.live():
            if replica.tier not in names:
                continue
            try:
                made, stored = await self._tiers.run(
                    self._tier, self._copy_file, location.blob, replica, progress
                )
            except (IntegrityError, NotFound) as error:
                await self._quarantine(location, replica, str(error))
                continue
            failpoint("flush.after_blob")
            if not stored.is_proven:
                await self._tiers.run(self._tier, self._read_back, location.blob, made)
            found = await self._tiers.run(self._tier, self._put_list, location.blob, made)
            failpoint("flush.after_extents")
            return found
        if away:
            raise StorageError(
                f"blob {location.blob} lies in tier {away[0]}, which this daemon was started "
                "without: give it the tier again, or delete what names the blob"
            )
        raise IntegrityError(
            f"blob {location.blob} has no good copy on this node: what names it cannot be brought "
            "into the object tier; delete it, or restore the lost tier"
        )

    def _copy_file(
        self, blob: str, replica: Replica, progress: Progress
    ) -> tuple[ObjectBlob, StoredFile]:
        source, file = self._tiers.get(replica.tier), new_random_name()
        with open_plain(source, replica.extents[0].file, replica.encoding, blob) as reader:
            stored = encode_into(
                reader, self._tier, file, self._tier.encoding, blob, advance=progress.advance
            )
        size = stored.table.total_bytes
        extent = ObjectExtent(0, 0, size, stored.num_bytes, file, stored.encoding)
        return ObjectBlob(stored.table, (extent,), stored.encoding), stored

    def _read_back(self, blob: str, made: ObjectBlob) -> None:
        """Check the copy; what is wrong is removed."""
        file = made.extents[0].file
        try:
            with open_plain(self._tier, file, made.encoding, blob) as reader:
                verify_file(reader, blob)
        except (IntegrityError, NotFound) as error:
            self._tier.delete(self._tier.blob_name(file))
            raise StorageError(
                f"what was just written into the object tier reads back wrong: {error}"
            ) from error

    def _put_list(self, blob: str, made: ObjectBlob) -> ObjectBlob:
        """Publish the blob's extent list; somebody else's, if that came first."""
        try:
            self._put(BLOBS + blob, made.encode())
        except AlreadyExists:
            if (theirs := self.find(blob)) is not None:
                self._tier.delete(self._tier.blob_name(made.extents[0].file))
                return theirs
            # Only now: a damaged copy without a good one beside it could not be found without it.
            self._tier.delete(BLOBS + blob)
            self._put(BLOBS + blob, made.encode())
        return made

    def _put(self, name: str, data: bytes) -> None:
        """Publish a small object and read it back; one that is there already has to be equal.

        A damaged one is replaced if nothing can rely on it: for a manifest that is always so, its
        name is its digest. So is one that another catalog stamped.
        """
        try:
            is_proven = self._create(name, data)
        except AlreadyExists:
            if self._tier.get(name) == data:
                return
            if not name.startswith(MANIFESTS):
                raise
            logger.warning("object %s is damaged, or was stamped by another catalog", name)
            self._tier.delete(name)
            is_proven = self._create(name, data)
        if not is_proven and self._tier.get(name) != data:
            raise StorageError(f"object {name} reads back wrong right after it was written")

    def _create(self, name: str, data: bytes) -> bool:
        """Publish a small object; whether the tier has proven what it keeps."""
        with self._tier.create(name, len(data)) as writer:
            writer.write(data)
            writer.publish()
        return writer.is_proven

    def _where(self, blob: str) -> str:
        return f"tier {self._tier.name}, file {BLOBS}{blob}"
