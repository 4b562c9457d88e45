"""Files of which most is not needed any more, and replicas that get a smaller one instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, exists, func, insert, select, update

from forebay_server.catalog.queries_blobs import FileRef, remove_replica
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_sharing import add_pieces
from forebay_server.catalog.tables import extents, files, replicas
from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectExtent
from forebay_wire.errors import Conflict

MIN_BYTES: Final = 1 << 20
"""Smaller files are left as they are."""

PAGE_FILES: Final = 1000


@dataclass(frozen=True)
class Sharer:
    """A replica in pieces, some of them of one file."""

    replica_id: str
    blob: str
    list_file: str


def mostly_dead(connection: Connection, tiers: Sequence[str], live_share: float) -> list[FileRef]:
    """Files of *tiers* that only replicas in pieces name, and these at most *live_share* of, as far
    as that can be told at once; some, the largest first."""
    whole = exists().where(
        extents.c.file == files.c.file,
        extents.c.replica == replicas.c.replica,
        (replicas.c.encoding != PIECES) | (replicas.c.state != "live"),
    )
    ranges = (
        select(extents.c.file, extents.c.file_offset, extents.c.num_bytes).distinct().subquery()
    )
    # Ranges that overlap count twice: such a file is left for when fewer name it.
    statement = (
        select(files.c.tier, files.c.file)
        .join(ranges, ranges.c.file == files.c.file)
        .where(
            files.c.tier.in_(tiers),
            files.c.state == "live",
            files.c.num_bytes >= MIN_BYTES,
            ~whole,
        )
        .group_by(files.c.tier, files.c.file, files.c.num_bytes)
        .having(func.sum(ranges.c.num_bytes) <= files.c.num_bytes * live_share)
        .having(func.sum(ranges.c.num_bytes) > 0)
        .order_by(files.c.num_bytes.desc())
        .limit(PAGE_FILES)
    )
    return [FileRef(row.tier, row.file) for row in connection.execute(statement)]


def sharers_of(connection: Connection, file: str) -> list[Sharer]:
    """The replicas that name *file*; empty if one of them is not in pieces, or out of service."""
    any_piece = extents.alias("any_piece")
    named = select(any_piece.c.replica).where(any_piece.c.file == file)
    rows = connection.execute(
        select(replicas, extents.c.file)
        .join(extents, extents.c.replica == replicas.c.replica)
        .where(replicas.c.replica.in_(named), extents.c.seq == 0)
        .order_by(replicas.c.replica)
    ).all()
    if any(row.encoding != PIECES or row.state != "live" or row.file == file for row in rows):
        return []
    return [Sharer(row.replica, row.blob, row.file) for row in rows]


@dataclass(frozen=True)
class Compacted:
    """What takes the place of one sharer's replica; durable already."""

    sharer: Sharer
    list_file: str
    list_bytes: int
    pieces: tuple[ObjectExtent, ...]


def replace_file(
    connection: Connection,
    old: FileRef,
    new_file: str,
    new_bytes: int,
    compacted: Sequence[Compacted],
    *,
    node: str,
) -> list[FileRef]:
    """Have all sharers of *old* use *new_file*; the files that nothing names any more.

    :class:`Conflict` if others share it by now, or one of them has gone: nothing changes then.
    """
    if sharers_of(connection, old.file) != [one.sharer for one in compacted]:
        raise Conflict(f"file {old.file} is shared by others than before: it is looked at later")
    added = [(new_file, new_bytes), *((one.list_file, one.list_bytes) for one in compacted)]
    connection.execute(
        insert(files),
        [{"file": file, "tier": old.tier, "num_bytes": size} for file, size in added],
    )
    gone: list[FileRef] = []
    for one in compacted:
        # The new rows come first, or what only this one shares would be forgotten in between; a
        # tier has one copy in service.
        before = replicas.c.replica == one.sharer.replica_id
        connection.execute(update(replicas).where(before).values(state="quarantined"))
        add_pieces(connection, one.sharer.blob, old.tier, one.list_file, one.pieces, node=node)
        gone += remove_replica(connection, one.sharer.replica_id)
        record(connection, f"blob {one.sharer.blob}", "compacted", f"{old.tier}: file {old.file}")
    return gone
