"""Policies, pins, a trash, a history, origins; when a replica was checked; jobs with a turn and a
journal."""

from __future__ import annotations

from sqlalchemy import Connection, text

_SQLITE_SEQ = "INTEGER NOT NULL PRIMARY KEY"
_POSTGRESQL_SEQ = "BIGSERIAL NOT NULL PRIMARY KEY"
_STEPS = (
    "ALTER TABLE replicas ADD COLUMN verified {double} DEFAULT 0 NOT NULL",
    "ALTER TABLE jobs ADD COLUMN priority INTEGER DEFAULT 0 NOT NULL",
    "ALTER TABLE jobs ADD COLUMN journal TEXT DEFAULT '' NOT NULL",
    "CREATE TABLE assigned_policies (owner VARCHAR(160) NOT NULL PRIMARY KEY,"
    " policy VARCHAR(64) NOT NULL, created {double} NOT NULL)",
    "CREATE TABLE pins (pin VARCHAR(32) NOT NULL PRIMARY KEY, target VARCHAR(512) NOT NULL,"
    " tier VARCHAR(128) NOT NULL, expires {double}, created {double} NOT NULL)",
    "CREATE INDEX pins_by_target ON pins (target)",
    "CREATE TABLE pin_blobs (pin VARCHAR(32) NOT NULL REFERENCES pins (pin) ON DELETE CASCADE,"
    " blob VARCHAR(64) NOT NULL, PRIMARY KEY (pin, blob))",
    "CREATE INDEX pin_blobs_by_blob ON pin_blobs (blob)",
    "CREATE TABLE trash (manifest VARCHAR(64) NOT NULL PRIMARY KEY"
    " REFERENCES manifests (manifest) ON DELETE CASCADE, target VARCHAR(512) NOT NULL,"
    " record TEXT NOT NULL, expires {double} NOT NULL, created {double} NOT NULL)",
    "CREATE INDEX trash_by_expiry ON trash (expires)",
    "CREATE TABLE history (seq {seq}, at {double} NOT NULL, subject VARCHAR(512) NOT NULL,"
    " event VARCHAR(32) NOT NULL, detail TEXT NOT NULL)",
    "CREATE INDEX history_by_subject ON history (subject, seq)",
    "CREATE TABLE origins (origin VARCHAR(64) NOT NULL PRIMARY KEY, url TEXT NOT NULL,"
    " num_bytes BIGINT NOT NULL, validator TEXT NOT NULL, segments {binary},"
    " created {double} NOT NULL)",
    "CREATE INDEX origins_by_url ON origins (url)",
)


def apply(connection: Connection) -> None:
    """From schema 1 to schema 2."""
    is_sqlite = connection.dialect.name == "sqlite"
    types = {
        "seq": _SQLITE_SEQ if is_sqlite else _POSTGRESQL_SEQ,
        "double": "DOUBLE PRECISION",
        "binary": "BLOB" if is_sqlite else "BYTEA",
    }
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
