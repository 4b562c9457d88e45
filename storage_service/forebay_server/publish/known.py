"""What a run has stored already: the segments that its next pack refers to instead of writing."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_sharing import SourceReplica, num_sharers, shareable
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.extents import ObjectExtent
from forebay_server.model.sharing import Placed, Source, known_segments
from forebay_server.tier.encode import open_plain, read_list
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import read_table
from forebay_wire.errors import ForebayError, StorageError

logger = logging.getLogger(__name__)

MAX_SEGMENTS: Final = 1 << 20
"""Of all replicas that are remembered: about 150 MB at most, a terabyte of large tensors."""


class KnownSegments:
    """Belongs to the event loop; tables are read on their tier's threads."""

    def __init__(self, catalog: Catalog, tiers: Tiers, node: str = "") -> None:
        self._catalog = catalog
        self._tiers = tiers
        self._node = node
        self._sources: OrderedDict[str, Source] = OrderedDict()

    async def of(self, run: str, tier: Tier) -> Mapping[bytes, Placed]:
        """BLAKE3 to place in *tier* of the segments that a pack of *run* may refer to.

        Nothing that cannot be read now: it is written anew then.
        """
        found = await self._catalog.read(
            lambda connection: shareable(connection, run, tier.name, self._node)
        )
        sources: list[Source] = []
        for one in found:
            try:
                source = await self._source(tier, one)
            except ForebayError as error:
                logger.info("a pack shares nothing with blob %s: %s", one.blob, error)
                continue
            sources.append(replace(source, is_remote=one.is_remote))
        names = sorted({extent.file for source in sources for extent in source.extents})
        sharers = await self._catalog.read(lambda connection: num_sharers(connection, names))
        return known_segments(sources, sharers)

    async def _source(self, tier: Tier, one: SourceReplica) -> Source:
        known = self._sources.get(one.replica_id)
        if known is None:
            run = self._tiers.run if tier.kind == "object" else self._tiers.run_landing
            known = await run(tier, _read_source, tier, one)
            self._sources[one.replica_id] = known
            self._forget_oldest()
        self._sources.move_to_end(one.replica_id)
        return known

    def _forget_oldest(self) -> None:
        while sum(one.table.num_segments for one in self._sources.values()) > MAX_SEGMENTS:
            if len(self._sources) == 1:
                return
            self._sources.popitem(last=False)


def _read_source(tier: Tier, one: SourceReplica) -> Source:
    if one.encoding == PIECES or tier.kind == "object":
        return Source.of(read_list(tier, one.file, one.blob))
    with open_plain(tier, one.file, one.encoding, one.blob) as reader:
        table = read_table(reader, one.blob)
        if one.encoding != RAW:
            raise StorageError(f"tier {tier.name} hands over only what is raw")
        whole = ObjectExtent(0, 0, table.total_bytes, reader.size_bytes, one.file)
    return Source(table, (whole,))
