"""Upload sessions: leases on what is being written and on what has landed uncommitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, delete, insert, select, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_blobs import (
    FileRef,
    batches,
    insert_replica,
    live_replica,
    local_orphan_blobs,
    orphan_blobs,
    remove_orphan,
)
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import enqueue_collection
from forebay_server.catalog.queries_sharing import SharingReplica, insert_sharing
from forebay_server.catalog.tables import uploads
from forebay_server.model.extents import ObjectExtent
from forebay_wire.errors import NotFound, PermissionDenied

RENEWED_FRACTION: Final = 0.25
"""Of a lease: what was extended within that time is not extended again by its siblings. Clients
renew three times in a lease, so each of their rounds does extend."""


@dataclass(frozen=True)
class Ended:
    """What the end of a session leaves to do outside of the transaction."""

    blob: str | None
    """What it had landed."""
    files: tuple[FileRef, ...]
    """No row names them any more: the caller deletes them."""


def insert_upload(
    connection: Connection,
    session: str,
    *,
    owner: str,
    uid: int,
    tier: str,
    file: str,
    lease_seconds: float,
) -> None:
    """Open a session that will publish *file* in *tier*."""
    connection.execute(
        insert(uploads).values(
            session=session,
            owner=owner,
            uid=uid,
            tier=tier,
            file=file,
            expires=now() + lease_seconds,
        )
    )


def renew_uploads(
    connection: Connection, session: str, *, owner: str, uid: int, lease_seconds: float
) -> bool:
    """Extend the lease of *session* and of all that its owner landed; False if it ended.

    A writer has thousands of landed shards and several open ones, each of which is renewed: what
    was extended within the last quarter of a lease is left as it is.
    """
    extended = update(uploads).values(expires=now() + lease_seconds)
    its_own = uploads.c.session == session
    known = connection.scalar(select(uploads.c.session).where(its_own)) is not None
    # What a part holds lives longer than this already.
    connection.execute(extended.where(its_own, uploads.c.expires < now() + lease_seconds))
    connection.execute(
        extended.where(
            uploads.c.uid == uid,
            uploads.c.owner == owner,
            uploads.c.state == "landed",
            uploads.c.expires < now() + lease_seconds * (1 - RENEWED_FRACTION),
        )
    )
    return known


def mark_sealed(connection: Connection, session: str) -> None:
    """From here on the session lives until its blob has landed, whatever its caller does."""
    changed = connection.execute(
        update(uploads)
        .where(uploads.c.session == session, uploads.c.state == "open")
        .values(state="sealed")
    )
    if not changed.rowcount:
        raise NotFound(f"upload session {session} has ended: write the bytes again")


def move_upload(connection: Connection, session: str, tier: str, file: str) -> None:
    """The session will publish *file* of *tier*, as where it was going to failed."""
    connection.execute(
        update(uploads).where(uploads.c.session == session).values(tier=tier, file=file)
    )


def record_landed(
    connection: Connection,
    session: str,
    blob: str,
    num_bytes: int,
    num_segments: int,
    file_bytes: int,
    *,
    trusted_tiers: Sequence[str],
    node: str,
    list_file: str = "",
    list_bytes: int = 0,
    pieces: tuple[ObjectExtent, ...] = (),
) -> list[FileRef]:
    """Record the session's published file as a replica of *blob*, held by the session; with
    *list_file* one in *pieces*, of which the file has those that are new.

    If one of *trusted_tiers* has a live replica already, which the caller has just verified, that
    one serves and the new files are returned: no row names them, the caller deletes them after the
    transaction. Raises :class:`NotFound` if the session has ended, :class:`StaleReference` if what
    the pieces share with others is not safe.
    """
    row = connection.execute(
        select(uploads.c.tier, uploads.c.file).where(uploads.c.session == session)
    ).one_or_none()
    if row is None:
        raise NotFound(f"upload session {session} has ended: write the bytes again")
    spare: list[FileRef] = []
    if live_replica(connection, blob, trusted_tiers, node=node) is not None:
        names = [row.file] if file_bytes else []
        spare = [FileRef(row.tier, name) for name in (*names, list_file) if name]
    elif list_file:
        new = SharingReplica(
            blob,
            num_bytes,
            num_segments,
            row.tier,
            row.file,
            file_bytes,
            list_file,
            list_bytes,
            pieces,
        )
        insert_sharing(connection, new, node=node)
    else:
        insert_replica(
            connection, blob, num_bytes, num_segments, row.tier, row.file, file_bytes, node=node
        )
    connection.execute(
        update(uploads).where(uploads.c.session == session).values(state="landed", blob=blob)
    )
    return spare


def claim_landed(connection: Connection, uid: int, held: Mapping[str, str]) -> None:
    """End sessions whose blobs a manifest names in this transaction; *held* is session to blob.

    Raises :class:`NotFound` if a session is unknown, ended or holds another blob,
    :class:`PermissionDenied` if it is another user's.
    """
    for part in batches(list(held)):
        columns = (uploads.c.session, uploads.c.uid, uploads.c.blob, uploads.c.state)
        live = select(*columns).where(uploads.c.session.in_(part), uploads.c.expires >= now())
        rows = {row.session: row for row in connection.execute(live)}
        for session in part:
            _check_claim(rows.get(session), session, uid, held[session])
        connection.execute(delete(uploads).where(uploads.c.session.in_(part)))


def hold_landed(
    connection: Connection,
    uid: int,
    held: Mapping[str, str],
    *,
    owner: str,
    lease_seconds: float,
) -> None:
    """Make sessions with landed blobs *owner*'s, for *lease_seconds*; *held* is session to blob.

    Raises as :func:`claim_landed`. They outlive this daemon, unlike others.
    """
    for part in batches(list(held)):
        columns = (uploads.c.session, uploads.c.uid, uploads.c.blob, uploads.c.state)
        live = select(*columns).where(uploads.c.session.in_(part), uploads.c.expires >= now())
        rows = {row.session: row for row in connection.execute(live)}
        for session in part:
            _check_claim(rows.get(session), session, uid, held[session])
        connection.execute(
            update(uploads)
            .where(uploads.c.session.in_(part))
            .values(owner=owner, expires=now() + lease_seconds, is_held=1)
        )


def _check_claim(row: Any, session: str, uid: int, blob: str) -> None:
    if row is None:
        raise NotFound(
            f"upload session {session} has ended (its lease ran out, or the daemon restarted): "
            "its bytes are gone; write the shard again"
        )
    if row.uid != uid:
        raise PermissionDenied(f"upload session {session} belongs to another user")
    if row.state != "landed" or row.blob != blob:
        raise NotFound(
            f"upload session {session} has not sealed blob {blob}: seal it first, and commit the "
            "id that the seal answered"
        )


def end_claimed(connection: Connection, session: str) -> None:
    """End a session whose blob something else names by now."""
    connection.execute(delete(uploads).where(uploads.c.session == session))


def end_upload(connection: Connection, session: str, local_tiers: Sequence[str]) -> Ended:
    """End a session and forget what it landed, unless something else names it.

    A blob that lies in other tiers than *local_tiers* too is left to the collector, which removes
    things there in a safe order.
    """
    blob = connection.scalar(select(uploads.c.blob).where(uploads.c.session == session))
    connection.execute(delete(uploads).where(uploads.c.session == session))
    if blob is None:
        return Ended(None, ())
    if local_orphan_blobs(connection, local_tiers, 1, [blob]):
        gone = tuple(remove_orphan(connection, blob))
        for ref in gone:
            record(connection, f"blob {blob}", "deleted", f"{ref.tier}: its upload was given up")
        return Ended(blob, gone)
    if orphan_blobs(connection, 1, [blob]):
        enqueue_collection(connection)
    return Ended(blob, ())


def end_expired(connection: Connection, session: str, local_tiers: Sequence[str]) -> Ended | None:
    """:func:`end_upload`, unless somebody renewed the session meanwhile (None)."""
    expired = select(uploads.c.session).where(
        uploads.c.session == session, uploads.c.expires < now(), uploads.c.state != "sealed"
    )
    if connection.scalar(expired) is None:
        return None
    return end_upload(connection, session, local_tiers)


def expired_uploads(connection: Connection, limit: int) -> list[str]:
    """Sessions whose lease ran out; not those that are sealed and still landing."""
    return list(
        connection.scalars(
            select(uploads.c.session)
            .where(uploads.c.expires < now(), uploads.c.state != "sealed")
            .order_by(uploads.c.expires)
            .limit(limit)
        )
    )


def end_all_uploads(connection: Connection) -> int:
    """At the daemon's start: no session of an earlier incarnation lives, except those that hold
    what landed for a part. How many there were."""
    return connection.execute(delete(uploads).where(uploads.c.is_held == 0)).rowcount


def live_sessions(connection: Connection, sessions: Sequence[str]) -> set[str]:
    """Those of *sessions* that have not ended."""
    found: set[str] = set()
    for part in batches(sessions):
        found.update(
            connection.scalars(select(uploads.c.session).where(uploads.c.session.in_(part)))
        )
    return found
