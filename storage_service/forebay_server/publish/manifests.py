"""Publishes manifests into the object tier: first all that one names, then, create-only, itself.

What lies there: ``data/<random name>`` (blob files), ``blobs/<blob id>`` (a blob's extent list with
its segment table) and ``manifests/<manifest id>``. Whoever finds a manifest there can rely on
everything that it names. Every step may be repeated: what exists is checked and taken over.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import BlobLocation, Replica
from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_objects import ManifestRecord, insert_object_replica
from forebay_server.catalog.queries_sharing import StaleReference, find_pack
from forebay_server.locks import NamedLocks
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.extents import ObjectBlob
from forebay_server.publish.known import KnownSegments, Shareable
from forebay_server.publish.object_copy import Made, Place, copy_blob
from forebay_server.tier.deltas import DamagedBase
from forebay_server.tier.encode import open_plain
from forebay_server.tier.layers import check_borders
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import AlreadyExists, IntegrityError, NotFound, StorageError
from forebay_wire.failpoints import failpoint

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
        *,
        stores_deltas: bool = True,
    ) -> None:
        """*tier* is the object tier; *locks* are shared with whoever deletes there; *forget* is
        told the id of a blob whose replica turned out to be bad. With *stores_deltas* segments of
        packs may lie there as differences from those of older ones."""
        self._catalog = catalog
        self._tiers = tiers
        self._tier = tier
        self._locks = locks
        self._known = KnownSegments(catalog, tiers)
        self._forget = forget
        self._stores_deltas = stores_deltas and tier.encoding != RAW
        self.delta_bytes: Counter[str] = Counter(plain=0, stored=0)
        """Of segments that lie as differences since the start: their own, and what they take."""

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
        if found is not None:
            await self._insert(blob, found)
            return
        failpoint("flush.before_blob")
        shareable = await self._shareable(blob)
        try:
            await self._insert(*await self._copy(location, progress, shareable))
        except StaleReference as error:
            logger.warning("object tier: %s", error)
            await self._insert(*await self._copy(location, progress, None))

    async def _insert(self, blob: str, found: ObjectBlob, own_file: str | None = None) -> None:
        await self._catalog.write(
            lambda connection: insert_object_replica(
                connection, blob, self._tier.name, found, own_file
            )
        )

    async def _shareable(self, blob: str) -> Shareable | None:
        """What of a pack need not be stored once more; None for other blobs, which share
        nothing."""
        pack = await self._catalog.read(lambda connection: find_pack(connection, blob))
        return None if pack is None else await self._known.of_pack(pack, self._tier)

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

    # ---------------------------------------------------- the next two: on a thread of the tier

    def _is_there(self, blob: str, replica: Replica) -> bool:
        names = {BLOBS + blob, *(self._tier.blob_name(one.file) for one in replica.extents)}
        return all(self._tier.head(name) is not None for name in names)

    def find(self, blob: str) -> ObjectBlob | None:
        """What an earlier try, or another daemon, has put under the blob's id, with every byte
        checked; blocks. A list that leads nowhere stays until another one takes its place, and so
        does one whose pieces others may have given up."""
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

    async def _copy(
        self, location: BlobLocation, progress: Progress, shareable: Shareable | None
    ) -> tuple[str, ObjectBlob, str | None]:
        """Copy a blob from its best good replica, verified on both sides: what of it is not
        *shareable*. With where it lies, and its own file if it shares others.

        :class:`StaleReference` if what it was to share turns out to be no good.
        """
        near = await self._near(shareable)
        for replica in location.live():
            if (source := self._place(location.blob, replica)) is None:
                continue
            try:
                made = await self._make(source, progress, shareable, near)
            except (IntegrityError, NotFound) as error:
                await self._quarantine(location, replica, str(error))
                continue
            failpoint("flush.after_blob")
            if made.stored is not None and not made.stored.is_proven:
                await self._tiers.run(self._tier, self._read_back, made)
            found = await self._tiers.run(self._tier, self._put_list, location.blob, made)
            failpoint("flush.after_extents")
            if made.deltas is not None and found is made.found:
                await self._tiers.run(self._tier, self._check_layers, location.blob, made)
                self.delta_bytes.update(
                    plain=made.deltas.plain_bytes, stored=made.deltas.delta_bytes
                )
            shares = found.encoding == PIECES
            return location.blob, found, made.file if shares else None
        raise self._lost(location)

    def _lost(self, location: BlobLocation) -> StorageError | IntegrityError:
        """Why there is nothing to copy a blob from."""
        names = {tier.name for tier in self._tiers.all}
        away = [one.tier for one in location.live() if one.tier not in names]
        if away:
            return StorageError(
                f"blob {location.blob} lies in tier {away[0]}, which this daemon was started "
                "without: give it the tier again, or delete what names the blob"
            )
        return IntegrityError(
            f"blob {location.blob} has no good copy on this node: what names it cannot be brought "
            "into the object tier; delete it, or restore the lost tier"
        )

    async def _make(
        self, source: Place, progress: Progress, shareable: Shareable | None, near: Place | None
    ) -> Made:
        """Copy a blob from *source*; without differences if what is *near* is no good."""
        arguments = source, self._tier, progress.advance, shareable
        try:
            return await self._tiers.run(self._tier, copy_blob, *arguments, near)
        except DamagedBase as error:
            assert near is not None, "only that is compared with"
            located = (await self._catalog.locate([near.blob])).get(near.blob)
            if located is not None:
                await self._quarantine(located, near.replica, str(error))
            return await self._tiers.run(self._tier, copy_blob, *arguments)

    async def _near(self, shareable: Shareable | None) -> Place | None:
        """Where the pack that another may have differences from is read on this node. From the
        object tier it would cost more than is saved."""
        if shareable is None or shareable.base is None or not self._stores_deltas:
            return None
        blob = shareable.base.blob
        located = (await self._catalog.locate([blob])).get(blob)
        copies = located.live() if located is not None else ()
        places = (self._place(blob, one) for one in copies)
        return next((one for one in places if one is not None), None)

    def _place(self, blob: str, replica: Replica) -> Place | None:
        """Where a replica can be copied from; None: not here."""
        tiers = (one for one in self._tiers.all if one is not self._tier)
        return next((Place(blob, one, replica) for one in tiers if one.name == replica.tier), None)

    # ---------------------------------------------------------- below: on a thread of the tier

    def _read_back(self, made: Made) -> None:
        """Check the copy; what is wrong is removed."""
        file, stored = made.file, made.stored
        assert stored is not None, "something was written"
        try:
            with open_plain(self._tier, file, stored.encoding, stored.table.blob_id) as reader:
                verify_file(reader, stored.table.blob_id)
        except (IntegrityError, NotFound) as error:
            self._tier.delete(self._tier.blob_name(file))
            raise StorageError(
                f"what was just written into the object tier reads back wrong: {error}"
            ) from error

    def _check_layers(self, blob: str, made: Made) -> None:
        """Put segments together from what others have there, too, as a reader would."""
        if not made.found.has_layers:
            return
        try:
            with open_plain(self._tier, "", PIECES, blob) as reader:
                check_borders(reader, made.found)
        except (IntegrityError, NotFound) as error:
            self._tier.delete(BLOBS + blob)
            self._tier.delete(self._tier.blob_name(made.file))
            raise StaleReference(f"blob {blob} is written in full: {error}") from error

    def _put_list(self, blob: str, made: Made) -> ObjectBlob:
        """Publish the blob's extent list; somebody else's, if that came first."""
        try:
            self._put(BLOBS + blob, made.found.encode())
        except AlreadyExists:
            if (theirs := self.find(blob)) is not None:
                self._tier.delete(self._tier.blob_name(made.file))
                return theirs
            # Only now: a damaged copy without a good one beside it could not be found without it.
            self._tier.delete(BLOBS + blob)
            self._put(BLOBS + blob, made.found.encode())
        return made.found

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
