"""How much of a pack was referenced, and not written, when it landed."""

from __future__ import annotations

from sqlalchemy import Connection, text


def apply(connection: Connection) -> None:
    """From schema 7 to schema 8."""
    connection.execute(
        text("ALTER TABLE packs ADD COLUMN shared_bytes BIGINT DEFAULT '0' NOT NULL")
    )
