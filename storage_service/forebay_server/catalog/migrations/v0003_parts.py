"""Parts of versions that many processes write, and the uploads that they hold."""

from __future__ import annotations

from sqlalchemy import Connection, text

_STEPS = (
    "ALTER TABLE uploads ADD COLUMN is_held INTEGER DEFAULT '0' NOT NULL",
    "CREATE TABLE parts (uid BIGINT NOT NULL, write {text128} NOT NULL, part {text128} NOT NULL,"
    " detail TEXT NOT NULL, expires {double} NOT NULL, created {double} NOT NULL,"
    " PRIMARY KEY (uid, write, part))",
    "CREATE INDEX parts_by_expiry ON parts (expires)",
)


def apply(connection: Connection) -> None:
    """From schema 2 to schema 3."""
    is_sqlite = connection.dialect.name == "sqlite"
    types = {
        "double": "DOUBLE" if is_sqlite else "DOUBLE PRECISION",
        "text128": "VARCHAR(128)" if is_sqlite else 'VARCHAR(128) COLLATE "C"',
    }
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
