"""Manifests: what makes one version of something, stored with the blobs that it keeps."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, delete, insert, select

from forebay_server.catalog.queries_jobs import DELETE, job_of
from forebay_server.catalog.queries_settings import next_moment
from forebay_server.catalog.queries_stamps import stamp_of
from forebay_server.catalog.queries_trash import forget_trashed
from forebay_server.catalog.tables import manifest_blobs, manifest_remote, manifests
from forebay_wire.errors import Conflict
from forebay_wire.manifest import Stamp, put_stamp


def commit_manifest(
    connection: Connection,
    manifest: str,
    kind: int,
    data: bytes,
    blobs: Iterable[str],
    sibling: str | None,
) -> None:
    """Stamp a new manifest, then :func:`insert_manifest`.

    *sibling* is any other manifest of the same dataset or run; None: this is what it begins with.
    """
    moment = next_moment(connection)
    begun_ns = moment if sibling is None else stamp_of(connection, sibling).begun_ns
    insert_manifest(connection, manifest, kind, put_stamp(data, Stamp(begun_ns, moment)), blobs)


def insert_manifest(
    connection: Connection, manifest: str, kind: int, data: bytes, blobs: Iterable[str]
) -> None:
    """Store a stamped manifest with what it names: from here on these blobs are kept.

    One that lies in the trash is taken out of it: what it made is there again.
    :class:`Conflict` if the very same manifest is still being deleted.
    """
    if forget_trashed(connection, manifest):
        connection.execute(delete(manifest_blobs).where(manifest_blobs.c.manifest == manifest))
        connection.execute(delete(manifest_remote).where(manifest_remote.c.manifest == manifest))
        connection.execute(delete(manifests).where(manifests.c.manifest == manifest))
    if read_manifest(connection, manifest) is not None:
        job = job_of(connection, DELETE, manifest)
        raise Conflict(
            f"manifest {manifest} exists already"
            + (", and is being deleted: try again in a moment" if job else "")
        )
    connection.execute(insert(manifests).values(manifest=manifest, kind=kind, data=data))
    named = [{"manifest": manifest, "blob": blob} for blob in dict.fromkeys(blobs)]
    if named:
        connection.execute(insert(manifest_blobs), named)


def read_manifest(connection: Connection, manifest: str) -> bytes | None:
    """A manifest's bytes, None if it is not known."""
    data: bytes | None = connection.scalar(
        select(manifests.c.data).where(manifests.c.manifest == manifest)
    )
    return data
