"""Policies, pins, a trash, a history, origins; when a replica was checked; jobs with a turn and a
journal."""

from __future__ import annotations

from sqlalchemy import Connection, text

_SQLITE_SEQ = "INTEGER NOT NULL PRIMARY KEY"
_POSTGRESQL_SEQ = "BIGSERIAL NOT NULL PRIMARY KEY"
_LENGTHS = (32, 64, 128, 160, 512)
_STEPS = (
    "ALTER TABLE replicas ADD COLUMN verified {double} DEFAULT '0' NOT NULL",
    "ALTER TABLE blobs ADD COLUMN used {double} DEFAULT '0' NOT NULL",
    "ALTER TABLE jobs ADD COLUMN priority INTEGER DEFAULT '0' NOT NULL",
    "ALTER TABLE jobs ADD COLUMN journal TEXT DEFAULT '' NOT NULL",
    "CREATE TABLE assigned_policies (owner {text160} NOT NULL PRIMARY KEY,"
    " policy {text64} NOT NULL, created {double} NOT NULL)",
    "CREATE TABLE pins (pin {text32} NOT NULL PRIMARY KEY, target {text512} NOT NULL,"
    " tier {text128} NOT NULL, expires {double}, created {double} NOT NULL)",
    "CREATE INDEX pins_by_target ON pins (target)",
    "CREATE TABLE pin_blobs (pin {text32} NOT NULL,"
    " blob {text64} NOT NULL, PRIMARY KEY (pin, blob),"
    " FOREIGN KEY(pin) REFERENCES pins (pin) ON DELETE CASCADE)",
    "CREATE INDEX pin_blobs_by_blob ON pin_blobs (blob)",
    "CREATE TABLE trash (manifest {text64} NOT NULL PRIMARY KEY,"
    " deletion {text32} NOT NULL, target {text512} NOT NULL,"
    " record TEXT NOT NULL, expires {double} NOT NULL, created {double} NOT NULL,"
    " FOREIGN KEY(manifest) REFERENCES manifests (manifest) ON DELETE CASCADE)",
    "CREATE INDEX trash_by_expiry ON trash (expires)",
    "CREATE TABLE history (seq {seq}, at {double} NOT NULL, subject {text512} NOT NULL,"
    " event {text32} NOT NULL, detail TEXT NOT NULL)",
    "CREATE INDEX history_by_subject ON history (subject, seq)",
    "CREATE TABLE origins (origin {text64} NOT NULL PRIMARY KEY, url TEXT NOT NULL,"
    " num_bytes BIGINT NOT NULL, validator TEXT NOT NULL, blob {text64}, segments {binary},"
    " created {double} NOT NULL)",
    "CREATE INDEX origins_by_url ON origins (url)",
    "CREATE INDEX origins_by_blob ON origins (blob)",
    "CREATE TABLE manifest_origins (manifest {text64} NOT NULL, origin {text64} NOT NULL,"
    " PRIMARY KEY (manifest, origin),"
    " FOREIGN KEY(manifest) REFERENCES manifests (manifest) ON DELETE CASCADE,"
    " FOREIGN KEY(origin) REFERENCES origins (origin))",
    "CREATE INDEX manifest_origins_by_origin ON manifest_origins (origin)",
)


def apply(connection: Connection) -> None:
    """From schema 1 to schema 2."""
    is_sqlite = connection.dialect.name == "sqlite"
    types = {
        "seq": _SQLITE_SEQ if is_sqlite else _POSTGRESQL_SEQ,
        "double": "DOUBLE" if is_sqlite else "DOUBLE PRECISION",
        "binary": "BLOB" if is_sqlite else "BYTEA",
    }
    bytewise = "" if is_sqlite else ' COLLATE "C"'
    types |= {f"text{length}": f"VARCHAR({length}){bytewise}" for length in _LENGTHS}
    for step in _STEPS:
        connection.execute(text(step.format(**types)))
