"""Which version each epoch of a following reader reads."""

from __future__ import annotations

from sqlalchemy import Connection, text

_STEPS = (
    "CREATE TABLE decisions (reader {text256} NOT NULL, epoch BIGINT NOT NULL,"
    " choices TEXT NOT NULL, expires {double} NOT NULL, created {double} NOT NULL,"
    " PRIMARY KEY (reader, epoch))",
    "CREATE INDEX decisions_by_expiry ON decisions (expires)",
)


def apply(connection: Connection) -> None:
    """From schema 4 to schema 5."""
    is_sqlite = connection.dialect.name == "sqlite"
    collation = "" if is_sqlite else ' COLLATE "C"'
    types = {
        "double": "DOUBLE" if is_sqlite else "DOUBLE PRECISION",
        "text256": f"VARCHAR(256){collation}",
    }
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
