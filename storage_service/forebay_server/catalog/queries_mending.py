"""Replicas that name a damaged file, where their segments may lie as well, and their new rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, and_, case, delete, exists, func, insert, select, update

from forebay_server.catalog.queries_blobs import FileRef, live_replica, remove_replica
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_sharing import add_pieces
from forebay_server.catalog.tables import extents, files, packs, replicas
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.extents import ObjectExtent
from forebay_server.model.mending import HolderRow

MAX_COPIES: Final = 20_000
"""Copies of packs whose tables are looked through for a lost segment."""


@dataclass(frozen=True)
class CopyRow:
    """A copy of a pack, in service or not."""

    blob: str
    tier: str
    file: str
    encoding: str


def holders_of(connection: Connection, tier: str, file: str, *, node: str = "") -> list[HolderRow]:
    """The replicas in *tier* of *node* that name *file*, in service or not."""
    named = select(extents.c.replica).where(extents.c.file == file)
    found = connection.scalars(
        select(replicas.c.replica)
        .where(replicas.c.replica.in_(named), replicas.c.tier == tier, replicas.c.node == node)
        .order_by(replicas.c.replica)
    ).all()
    return [_holder(connection, replica) for replica in found]


def quarantined_holder(
    connection: Connection, blob: str, tier: str, *, node: str = ""
) -> HolderRow | None:
    """A replica of *blob* in *tier* of *node* that is out of service while none there serves."""
    if live_replica(connection, blob, [tier], node=node) is not None:
        return None
    replica = connection.scalar(
        select(replicas.c.replica)
        .where(replicas.c.blob == blob, replicas.c.tier == tier, replicas.c.node == node)
        .order_by(replicas.c.created.desc(), replicas.c.replica)
        .limit(1)
    )
    return None if replica is None else _holder(connection, replica)


def _holder(connection: Connection, replica: str) -> HolderRow:
    row = connection.execute(select(replicas).where(replicas.c.replica == replica)).one()
    pieces = connection.execute(
        select(extents, files.c.num_bytes.label("file_bytes"))
        .join(files, files.c.file == extents.c.file)
        .where(extents.c.replica == replica)
        .order_by(extents.c.seq)
    ).all()
    is_shared = row.encoding == PIECES
    list_row = pieces[0] if is_shared else None
    encoding = RAW if is_shared else row.encoding
    return HolderRow(
        replica,
        row.blob,
        row.encoding,
        row.state == "live",
        "" if list_row is None else list_row.file,
        0 if list_row is None else list_row.file_bytes,
        tuple(
            ObjectExtent(
                one.blob_offset, one.file_offset, one.num_bytes, one.file_bytes, one.file, encoding
            )
            for one in pieces[is_shared:]
        ),
    )


def is_shared(connection: Connection, blob: str, tier: str, *, node: str = "") -> bool:
    """Whether a replica of *blob* in *tier* that is out of service lies in files that others name,
    too."""
    other = extents.alias("other")
    found = (
        select(extents.c.file)
        .join(replicas, replicas.c.replica == extents.c.replica)
        .where(
            replicas.c.blob == blob,
            replicas.c.tier == tier,
            replicas.c.node == node,
            replicas.c.state == "quarantined",
            exists().where(other.c.file == extents.c.file, other.c.replica != extents.c.replica),
        )
    )
    return connection.scalar(found.limit(1)) is not None


def copies_of_packs(connection: Connection, blob: str) -> list[CopyRow]:
    """All copies of packs, if *blob* is one, in whichever tier and state: those of the runs that
    have *blob* first, then the newest; at most :data:`MAX_COPIES`."""
    runs = connection.scalars(select(packs.c.run).where(packs.c.blob == blob).distinct()).all()
    if not runs:
        return []
    is_near = func.max(case((packs.c.run.in_(runs), 1), else_=0))
    rows = connection.execute(
        select(replicas.c.blob, replicas.c.tier, replicas.c.encoding, extents.c.file)
        .join(packs, packs.c.blob == replicas.c.blob)
        .join(extents, and_(extents.c.replica == replicas.c.replica, extents.c.seq == 0))
        .group_by(replicas.c.replica, replicas.c.blob, replicas.c.tier, replicas.c.encoding)
        .group_by(extents.c.file)
        .order_by(is_near.desc(), func.max(packs.c.created).desc(), replicas.c.replica)
        .limit(MAX_COPIES)
    )
    return [CopyRow(row.blob, row.tier, row.file, row.encoding) for row in rows]


@dataclass(frozen=True)
class NewPlace:
    """Where a replica lies once it is mended; durable already."""

    replica_id: str
    """The one that it takes the place of."""
    blob: str
    encoding: str
    list_file: str
    """Empty: it is a whole file."""
    list_bytes: int
    pieces: tuple[ObjectExtent, ...]
    is_good: bool
    """Whether every byte of it is known to be good."""


@dataclass(frozen=True)
class Replaced:
    """What came of it."""

    gone: list[FileRef]
    """Files that nothing names any more, or now did not come to be named: they are deleted after
    the transaction."""
    repaired: list[str]
    """Blobs that serve again."""
    moved: list[str]
    """Those and all others that have new rows."""


def replace_holders(
    connection: Connection,
    tier: str,
    new_file: str,
    new_bytes: int,
    places: Sequence[NewPlace],
    why: str,
    *,
    node: str = "",
) -> Replaced:
    """Have replicas lie at their new *places*, those of them that are still there; *new_file* is
    empty where only lists are new. What was in service stays so; what was not is, if it is good and
    no other copy serves there."""
    states = {
        row.replica: row
        for row in connection.execute(
            select(replicas).where(replicas.c.replica.in_([one.replica_id for one in places]))
        )
    }
    lists = [(one.list_file, one.list_bytes) for one in places if one.list_file]
    added = [*lists, *([(new_file, new_bytes)] if new_file else [])]
    if added:
        connection.execute(
            insert(files),
            [{"file": file, "tier": tier, "num_bytes": num_bytes} for file, num_bytes in added],
        )
    replaced = Replaced([], [], [])
    for one in places:
        before = states.get(one.replica_id)
        if before is None:
            continue
        was_live = before.state == "live"
        _change_state(connection, one.replica_id)
        has_other = live_replica(connection, one.blob, [tier], node=node) is not None
        if not has_other:
            is_good = was_live or one.is_good
            add_pieces(
                connection,
                one.blob,
                tier,
                one.list_file,
                one.pieces,
                node=node,
                encoding=one.encoding,
                reason="" if is_good else before.reason or "not mended yet",
            )
            replaced.moved.append(one.blob)
        replaced.gone.extend(remove_replica(connection, one.replica_id))
        if not has_other and not was_live and one.is_good:
            replaced.repaired.append(one.blob)
        record(
            connection,
            f"blob {one.blob}",
            "repaired" if one.blob in replaced.repaired else "moved",
            f"{tier}: {why}",
        )
    replaced.gone.extend(_drop_unnamed(connection, tier, [file for file, _ in added]))
    return replaced


def _change_state(connection: Connection, replica: str) -> None:
    """A tier has one copy in service: the old one steps back before the new one is there."""
    connection.execute(
        update(replicas).where(replicas.c.replica == replica).values(state="quarantined")
    )


def _drop_unnamed(connection: Connection, tier: str, names: Sequence[str]) -> list[FileRef]:
    """Forget those of the new files that no replica came to need."""
    unnamed = [
        name
        for name in names
        if connection.scalar(select(extents.c.file).where(extents.c.file == name).limit(1)) is None
    ]
    connection.execute(delete(files).where(files.c.file.in_(unnamed)))
    return [FileRef(tier, name) for name in unnamed]
