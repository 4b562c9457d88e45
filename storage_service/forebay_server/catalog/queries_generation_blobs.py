"""Which blobs checkpoints are made of."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select

from forebay_server.catalog.queries_blobs import batches
from forebay_server.catalog.tables import generations, manifest_blobs


def blobs_of_generations(connection: Connection, ids: Sequence[str]) -> set[str]:
    """Those of *ids* that some generation names."""
    joined = manifest_blobs.join(generations, generations.c.manifest == manifest_blobs.c.manifest)
    found: set[str] = set()
    for part in batches(ids):
        statement = select(manifest_blobs.c.blob).select_from(joined)
        found.update(connection.scalars(statement.where(manifest_blobs.c.blob.in_(part))))
    return found
