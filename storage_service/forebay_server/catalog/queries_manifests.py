"""Manifests: what makes one version of something, stored with the blobs that it keeps."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, LargeBinary, func, insert, select

from forebay_server.catalog.queries_jobs import DELETE, job_of
from forebay_server.catalog.queries_settings import next_moment
from forebay_server.catalog.tables import manifest_blobs, manifests
from forebay_wire.errors import Conflict
from forebay_wire.manifest import FRAME_BYTES, Stamp, put_stamp, read_stamp


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
    begun_ns = moment if sibling is None else _stamp_of(connection, sibling).begun_ns
    insert_manifest(connection, manifest, kind, put_stamp(data, Stamp(begun_ns, moment)), blobs)


def insert_manifest(
    connection: Connection, manifest: str, kind: int, data: bytes, blobs: Iterable[str]
) -> None:
    """Store a stamped manifest with what it names: from here on these blobs are kept.

    :class:`Conflict` if the very same manifest is still being deleted.
    """
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


def _stamp_of(connection: Connection, manifest: str) -> Stamp:
    head = select(func.substr(manifests.c.data, 1, FRAME_BYTES, type_=LargeBinary))
    return read_stamp(connection.scalars(head.where(manifests.c.manifest == manifest)).one())


def read_manifest(connection: Connection, manifest: str) -> bytes | None:
    """A manifest's bytes, None if it is not known."""
    data: bytes | None = connection.scalar(
        select(manifests.c.data).where(manifests.c.manifest == manifest)
    )
    return data
