"""Which steps an attempt has used: it never saves one of them again, deleted or not."""

from __future__ import annotations

from sqlalchemy import Connection, text


def apply(connection: Connection) -> None:
    """From schema 8 to schema 9."""
    connection.execute(
        text("ALTER TABLE attempts ADD COLUMN newest_step BIGINT DEFAULT '-1' NOT NULL")
    )
    connection.execute(
        text(
            "UPDATE attempts SET newest_step = COALESCE((SELECT MAX(generations.step) FROM "
            "generations WHERE generations.run = attempts.run AND generations.attempt = "
            "attempts.attempt AND generations.state = 'committed'), -1)"
        )
    )
