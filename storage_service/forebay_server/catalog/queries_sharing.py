"""Replicas that share pieces of files: what a run has already, and rows of what refers to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, distinct, exists, func, insert, select

from forebay_server.catalog.queries_blobs import batches, insert_blob
from forebay_server.catalog.tables import (
    attempts,
    extents,
    files,
    generations,
    manifest_remote,
    packs,
    replicas,
)
from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectExtent
from forebay_server.model.sharing import Named, unsafe
from forebay_wire.errors import Conflict
from forebay_wire.ids import GenerationId, new_random_name

RECENT = 3
"""Generations whose segments are looked at: each refers to older ones for all that it shares."""


class StaleReference(Conflict):
    """A piece that a new replica refers to is not safe there any more: its bytes have to be
    written."""


@dataclass(frozen=True)
class SourceReplica:
    """A live replica of a pack that a new one may share segments with."""

    replica_id: str
    blob: str
    file: str
    encoding: str
    is_remote: bool


def shareable(
    connection: Connection, generation: GenerationId, tier: str, node: str
) -> list[SourceReplica]:
    """The replicas in *tier* of the packs that *generation*'s run committed last, and of the
    generation that its attempt stands on; those newest first."""
    mine = and_(attempts.c.run == generation.run, attempts.c.attempt == generation.attempt)
    row = connection.execute(select(attempts).where(mine)).one_or_none()
    columns = (generations.c.run, generations.c.attempt, generations.c.step, generations.c.manifest)
    committed = select(*columns).where(generations.c.state == "committed")
    own = committed.where(generations.c.run == generation.run)
    found = list(connection.execute(own.order_by(generations.c.created.desc()).limit(RECENT)))
    if row is not None and row.parent_attempt is not None:
        parent = own.where(
            generations.c.attempt == row.parent_attempt, generations.c.step == row.parent_step
        )
        found += [one for one in connection.execute(parent) if one not in found]
    return [
        SourceReplica(row.replica, row.blob, row.file, row.encoding, bool(row.is_remote))
        for one in found
        for row in _replicas(connection, one, tier, node)
    ]


def _replicas(connection: Connection, one: Any, tier: str, node: str) -> Sequence[Any]:
    remote = exists().where(manifest_remote.c.manifest == one.manifest)
    return connection.execute(
        select(
            replicas.c.replica,
            replicas.c.blob,
            extents.c.file,
            replicas.c.encoding,
            remote.label("is_remote"),
        )
        .join(packs, packs.c.blob == replicas.c.blob)
        .join(extents, and_(extents.c.replica == replicas.c.replica, extents.c.seq == 0))
        .where(
            packs.c.run == one.run,
            packs.c.attempt == one.attempt,
            packs.c.step == one.step,
            replicas.c.tier == tier,
            replicas.c.node == node,
            replicas.c.state == "live",
        )
        .order_by(packs.c.rank)
    ).all()


def generation_of(connection: Connection, blob: str) -> GenerationId | None:
    """A generation that has *blob* as a pack, None without one."""
    row = connection.execute(
        select(packs.c.run, packs.c.attempt, packs.c.step)
        .where(packs.c.blob == blob)
        .order_by(packs.c.created)
        .limit(1)
    ).one_or_none()
    return GenerationId(*row) if row is not None else None


def num_sharers(connection: Connection, names: Sequence[str]) -> dict[str, int]:
    """File to the number of replicas that name it."""
    found: dict[str, int] = {}
    for part in batches(names):
        rows = connection.execute(
            select(extents.c.file, func.count(distinct(extents.c.replica)))
            .where(extents.c.file.in_(part))
            .group_by(extents.c.file)
        )
        found.update((file, number) for file, number in rows)
    return found


def check_references(
    connection: Connection, tier: str, node: str, pieces: Sequence[ObjectExtent]
) -> None:
    """:class:`StaleReference` unless all *pieces*, of others' files, lie in *tier* of *node* in
    files that are there, named by replicas in service and by none that is not."""
    names = sorted({one.file for one in pieces})
    named: list[Named] = []
    there = 0
    for part in batches(names):
        is_there = and_(files.c.file.in_(part), files.c.tier == tier, files.c.state == "live")
        there += connection.scalar(select(func.count()).select_from(files).where(is_there)) or 0
        rows = connection.execute(
            select(extents, replicas.c.state)
            .join(replicas, replicas.c.replica == extents.c.replica)
            .where(extents.c.file.in_(part), replicas.c.node == node)
        )
        named += [
            Named(row.file, row.file_offset, row.file_offset + row.num_bytes, row.state == "live")
            for row in rows
        ]
    bad = unsafe(pieces, named)
    if bad or there != len(names):
        raise StaleReference(
            f"{len(bad) or 1} pieces that a pack shares with others are not safe in tier {tier} "
            "any more: it is written in full"
        )


@dataclass(frozen=True)
class SharingReplica:
    """A durable replica in pieces that no row names yet."""

    blob: str
    num_bytes: int
    num_segments: int
    tier: str
    file: str
    """Of what is new; not there if *file_bytes* is 0."""
    file_bytes: int
    list_file: str
    list_bytes: int
    pieces: tuple[ObjectExtent, ...]


def insert_sharing(connection: Connection, new: SharingReplica, *, node: str) -> str:
    """Record a replica in pieces; its id. :class:`StaleReference` as :func:`check_references`."""
    foreign = [one for one in new.pieces if one.file != new.file]
    check_references(connection, new.tier, node, foreign)
    insert_blob(connection, new.blob, new.num_bytes, new.num_segments)
    own = [(new.list_file, new.list_bytes), (new.file, new.file_bytes)]
    connection.execute(
        insert(files),
        [
            {"file": file, "tier": new.tier, "num_bytes": num_bytes}
            for file, num_bytes in own
            if num_bytes
        ],
    )
    return add_pieces(connection, new.blob, new.tier, new.list_file, new.pieces, node=node)


def add_pieces(
    connection: Connection,
    blob: str,
    tier: str,
    list_file: str,
    pieces: Sequence[ObjectExtent],
    *,
    node: str = "",
) -> str:
    """The rows of a replica in pieces, whose files are known. The list comes first, as an extent
    without bytes."""
    replica = new_random_name()
    connection.execute(
        insert(replicas).values(replica=replica, blob=blob, tier=tier, node=node, encoding=PIECES)
    )
    rows = [(0, list_file, 0, 0)] if list_file else []
    rows += [(one.blob_offset, one.file, one.file_offset, one.num_bytes) for one in pieces]
    connection.execute(
        insert(extents),
        [
            {
                "replica": replica,
                "seq": seq,
                "blob_offset": blob_offset,
                "file": file,
                "file_offset": file_offset,
                "num_bytes": num_bytes,
            }
            for seq, (blob_offset, file, file_offset, num_bytes) in enumerate(rows)
        ],
    )
    return replica
