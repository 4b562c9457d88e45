"""What a session's end leaves to remove: its row, the blob that it landed, files without a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from forebay_server.catalog import queries_uploads as queries
from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import FileRef, is_known_file
from forebay_server.publish.placing import run_to_end
from forebay_server.publish.session import Session
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import ForebayError

logger = logging.getLogger(__name__)


class Leftovers:
    """Removes what ended sessions leave. Belongs to the event loop; holds no state."""

    def __init__(self, catalog: Catalog, tiers: Tiers, forget: Callable[[str], object]) -> None:
        """*forget* is told the id of a blob whose local files are about to be deleted."""
        self._catalog = catalog
        self._tiers = tiers
        self._forget = forget

    def local_tiers(self) -> list[str]:
        return [tier.name for tier in self._tiers.landing]

    async def end(self, found: Session) -> None:
        """End the row of a session that is no longer in memory, and delete its bytes.

        What the catalog cannot do now, its expiry does later.
        """
        try:
            ended_row = await self._catalog.write(
                lambda connection: queries.end_upload(connection, found.name, self.local_tiers())
            )
            await self.delete_landed(ended_row)
            if found.landed is None and not await self._catalog.read(
                lambda connection: is_known_file(connection, found.file)
            ):
                # It may have been published already, and its row refused.
                await self.delete_files([FileRef(found.tier.name, found.file)])
        except ForebayError as error:
            logger.warning("upload session %s ends later: %s", found.name, error)

    async def delete_landed(self, row: queries.Ended) -> None:
        """Delete what an ended row had landed and nothing else names."""
        if row.blob is not None and row.files:
            self._forget(row.blob)
        await self.delete_files(row.files)

    async def delete_files(self, files: Iterable[FileRef]) -> None:
        """Delete files that no row names; one that stays is found by the next collection."""
        for ref in files:
            tier = self._tiers.get(ref.tier)
            try:
                await run_to_end(self._tiers.run(tier, tier.delete, ref.file))
            except ForebayError as error:
                logger.warning("file %s stays in tier %s: %s", ref.file, ref.tier, error)
