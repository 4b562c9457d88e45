"""A blob that landed and that the node has already: which of the two copies stays."""

from __future__ import annotations

import logging

from forebay_server.catalog.engine import Catalog
from forebay_server.quarantine import Quarantine
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import IntegrityError, NotFound, StorageError

logger = logging.getLogger(__name__)


class Duplicates:
    """Belongs to the event loop; holds no state of its own."""

    def __init__(self, catalog: Catalog, tiers: Tiers, quarantine: Quarantine) -> None:
        self._catalog = catalog
        self._tiers = tiers
        self._quarantine = quarantine

    async def trusted_tiers(self, blob: str, tier: str) -> list[str]:
        """The landing tiers whose copy of *blob*, if they have one, makes a new one in *tier*
        superfluous.

        Every byte of each copy that the catalog names is read for that: whoever sealed the blob is
        told that it is durable, and the file on the disk may be damaged or gone by now. A bad copy
        is quarantined.
        """
        trusted = [one.name for one in self._tiers.landing]
        located = (await self._catalog.locate([blob])).get(blob)
        for replica in located.live() if located is not None else ():
            if replica.tier not in trusted:
                continue
            file = replica.extents[0].file
            try:
                await self._quarantine.verify(
                    blob, replica.tier, file, replica.encoding, is_landing=True
                )
            except (IntegrityError, NotFound) as error:
                await self._quarantine.condemn(blob, replica.replica_id, replica.tier, file, error)
            except StorageError as error:
                if replica.tier == tier:  # one live copy in a tier: the new one has no place there
                    raise
                logger.warning("blob %s is stored once more: %s", blob, error)
                trusted.remove(replica.tier)
        return trusted
