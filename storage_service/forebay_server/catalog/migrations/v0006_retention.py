"""What is kept of a run: its policy, tags, pins and notes, when a generation became what it is, and
which run an attempt forked."""

from __future__ import annotations

from sqlalchemy import Connection, text

_STEPS = (
    "ALTER TABLE runs ADD COLUMN keep TEXT DEFAULT '' NOT NULL",
    "ALTER TABLE attempts ADD COLUMN parent_run {text128} DEFAULT '' NOT NULL",
    "CREATE INDEX attempts_by_parent ON attempts (parent_run)",
    "ALTER TABLE generations ADD COLUMN note TEXT DEFAULT '' NOT NULL",
    "ALTER TABLE generations ADD COLUMN wanted_tags TEXT DEFAULT '' NOT NULL",
    "ALTER TABLE generations ADD COLUMN pinned TEXT",
    "ALTER TABLE generations ADD COLUMN pin_expires {double}",
    "ALTER TABLE generations ADD COLUMN sealed {double}",
    "ALTER TABLE generations ADD COLUMN committed {double}",
    "CREATE TABLE tags (run {text128} NOT NULL, tag {text128} NOT NULL,"
    " attempt INTEGER NOT NULL, step BIGINT NOT NULL, created {double} NOT NULL,"
    " PRIMARY KEY (run, tag), FOREIGN KEY(run, attempt, step)"
    " REFERENCES generations (run, attempt, step) ON DELETE CASCADE)",
    "CREATE INDEX tags_by_generation ON tags (run, attempt, step)",
)


def apply(connection: Connection) -> None:
    """From schema 5 to schema 6."""
    is_sqlite = connection.dialect.name == "sqlite"
    collation = "" if is_sqlite else ' COLLATE "C"'
    types = {
        "double": "DOUBLE" if is_sqlite else "DOUBLE PRECISION",
        "text128": f"VARCHAR(128){collation}",
    }
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
