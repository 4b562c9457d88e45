"""The first read of an origin: every byte once, digested, and kept where the cache has room."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import insert_replica, live_replica
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_origins import (
    OriginRow,
    find_origins,
    keep_digests,
    place_content,
)
from forebay_server.serve.promote import Place, Promoter
from forebay_server.serve.shared import Shared
from forebay_server.tier.course import doing
from forebay_server.tier.origin import OriginFile
from forebay_server.tier.origin_ranges import in_order
from forebay_server.tier.origin_tier import OriginTier, off
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier, TierWriter
from forebay_wire.errors import ForebayError, ResourceExhausted
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MAX_SEGMENT_BYTES
from forebay_wire.segments import SegmentTable, SegmentTableBuilder, encode_trailer, even_cuts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Copy:
    """A file that was written beside the reading."""

    tier: Tier
    file: str
    num_bytes: int


class OriginContents:
    """Which blob an origin's bytes make. Belongs to the event loop; ``close`` ends first reads."""

    def __init__(self, tiers: Tiers, catalog: Catalog, promoter: Promoter) -> None:
        self._tiers = tiers
        self._catalog = catalog
        self._promoter = promoter
        self._tier = next((tier for tier in tiers.all if isinstance(tier, OriginTier)), None)
        self._first_reads: dict[str, Shared[str]] = {}
        self._listeners: list[Callable[[str, str], object]] = []

    def listen(self, listener: Callable[[str, str], object]) -> None:
        """Have *listener* told of each origin that was read for the first time, and of the blob
        that its bytes make, before anybody hears of that blob."""
        self._listeners.append(listener)

    async def read_ahead(self, origin: str) -> bool:
        """Read an origin for the first time before anybody asks for it, if a tier has room for the
        copy: without one it would be read twice. Whether its blob is known on return.

        Errors as those of :meth:`content_of`.
        """
        row = (await self._catalog.read(lambda one: find_origins(one, [origin]))).get(origin)
        if row is None:
            return False
        if row.blob:
            self._tell(origin, row.blob)
            return True
        if origin not in self._first_reads:
            target = await self._target(row)
            if target is None:
                return False
            if origin not in self._first_reads:
                self._begin(row, target)
        await self._first_reads[origin].wait()
        return True

    async def close(self) -> None:
        """Idempotent. A read that runs on a thread ends by itself, and is of no use."""
        tasks = [one.task for one in self._first_reads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def content_of(self, origin: str) -> str | None:
        """The blob with the bytes of *origin*, known to the catalog on return; None if that is no
        origin.

        The first time all bytes are read, once however many ask: they are trusted then, and
        compared with ever since. :class:`OriginChanged`, :class:`PermissionDenied`,
        :class:`StorageError`.
        """
        with doing("tier"):
            found = await self._catalog.read(lambda one: find_origins(one, [origin]))
        row = found.get(origin)
        if row is None:
            return None
        if row.blob:
            await self._place(row)
            return row.blob
        reading = self._first_reads.get(origin) or self._begin(row)
        return await reading.wait()

    def _begin(self, row: OriginRow, target: Tier | None = None) -> Shared[str]:
        """The first read of *row*, its copy going to *target*, or where the cache has room."""
        origin = row.origin
        reading = Shared(self._read_first(row, target), f"origin-{origin}")
        self._first_reads[origin] = reading
        reading.task.add_done_callback(lambda _: self._first_reads.pop(origin, None))
        return reading

    def _tell(self, origin: str, blob: str) -> None:
        for listener in self._listeners:
            listener(origin, blob)

    async def _place(self, row: OriginRow) -> None:
        """A blob that was forgotten with the last dataset that named it is known again."""
        if (await self._catalog.locate([row.blob])).get(row.blob) is None:
            table = row.table()
            await self._catalog.write(lambda one: place_content(one, row.blob, table))

    async def _read_first(self, row: OriginRow, target: Tier | None) -> str:
        if self._tier is None:
            raise off()
        is_ahead = target is not None
        target = target or await self._target(row)
        with nullcontext() if is_ahead else self._promoter._foreground(self._tier.name):
            try:
                table, copy = await self._tiers.run(self._tier, self._read, row, target)
            except ResourceExhausted as error:
                if target is None:
                    raise
                logger.info("origin %s is not kept in %s: %s", row.ref.url, target.name, error)
                table, copy = await self._tiers.run(self._tier, self._read, row, None)
        self._promoter.fetched_bytes[self._tier.name] += row.num_bytes
        failpoint("origin.before_row")
        try:
            with doing("tier"):
                blob, replica = await self._catalog.write(lambda one: _enter(one, row, table, copy))
        except Exception:
            await self._drop(copy)
            raise
        failpoint("origin.after_row")
        self._tell(row.origin, blob)
        if copy is None:
            return blob
        if replica is None:
            await self._drop(copy)
            return blob
        place = _place(blob, row.num_bytes, table.num_segments, replica, copy.tier.name, copy.file)
        self._promoter.policy.entered(place)
        return blob

    async def _target(self, row: OriginRow) -> Tier | None:
        """The landing tier that takes a copy of the bytes that are read anyway."""
        num_segments = len(even_cuts(row.num_bytes))
        source = _place(row.origin, row.num_bytes, num_segments, "", "origin", "")
        found = await self._promoter.policy.tiers_for(source)
        return found[0] if found else None

    async def _drop(self, copy: _Copy | None) -> None:
        if copy is not None:
            await self._tiers.run(copy.tier, copy.tier.delete, copy.tier.blob_name(copy.file))

    # ------------------------------------------------------------------------- on a thread

    def _read(self, row: OriginRow, target: Tier | None) -> tuple[SegmentTable, _Copy | None]:
        assert self._tier is not None
        file = self._tier.places.open(row.ref.url, row.num_bytes, row.ref.validator)
        try:
            if target is None:
                return _digest(file, None), None
            name = new_random_name()
            with target.create(target.blob_name(name), row.num_bytes) as writer:
                table = _digest(file, writer)
                writer.write(table.encoded)
                writer.write(encode_trailer(table.total_bytes, len(table.encoded)))
                num_bytes = writer.num_bytes
                with doing("tier"):
                    writer.publish()
            return table, _Copy(target, name, num_bytes)
        finally:
            file.close()


def _digest(file: OriginFile, writer: TierWriter | None) -> SegmentTable:
    """Read all of *file* once, into *writer* too; its segment table."""
    builder = SegmentTableBuilder()
    with in_order(file) as ranges:
        for view in ranges:
            for first in range(0, view.nbytes, MAX_SEGMENT_BYTES):
                piece = view[first : first + MAX_SEGMENT_BYTES]
                builder.add(piece)
                if writer is not None:
                    with doing("tier"):
                        writer.write(piece)
    return builder.build()


def _place(
    blob: str, num_bytes: int, num_segments: int, replica: str, tier: str, file: str
) -> Place:
    return Place(blob, num_bytes, num_segments, replica, tier, file)


def _enter(
    connection: Connection, row: OriginRow, table: SegmentTable, copy: _Copy | None
) -> tuple[str, str | None]:
    """Keep the digests, and the copy's row; the blob, and the new replica if there is one."""
    blob = keep_digests(connection, row.origin, table)
    if blob != table.blob_id:
        raise ForebayError(f"origin {row.ref.url} was read twice at once, with two results")
    record(connection, f"blob {blob}", "read first", f"origin {row.ref.url}")
    if copy is None or live_replica(connection, blob, [copy.tier.name]) is not None:
        return blob, None
    replica = insert_replica(
        connection,
        blob,
        row.num_bytes,
        table.num_segments,
        copy.tier.name,
        copy.file,
        copy.num_bytes,
    )
    return blob, replica
