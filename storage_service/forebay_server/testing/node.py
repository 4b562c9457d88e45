"""The storage of one daemon without its edges: tiers, catalog and opener in a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.queries_blobs import BlobLocation, insert_replica
from forebay_server.serve.open import Opener
from forebay_server.testing.tier_contract import write_blob
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.memory import SlotPool
from forebay_server.tier.registry import Tiers
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MIB
from forebay_wire.segments import SegmentTable, file_bytes_for


class StorageNode:
    """Tiers ``ssd``, ``hdd`` and ``object`` and 64 MiB of ``ram``, with an :class:`Opener`.

    ``async with StorageNode(folder) as node``: everything runs inside.
    """

    def __init__(self, folder: Path, tiers: Sequence[Tier] | None = None) -> None:
        self.folder = folder
        self._tiers = tiers

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.slots = SlotPool(64 * MIB, reserve_bytes=0)
            self.tiers = Tiers(
                self._tiers
                or (
                    DirectoryTier("ssd", "ssd", self.folder / "ssd", reserve_bytes=0),
                    DirectoryTier("hdd", "hdd", self.folder / "hdd", reserve_bytes=0),
                    RemoteTier("object", f"file://{self.folder}/object"),
                ),
                self.slots,
            )
            await self.tiers.start()
            stack.push_async_callback(self.tiers.close)
            url = sqlite_url(self.folder / "catalog.sqlite")
            self.catalog = await asyncio.to_thread(Catalog.open, url)
            stack.push_async_callback(asyncio.to_thread, self.catalog.close)
            self.opener = Opener(self.tiers, self.catalog)
            stack.push_async_callback(self.opener.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def add_blob(self, pieces: Sequence[bytes], *tiers: str) -> SegmentTable:
        """A blob whose segments are *pieces*, with a replica in each of *tiers*."""
        tables = [await self._add_replica(list(pieces), self.tiers.get(name)) for name in tiers]
        return tables[0]

    async def locate(self, blob: str) -> BlobLocation:
        """Where *blob* lies, by the catalog."""
        return (await self.catalog.locate([blob]))[blob]

    async def path_of(self, blob: str, tier: str) -> Path:
        """The file of *blob*'s live replica in a tier that is a folder."""
        for replica in (await self.locate(blob)).live():
            if replica.tier == tier:
                file = replica.extents[0].file
                folder = self.folder / tier
                return (
                    folder / "data" / file
                    if tier == "object"
                    else (folder / "files" / file[:2] / file)
                )
        raise AssertionError(f"{blob} has no live replica in {tier}")

    async def _add_replica(self, pieces: list[bytes], tier: Tier) -> SegmentTable:
        file = new_random_name()
        table = await self.tiers.run(tier, write_blob, tier, file, pieces)
        await self.catalog.write(
            lambda connection: insert_replica(
                connection,
                table.blob_id,
                table.total_bytes,
                table.num_segments,
                tier.name,
                file,
                file_bytes_for(table.total_bytes, table.num_segments),
            )
        )
        return table
