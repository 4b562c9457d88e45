"""The storage below a daemon's edges, in one process: catalog, tiers, upload sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.publish.lease import LandedBlob, Uploads
from forebay_server.publish.reconcile import reconcile
from forebay_server.publish.session import Piece
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.memory import SlotPool
from forebay_server.tier.registry import Tiers
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier
from forebay_wire.limits import MIB
from forebay_wire.segments import even_cuts

UID = 1000


@dataclass(frozen=True)
class Storage:
    """What one daemon keeps bytes with."""

    catalog: Catalog
    tiers: Tiers
    uploads: Uploads

    def files(self) -> list[str]:
        """Names of all files in the landing tiers."""
        return sorted(info.name for tier in self.tiers.landing for info in tier.list())

    async def upload(
        self, data: bytes, *, owner: str = "dataset d", cuts: Sequence[int] | None = None
    ) -> LandedBlob:
        """Upload *data* in one piece, cut every MiB unless *cuts* say otherwise, and seal it."""
        grant = await self.uploads.begin(UID, owner, len(data), len(data))
        self.uploads.slot(grant.session, UID).view[: len(data)] = data
        pieces = even_cuts(len(data), MIB) if cuts is None else cuts
        return await self.uploads.seal(grant.session, UID, Piece(0, len(data), tuple(pieces)))


@asynccontextmanager
async def open_storage(
    folder: Path,
    *,
    lease_seconds: float = 60.0,
    limit_bytes: int = 0,
    ram_bytes: int = 256 * MIB,
    with_object: bool = False,
    object_tier: Tier | None = None,
    catalog_url: str = "",
    wrap: Callable[[Tier], Tier] = lambda tier: tier,
) -> AsyncIterator[Storage]:
    """The storage in *folder*, as a start of the daemon opens and reconciles it.

    *wrap* is put around each tier. With *with_object* the object tier is a folder beside the
    others; *object_tier* is one that lies elsewhere.
    """
    tiers: list[Tier] = [
        DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=limit_bytes, reserve_bytes=0),
        DirectoryTier("hdd", "hdd", folder / "hdd", limit_bytes=limit_bytes, reserve_bytes=0),
    ]
    if with_object:
        tiers.append(RemoteTier("object", f"file://{folder / 'object'}"))
    if object_tier is not None:
        tiers.append(object_tier)
    opened = Tiers([wrap(tier) for tier in tiers], SlotPool(ram_bytes, 0))
    await opened.start()
    catalog = Catalog.open(catalog_url or sqlite_url(folder / "catalog.sqlite"), owner="test")
    try:
        await reconcile(catalog, opened)
        uploads = Uploads(catalog, opened, lease_seconds=lease_seconds)
        await uploads.start()
        try:
            yield Storage(catalog, opened, uploads)
        finally:
            await uploads.close()
    finally:
        await opened.close()
        catalog.close()
