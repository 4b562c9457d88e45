"""The segment tables of replicas that name a file, found even where their own copy of it is bad.

Everything here blocks, and reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from forebay_server.catalog.queries_blobs import BlobLocation, Replica
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.mending import Holder, HolderRow
from forebay_server.tier.encode import open_plain, read_list
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import read_table
from forebay_wire.errors import ForebayError, IntegrityError, NotFound, StorageError
from forebay_wire.segments import SegmentDigests, SegmentTable, SegmentTableBuilder

Entries = dict[tuple[str, int], SegmentDigests]
"""File and offset of a segment to what it is."""


def own_table(tier: Tier, row: HolderRow) -> SegmentTable | None:
    """The table that lies with the replica itself, as its medium has it; None if that is bad."""
    try:
        if row.encoding == PIECES:
            return read_list(tier, row.list_file, row.blob).table
        (extent,) = row.extents
        read = tier.read_medium
        with open_plain(
            tier, extent.file, row.encoding, row.blob, stored_bytes=extent.file_bytes, read=read
        ) as reader:
            return read_table(reader, row.blob)
    except (IntegrityError, NotFound):
        return None


def read_holders(
    tiers: Tiers, tier: Tier, rows: Sequence[HolderRow], located: Mapping[str, BlobLocation]
) -> list[Holder]:
    """Those of *rows*, replicas in *tier*, of which the table was found: their own, that of another
    copy of the blob, or one put together from what others say of the same places.

    A table is known by its blob's id, so none of them is ever a wrong one.
    """
    known: list[Holder] = []
    unknown: list[HolderRow] = []
    for row in rows:
        table = own_table(tier, row) or _table_elsewhere(tiers, row, located.get(row.blob))
        if table is None:
            unknown.append(row)
        else:
            known.append(Holder(**vars(row), table=table))
    if unknown:
        entries = dict(_entries(known))
        for row in unknown:
            table = _rebuilt_table(tier, row, entries)
            if table is not None:
                known.append(Holder(**vars(row), table=table))
    return known


def table_of(tiers: Tiers, location: BlobLocation) -> SegmentTable | None:
    """The table of a blob, by whichever copy has it undamaged."""
    for replica in location.replicas:
        if (table := _read(tiers, location.blob, replica)) is not None:
            return table
    return None


def _table_elsewhere(
    tiers: Tiers, row: HolderRow, location: BlobLocation | None
) -> SegmentTable | None:
    for replica in location.replicas if location is not None else ():
        if replica.replica_id != row.replica_id:
            table = _read(tiers, row.blob, replica)
            if table is not None:
                return table
    return None


def _read(tiers: Tiers, blob: str, replica: Replica) -> SegmentTable | None:
    if replica.tier not in {tier.name for tier in tiers.own}:
        return None
    tier, file = tiers.get(replica.tier), replica.extents[0].file
    try:
        if tier.kind == "object" or replica.encoding == PIECES:
            return read_list(tier, file, blob).table
        with open_plain(tier, file, replica.encoding, blob) as reader:
            return read_table(reader, blob)
    except (IntegrityError, NotFound, StorageError):
        return None


def _entries(holders: Sequence[Holder]) -> Iterator[tuple[tuple[str, int], SegmentDigests]]:
    for holder in holders:
        entries = holder.table.entries
        for one in holder.segments:
            code = int(entries["xxh3"][one.number])
            yield (one.file, one.offset), (one.num_bytes, one.digest, code)


def _rebuilt_table(tier: Tier, row: HolderRow, known: Entries) -> SegmentTable | None:
    """The table of a replica, segment by segment from *known* and from the tables at the end of
    its files; None if that does not make up the blob."""
    entries = dict(known)
    for file in row.files:
        for place, said in _file_entries(tier, file):
            entries.setdefault(place, said)
    builder = SegmentTableBuilder()
    for extent in row.extents:
        position, stop = extent.file_offset, extent.file_offset + extent.num_bytes
        while position < stop:
            entry = entries.get((extent.file, position))
            if entry is None:
                return None
            builder.append(entry)
            position += entry[0]
    try:
        table = builder.build()
    except ForebayError:
        return None
    return table if table.blob_id == row.blob else None


def _file_entries(tier: Tier, file: str) -> Iterator[tuple[tuple[str, int], SegmentDigests]]:
    try:
        with open_plain(tier, file, RAW, None) as reader:
            table = read_table(reader, None)
    except (IntegrityError, NotFound):
        return
    for offset, entry in zip(table.offsets.tolist(), table.entries, strict=False):
        length, digest = int(entry["length"]), entry["blake3"].tobytes()
        yield (file, offset), (length, digest, int(entry["xxh3"]))
