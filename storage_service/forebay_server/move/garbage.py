"""What the collector would delete now, and why: a dry run that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from forebay_server.catalog import queries_fsck as queries
from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_blobs import orphan_blobs
from forebay_server.catalog.queries_fsck import OrphanRow
from forebay_server.move.fsck import Strays
from forebay_server.tier.registry import Tiers

MOST: Final = 100_000
"""Orphans that are looked up."""


@dataclass(frozen=True)
class Doomed:
    """Something that would go; the field names are those of the message."""

    what: str
    """``manifest ID``, ``blob ID`` or ``file NAME``."""
    tiers: tuple[str, ...]
    num_bytes: int
    reason: str


class Garbage:
    """Belongs to the event loop; holds no state of its own."""

    def __init__(
        self, catalog: Catalog, tiers: Tiers, collector: Strays, is_in_use: Callable[[str], bool]
    ) -> None:
        """*is_in_use* tells whether a client has a blob in hand, or a plan needs it."""
        self._catalog = catalog
        self._tiers = tiers
        self._collector = collector
        self._is_in_use = is_in_use

    async def find(self) -> list[Doomed]:
        """Manifests, blobs and files that would go, in the order in which they do."""
        manifests = await self._manifests()
        ids = [name for name, _ in manifests]
        following = await self._catalog.read(
            lambda connection: queries.blobs_only_of(connection, ids)
        )
        orphans = await self._catalog.read(lambda connection: orphan_blobs(connection, MOST))
        return [
            *[Doomed(f"manifest {name}", (), 0, reason) for name, reason in manifests],
            *await self._blobs(following, "only manifests that go name it"),
            *await self._blobs(orphans, "no manifest, pack or upload session names it"),
            *await self._files(),
        ]

    async def _manifests(self) -> list[tuple[str, str]]:
        deleted = await self._catalog.read(queries.doomed_manifests)
        expired = await self._catalog.read(queries.expired_trash)
        return [
            *[(name, "what it made was deleted") for name in deleted],
            *[(name, f"{target} can no longer be restored") for name, target in expired],
        ]

    async def _blobs(self, ids: list[str], reason: str) -> list[Doomed]:
        found = await self._catalog.read(lambda connection: queries.describe_blobs(connection, ids))
        return [self._doomed(row, reason) for row in found]

    def _doomed(self, row: OrphanRow, reason: str) -> Doomed:
        later = "; not before a client or plan has done with it"
        why = reason + (later if self._is_in_use(row.blob) else "")
        return Doomed(f"blob {row.blob}", row.tiers, row.num_bytes, why)

    async def _files(self) -> list[Doomed]:
        return [
            Doomed(f"file {info.name}", (tier.name,), info.size_bytes, "no row names it")
            for tier in self._tiers.own
            for info in await self._collector.strays(tier)
        ]
