"""What is remembered of the tensors in checkpoints, and how long saving held the training up."""

from __future__ import annotations

from sqlalchemy import Connection, text

_STEPS = (
    "ALTER TABLE generations ADD COLUMN stall {double} DEFAULT '0' NOT NULL",
    "CREATE TABLE fingerprints (manifest {text64} NOT NULL, rank INTEGER NOT NULL,"
    " data {bytes} NOT NULL, created {double} NOT NULL, PRIMARY KEY (manifest, rank),"
    " FOREIGN KEY(manifest) REFERENCES manifests (manifest) ON DELETE CASCADE)",
)


def apply(connection: Connection) -> None:
    """From schema 6 to schema 7."""
    is_sqlite = connection.dialect.name == "sqlite"
    collation = "" if is_sqlite else ' COLLATE "C"'
    types = {
        "double": "DOUBLE" if is_sqlite else "DOUBLE PRECISION",
        "bytes": "BLOB" if is_sqlite else "BYTEA",
        "text64": f"VARCHAR(64){collation}",
    }
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
