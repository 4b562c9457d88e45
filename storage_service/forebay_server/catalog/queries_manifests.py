"""Manifests: what makes one version of something, stored with the blobs that it keeps."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, insert, select

from forebay_server.catalog.queries_jobs import DELETE, job_of
from forebay_server.catalog.tables import manifest_blobs, manifests
from forebay_wire.errors import Conflict


def insert_manifest(
    connection: Connection, manifest: str, kind: int, data: bytes, blobs: Iterable[str]
) -> None:
    """Store a manifest with what it names: from here on these blobs are kept.

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


def read_manifest(connection: Connection, manifest: str) -> bytes | None:
    """A manifest's bytes, None if it is not known."""
    data: bytes | None = connection.scalar(
        select(manifests.c.data).where(manifests.c.manifest == manifest)
    )
    return data
