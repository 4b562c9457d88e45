"""What a run has stored already: the segments that its next pack refers to instead of writing."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_sharing import (
    PackOfRun,
    SourceReplica,
    num_sharers,
    shareable,
)
from forebay_server.model.deltas import Base, base_of
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


@dataclass(frozen=True)
class Shareable:
    """What a pack need not store once more."""

    segments: Mapping[bytes, Placed]
    """By BLAKE3: what it refers to where it has the same."""
    base: Base | None = None
    """What it may store differences from."""


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
        sources = [source for _, source in await self._read_sources(run, tier)]
        return known_segments(sources, await self._num_sharers(sources))

    async def of_pack(self, pack: PackOfRun, tier: Tier) -> Shareable:
        """The same for *pack*, with the pack of the newest generation that its segments may be
        differences from."""
        found = await self._read_sources(pack.run, tier)
        sources = [source for _, source in found]
        newest = next(((one, source) for one, source in found if one.rank == pack.rank), None)
        sharers = await self._num_sharers(sources)
        # Not on the loop: large packs have tens of thousands of segments, in several layers.
        return await asyncio.to_thread(_shareable, sources, sharers, newest)

    async def _num_sharers(self, sources: Sequence[Source]) -> Mapping[str, int]:
        names = sorted({file for source in sources for file in source.files})
        return await self._catalog.read(lambda connection: num_sharers(connection, names))

    async def _read_sources(self, run: str, tier: Tier) -> list[tuple[SourceReplica, Source]]:
        """Those that can be read now, newest first."""
        found = await self._catalog.read(
            lambda connection: shareable(connection, run, tier.name, self._node)
        )
        sources: list[tuple[SourceReplica, Source]] = []
        for one in found:
            try:
                source = await self._source(tier, one)
            except ForebayError as error:
                logger.info("a pack shares nothing with blob %s: %s", one.blob, error)
                continue
            sources.append((one, replace(source, is_remote=one.is_remote)))
        return sources

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


def _shareable(
    sources: Sequence[Source],
    num_sharers: Mapping[str, int],
    newest: tuple[SourceReplica, Source] | None,
) -> Shareable:
    if newest is None:
        return Shareable(known_segments(sources, num_sharers))
    replica, source = newest
    known = known_segments(sources, num_sharers, source.files)
    usable = {file for placed in known.values() for file in placed.files}
    return Shareable(known, base_of(replica.blob, source, usable))


def _read_source(tier: Tier, one: SourceReplica) -> Source:
    if one.encoding == PIECES or tier.kind == "object":
        return Source.of(read_list(tier, one.file, one.blob))
    with open_plain(tier, one.file, one.encoding, one.blob) as reader:
        table = read_table(reader, one.blob)
        if one.encoding != RAW:
            raise StorageError(f"tier {tier.name} hands over only what is raw")
        whole = ObjectExtent(0, 0, table.total_bytes, reader.size_bytes, one.file)
    return Source(table, (whole,))
