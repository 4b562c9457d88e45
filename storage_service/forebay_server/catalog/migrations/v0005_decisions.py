"""Which version each epoch of a following reader reads."""

from __future__ import annotations

from sqlalchemy import Connection, text

_STEPS = (
    "CREATE TABLE decisions (reader {text256} NOT NULL, dataset {text128} NOT NULL,"
    " selection {text128} NOT NULL, epoch BIGINT NOT NULL, manifest {text64} NOT NULL,"
    " selection_manifest {text64} NOT NULL, expires {double} NOT NULL, created {double} NOT NULL,"
    " PRIMARY KEY (reader, dataset, selection, epoch))",
    "CREATE INDEX decisions_by_expiry ON decisions (expires)",
)


def apply(connection: Connection) -> None:
    """From schema 4 to schema 5."""
    is_sqlite = connection.dialect.name == "sqlite"
    collation = "" if is_sqlite else ' COLLATE "C"'
    types = {
        "double": "DOUBLE" if is_sqlite else "DOUBLE PRECISION",
        **{f"text{size}": f"VARCHAR({size}){collation}" for size in (64, 128, 256)},
    }
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
