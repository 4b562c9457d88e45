"""From the object tier to where clients can map it: into a local tier with room, or a window."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import (
    BlobLocation,
    insert_replica,
    live_replica,
    locate_blobs,
)
from forebay_server.model.encodings import RAW
from forebay_server.model.landing import Room, choose_landing
from forebay_server.tier.encode import open_plain
from forebay_server.tier.memory import Window
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import copy_verified
from forebay_wire.errors import NotFound, ResourceExhausted
from forebay_wire.ids import new_random_name
from forebay_wire.segments import file_bytes_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A blob file in a tier: all that it takes to open it again without asking the catalog."""

    blob: str
    num_bytes: int
    num_segments: int
    replica_id: str
    tier: str
    file: str
    """As the catalog calls it."""
    encoding: str = RAW

    @property
    def file_bytes(self) -> int:
        """Size of the raw file."""
        return file_bytes_for(self.num_bytes, self.num_segments)


class Promoter:
    """Fetches blobs. Belongs to the event loop; holds no state."""

    def __init__(self, tiers: Tiers, catalog: Catalog) -> None:
        self._tiers = tiers
        self._catalog = catalog

    async def promote(self, source: Place) -> Place | Window:
        """Copy the blob at *source*, verified by BLAKE3, into the best landing tier with room.

        A replica of the blob on return, durable and in the catalog; where no tier has room, a
        sealed window that the caller closes. :class:`IntegrityError` if the source is damaged,
        :class:`ResourceExhausted` if there is neither room nor memory.
        """
        rooms = [
            Room(tier.name, tier.space().free_bytes)
            for tier in self._tiers.landing
            if tier.name != source.tier
        ]
        for name in choose_landing(source.file_bytes, rooms):
            try:
                return await self._promote_into(source, self._tiers.get(name))
            except ResourceExhausted as error:
                logger.info("blob %s is not promoted to %s: %s", source.blob, name, error)
        from_tier = self._tiers.get(source.tier)
        return await self._tiers.run(from_tier, self._fill_window, source)

    async def _promote_into(self, source: Place, tier: Tier) -> Place:
        file = new_random_name()
        await self._tiers.run(self._tiers.get(source.tier), self._copy, source, tier, file)
        target = Place(source.blob, source.num_bytes, source.num_segments, "", tier.name, file)
        try:
            replica_id = await self._catalog.write(lambda connection: _record(connection, target))
        except BaseException:
            await self._tiers.run(tier, tier.delete, file)
            raise
        if replica_id is not None:
            return Place(**{**vars(target), "replica_id": replica_id})
        # Somebody else brought the blob to this tier meanwhile: that copy serves.
        await self._tiers.run(tier, tier.delete, file)
        found = (await self._catalog.locate([source.blob])).get(source.blob)
        for place in places_of(found) if found is not None else ():
            if place.tier == tier.name:
                return place
        raise NotFound(f"blob {source.blob} was deleted while it was fetched")

    def _copy(self, source: Place, tier: Tier, file: str) -> None:
        origin = self._tiers.get(source.tier)
        with (
            open_plain(origin, source.file, source.encoding, source.blob) as reader,
            tier.create(tier.blob_name(file), source.file_bytes) as writer,
        ):
            copy_verified(reader, writer, source.blob)
            writer.publish()

    def _fill_window(self, source: Place) -> Window:
        origin = self._tiers.get(source.tier)
        window = self._tiers.slots.window(source.file_bytes)
        try:
            with open_plain(origin, source.file, source.encoding, source.blob) as reader:
                copy_verified(reader, window, source.blob)
            window.seal()
        except BaseException:
            window.close()
            raise
        return window


def places_of(location: BlobLocation) -> list[Place]:
    """The live copies of a blob that are one file each."""
    return [
        Place(
            location.blob,
            location.num_bytes,
            location.num_segments,
            replica.replica_id,
            replica.tier,
            replica.extents[0].file,
            replica.encoding,
        )
        for replica in location.live()
        if len(replica.extents) == 1 and replica.extents[0].file_offset == 0
    ]


def _record(connection: Connection, target: Place) -> str | None:
    """The new replica's id, None if the tier has the blob already."""
    if not locate_blobs(connection, [target.blob]):
        raise NotFound(f"blob {target.blob} was deleted while it was fetched")
    if live_replica(connection, target.blob, [target.tier]) is not None:
        return None
    return insert_replica(
        connection,
        target.blob,
        target.num_bytes,
        target.num_segments,
        target.tier,
        target.file,
        target.file_bytes,
    )
