"""When a manifest was committed, and when the dataset or run that it belongs to began."""

from __future__ import annotations

from sqlalchemy import Connection, LargeBinary, func, select

from forebay_server.catalog.tables import manifests
from forebay_wire.manifest import FRAME_BYTES, Stamp, read_stamp


def stamp_of(connection: Connection, manifest: str) -> Stamp:
    """The stamp of a manifest that is known."""
    head = select(func.substr(manifests.c.data, 1, FRAME_BYTES, type_=LargeBinary))
    return read_stamp(connection.scalars(head.where(manifests.c.manifest == manifest)).one())
