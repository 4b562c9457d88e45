"""Parts of a version that many processes write: sealed, counted once each, kept for a while.

A part holds the upload sessions of its shards under a lease of its own, which outlives both the
process that sealed it and the daemon. The header of a write (the part without a name) says for
which dataset and schema it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, delete, insert, select, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_blobs import batches
from forebay_server.catalog.queries_uploads import hold_landed
from forebay_server.catalog.tables import parts, uploads
from forebay_wire.errors import SchemaMismatch

HEADER: Final = ""
"""The part's name under which what all parts share is kept."""


@dataclass(frozen=True)
class SealedShard:
    """One sealed shard of a part, and the session that holds it."""

    session: str
    blob: str
    num_bytes: int
    num_rows: int
    batch_rows: tuple[int, ...]
    format: str = ""


@dataclass(frozen=True)
class SealedPart:
    """A part that counts."""

    part: str
    shards: tuple[SealedShard, ...]


@dataclass(frozen=True)
class Write:
    """What parts have in common."""

    uid: int
    write: str
    dataset: str
    schema: str
    """Base64."""

    def header(self) -> str:
        return json.dumps({"dataset": self.dataset, "schema": self.schema})


def add_part(connection: Connection, of: Write, part: SealedPart, lease_seconds: float) -> bool:
    """Count *part*, unless one of that name counts already (False: the sessions stay as they are).

    Extends what the write has sealed before. :class:`NotFound` for a session that has ended,
    :class:`SchemaMismatch` for a part of another dataset or schema than those before.
    """
    forget_expired(connection)
    header = _detail(connection, of, HEADER)
    if header is None:
        _insert(connection, of, HEADER, of.header(), lease_seconds)
    elif header != of.header():
        _refuse(of, json.loads(header))
    extend(connection, of.uid, of.write, lease_seconds)
    known = _detail(connection, of, part.part)
    if known is not None:
        return _shards(known) == part.shards  # a repeat of the call that counted it
    held = {shard.session: shard.blob for shard in part.shards}
    hold_landed(connection, of.uid, held, owner=_owner(of.write), lease_seconds=lease_seconds)
    _insert(
        connection, of, part.part, json.dumps([vars(one) for one in part.shards]), lease_seconds
    )
    return True


def find_parts(
    connection: Connection, uid: int, write: str, after: str, limit: int
) -> tuple[Mapping[str, str], list[SealedPart]]:
    """What the parts share, and a page of them by name; both empty if none is left."""
    live = (parts.c.uid == uid, parts.c.write == write, parts.c.expires >= now())
    header = connection.scalar(select(parts.c.detail).where(*live, parts.c.part == HEADER))
    rows = connection.execute(
        select(parts.c.part, parts.c.detail)
        .where(*live, parts.c.part > after, parts.c.part != HEADER)
        .order_by(parts.c.part)
        .limit(limit)
    )
    found = [SealedPart(row.part, _shards(row.detail)) for row in rows]
    return json.loads(header) if header is not None else {}, found


def extend(connection: Connection, uid: int, write: str, lease_seconds: float) -> None:
    """All that the write has sealed lives on for *lease_seconds*; not written each time, as parts
    are many."""
    soon = now() + lease_seconds * 0.75
    of = (parts.c.uid == uid, parts.c.write == write)
    stale = connection.execute(
        update(parts).where(*of, parts.c.expires < soon).values(expires=now() + lease_seconds)
    )
    if stale.rowcount:
        connection.execute(
            update(uploads)
            .where(uploads.c.uid == uid, uploads.c.owner == _owner(write), uploads.c.expires < soon)
            .values(expires=now() + lease_seconds)
        )


def forget_parts(connection: Connection, uid: int, write: str) -> None:
    """A commit has taken the parts that it wanted: the rest ends."""
    connection.execute(delete(parts).where(parts.c.uid == uid, parts.c.write == write))
    connection.execute(
        update(uploads)
        .where(uploads.c.uid == uid, uploads.c.owner == _owner(write))
        .values(expires=now() - 1)
    )


def drop_parts(connection: Connection, uid: int, write: str, names: Sequence[str]) -> int:
    """Parts that do not count any more; how many did."""
    sessions: list[str] = []
    dropped = 0
    for some in batches(list(names)):
        chosen = (parts.c.uid == uid, parts.c.write == write, parts.c.part.in_(some))
        for row in connection.execute(select(parts.c.detail).where(*chosen)):
            sessions.extend(shard.session for shard in _shards(row.detail))
            dropped += 1
        connection.execute(delete(parts).where(*chosen))
    for some in batches(sessions):
        connection.execute(
            update(uploads).where(uploads.c.session.in_(some)).values(expires=now() - 1)
        )
    return dropped


def forget_expired(connection: Connection) -> None:
    """Parts whose lease ran out: their sessions have the same and end by it."""
    connection.execute(delete(parts).where(parts.c.expires < now()))


def _detail(connection: Connection, of: Write, part: str) -> str | None:
    detail: str | None = connection.scalar(
        select(parts.c.detail).where(
            parts.c.uid == of.uid, parts.c.write == of.write, parts.c.part == part
        )
    )
    return detail


def _insert(
    connection: Connection, of: Write, part: str, detail: str, lease_seconds: float
) -> None:
    connection.execute(
        insert(parts).values(
            uid=of.uid, write=of.write, part=part, detail=detail, expires=now() + lease_seconds
        )
    )


def _shards(detail: str) -> tuple[SealedShard, ...]:
    return tuple(
        SealedShard(**{**one, "batch_rows": tuple(one["batch_rows"])}) for one in json.loads(detail)
    )


def _owner(write: str) -> str:
    return f"parts of write {write}"


def _refuse(of: Write, header: Mapping[str, str]) -> None:
    if header["dataset"] != of.dataset:
        raise SchemaMismatch(
            f"write {of.write} is one of dataset {header['dataset']}, not of {of.dataset}: begin "
            "another one"
        )
    raise SchemaMismatch(
        f"a part of write {of.write} of dataset {of.dataset} has another schema than the parts "
        "before it: give all writers the same one (write_session(schema=...))"
    )
