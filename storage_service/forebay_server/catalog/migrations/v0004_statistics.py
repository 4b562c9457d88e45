"""What columns of versions and selections hold, computed once and kept."""

from __future__ import annotations

from sqlalchemy import Connection, text

_STEPS = (
    "CREATE TABLE statistics (manifest {text64} NOT NULL, dataset {text128} NOT NULL,"
    " version INTEGER NOT NULL, selection {text64} NOT NULL, created {double} NOT NULL,"
    " PRIMARY KEY (manifest), FOREIGN KEY(dataset, version) REFERENCES versions (dataset, version),"
    " FOREIGN KEY(manifest) REFERENCES manifests (manifest))",
    "CREATE INDEX statistics_by_version ON statistics (dataset, version, selection)",
)


def apply(connection: Connection) -> None:
    """From schema 3 to schema 4."""
    is_sqlite = connection.dialect.name == "sqlite"
    collation = "" if is_sqlite else ' COLLATE "C"'
    types = {
        "double": "DOUBLE" if is_sqlite else "DOUBLE PRECISION",
        "text64": f"VARCHAR(64){collation}",
        "text128": f"VARCHAR(128){collation}",
    }
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
