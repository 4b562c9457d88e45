"""The end of a landing: what was published gets its rows, or goes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from forebay_server.catalog import queries_uploads as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import FileRef
from forebay_server.catalog.queries_sharing import StaleReference
from forebay_server.publish.duplicates import Duplicates
from forebay_server.publish.landing import PublishedBlob
from forebay_server.publish.leftovers import Leftovers
from forebay_server.publish.session import LandedBlob, Session

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Recorder:
    """Belongs to the event loop."""

    def __init__(
        self, catalog: Catalog, duplicates: Duplicates, leftovers: Leftovers, node: str
    ) -> None:
        self._catalog = catalog
        self._duplicates = duplicates
        self._leftovers = leftovers
        self._node = node
        self.landed_bytes = 0
        self.shared_bytes = 0
        """Of those, what the tier had already: it was not written."""

    async def record(
        self,
        found: Session,
        publishing: Awaitable[PublishedBlob],
        landed: Callable[[Connection, LandedBlob], T],
        again: Callable[[], Awaitable[PublishedBlob]] | None,
    ) -> tuple[LandedBlob, T, list[FileRef]]:
        """Record what *publishing* publishes, with *landed* in the same transaction: the blob, what
        that answered, and the files that no row names, for the caller to delete.

        Where it shares pieces that are not safe any more, what *again* publishes takes its place.
        """
        done = await publishing
        blob = _landed(found, done)
        trusted = await self._duplicates.trusted_tiers(blob.blob, found.tier.name)

        def note(connection: Connection) -> tuple[list[FileRef], T]:
            spare = queries.record_landed(
                connection,
                blob.session,
                blob.blob,
                blob.num_bytes,
                blob.num_segments,
                done.file_bytes,
                trusted_tiers=trusted,
                node=self._node,
                list_file=done.list_file,
                list_bytes=done.list_bytes,
                pieces=done.pieces,
            )
            return spare, landed(connection, blob)

        try:
            spare, value = await self._catalog.write(note)
        except StaleReference as error:
            assert again is not None, "only what lands in the background shares pieces"
            logger.warning("upload session %s: %s", found.name, error)
            await self._leftovers.delete_files([FileRef(found.tier.name, done.list_file)])
            done = await again()
            blob = _landed(found, done)
            spare, value = await self._catalog.write(note)
        found.table = done.table
        self.landed_bytes += done.num_bytes
        self.shared_bytes += done.shared_bytes
        return blob, value, spare


def _landed(found: Session, done: PublishedBlob) -> LandedBlob:
    return LandedBlob(found.name, done.blob, done.num_bytes, done.num_segments, done.shared_bytes)
