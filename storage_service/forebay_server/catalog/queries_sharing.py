"""Replicas that share pieces of files: what a run has already, and rows of what refers to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, distinct, exists, func, insert, select, update

from forebay_server.catalog.queries_blobs import batches, insert_blob
from forebay_server.catalog.queries_lineage import Ancestor, ancestors
from forebay_server.catalog.queries_runs import at
from forebay_server.catalog.tables import extents, files, manifest_remote, packs, replicas
from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectExtent
from forebay_server.model.sharing import MAX_SHARERS, Named, unsafe
from forebay_wire.errors import Conflict
from forebay_wire.ids import GenerationId, new_random_name

SLACK_BYTES = 16 << 20

RECENT = 3
"""Generations whose segments are looked at: each refers to older ones for all that it shares."""

LOOKED_AT = 32
"""Generations among which those are looked for: some may have landed in another tier."""


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
    rank: int


@dataclass(frozen=True)
class PackOfRun:
    """What a blob is to a run."""

    run: str
    rank: int


def shareable(connection: Connection, run: str, tier: str, node: str) -> list[SourceReplica]:
    """The replicas in *tier* of the packs of the last generations that *run* stands on, its own or
    those of the run that it was forked from, and that have any there; newest first."""
    found: list[SourceReplica] = []
    num_generations = 0
    for one in ancestors(connection, run, LOOKED_AT):
        rows = _replicas(connection, one, tier, node)
        num_generations += bool(rows)
        found += [
            SourceReplica(
                row.replica, row.blob, row.file, row.encoding, bool(row.is_remote), row.rank
            )
            for row in rows
        ]
        if num_generations == RECENT:
            break
    return found


def _replicas(connection: Connection, one: Ancestor, tier: str, node: str) -> Sequence[Any]:
    remote = exists().where(manifest_remote.c.manifest == one.manifest)
    return connection.execute(
        select(
            replicas.c.replica,
            replicas.c.blob,
            extents.c.file,
            replicas.c.encoding,
            remote.label("is_remote"),
            packs.c.rank,
        )
        .join(packs, packs.c.blob == replicas.c.blob)
        .join(extents, and_(extents.c.replica == replicas.c.replica, extents.c.seq == 0))
        .where(
            at(GenerationId(one.run, one.attempt, one.step), packs),
            replicas.c.tier == tier,
            replicas.c.node == node,
            replicas.c.state == "live",
        )
        .order_by(packs.c.rank)
    ).all()


def likely_new_bytes(connection: Connection, run: str, rank: int) -> int:
    """Half as much again as *rank* wrote of the pack of *run* that landed last; 0 if that shared
    nothing."""
    row = connection.execute(
        select(packs.c.num_bytes, packs.c.shared_bytes)
        .where(packs.c.run == run, packs.c.rank == rank, packs.c.state == "landed")
        .order_by(packs.c.attempt.desc(), packs.c.step.desc())
        .limit(1)
    ).one_or_none()
    if row is None or not row.shared_bytes:
        return 0
    return int(row.num_bytes - row.shared_bytes) * 3 // 2 + SLACK_BYTES


def find_pack(connection: Connection, blob: str) -> PackOfRun | None:
    """A run that has *blob* as a pack, None without one."""
    found = select(packs.c.run, packs.c.rank).where(packs.c.blob == blob)
    row = connection.execute(found.order_by(packs.c.created).limit(1)).one_or_none()
    return None if row is None else PackOfRun(row.run, row.rank)


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
    _verify_soon(connection, [one.file for one in foreign])
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


def _verify_soon(connection: Connection, names: Sequence[str]) -> None:
    """Have a scrub look first at those of the files *names* that many refer to: at one replica of
    each."""
    many = [
        name
        for name, number in num_sharers(connection, sorted(set(names))).items()
        if number >= MAX_SHARERS
    ]
    for part in batches(many):
        chosen = (
            select(func.min(extents.c.replica))
            .where(extents.c.file.in_(part))
            .group_by(extents.c.file)
        )
        connection.execute(
            update(replicas).where(replicas.c.replica.in_(chosen)).values(verified=0.0)
        )


def add_pieces(
    connection: Connection,
    blob: str,
    tier: str,
    list_file: str,
    pieces: Sequence[ObjectExtent],
    *,
    node: str = "",
    encoding: str = PIECES,
    reason: str = "",
) -> str:
    """The rows of a replica in pieces, whose files are known; out of service if there is a
    *reason*. The list comes first, as an extent without bytes."""
    replica = new_random_name()
    state = "quarantined" if reason else "live"
    connection.execute(
        insert(replicas).values(
            replica=replica,
            blob=blob,
            tier=tier,
            node=node,
            encoding=encoding,
            state=state,
            reason=reason,
        )
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
