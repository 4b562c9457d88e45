"""Has the blob of a sealed session be read from its slot, from the digests on."""

from __future__ import annotations

import logging

from forebay_server.publish.placing import run_to_end
from forebay_server.publish.session import Session
from forebay_server.tier.registry import Tiers
from forebay_server.tier.sealed import digest_slot
from forebay_wire.errors import ResourceExhausted
from forebay_wire.segments import SegmentTable

logger = logging.getLogger(__name__)


async def open_in_slot(tiers: Tiers, found: Session) -> SegmentTable | None:
    """Let the blob of *found* be read from its slot until it has landed or failed; its table.

    None if the slot does not hold all of it, it does not lie there any more, or memory is short.
    """
    async with found.lock:
        table, piece = tiers.sealed.table(found.name), found.whole_in_slot
        if table is not None or piece is None:
            return table
        with tiers.slots.pinned(found.slot):
            table = await run_to_end(tiers.run(tiers.slots, digest_slot, found.slot, piece.cuts))
            if found.whole_in_slot is None:  # it has landed, or failed, meanwhile
                return None
            try:
                tiers.sealed.add(found.name, found.slot, table)
            except ResourceExhausted as error:
                logger.warning(
                    "upload session %s cannot be read before it has landed: %s", found.name, error
                )
                return None
    return table
