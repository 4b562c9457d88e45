"""How the catalog's SQLite file is opened: pragmas, transactions, check after a crash, backup."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import QueuePool

from forebay_wire.errors import IntegrityError

BUSY_SECONDS: Final = 10.0
"""How long a statement waits for a foreign process (the sqlite3 shell) that holds a lock."""

WRITER_PRAGMAS: Final = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",  # NORMAL would lose acknowledged commits at a power cut
    "PRAGMA foreign_keys=ON",
    "PRAGMA journal_size_limit=67108864",  # a WAL that grew once does not stay large
)
READER_PRAGMAS: Final = (
    "PRAGMA query_only=ON",
    # Only the writer checkpoints: before 3.51.3 two checkpointing connections can reset the WAL
    # under each other and lose commits.
    "PRAGMA wal_autocheckpoint=0",
)


def create_file(path: Path) -> None:
    """Make the file, readable for its owner only; SQLite gives -wal and -shm the same mode."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def was_closed_cleanly(path: Path) -> bool:
    """Whether the last writer closed the file: only then SQLite removes the write-ahead log."""
    wal = path.with_name(path.name + "-wal")
    return not wal.exists() or wal.stat().st_size == 0


def writer_engine(path: Path) -> Engine:
    """An engine for the one connection that writes; transactions begin with BEGIN IMMEDIATE."""
    return _engine(path, "rwc", WRITER_PRAGMAS, "BEGIN IMMEDIATE", pool_size=1)


def reader_engine(path: Path, num_connections: int) -> Engine:
    """An engine for read-only connections; a transaction sees one snapshot."""
    return _engine(path, "ro", READER_PRAGMAS, "BEGIN", pool_size=num_connections)


def _engine(path: Path, mode: str, pragmas: tuple[str, ...], begin: str, pool_size: int) -> Engine:
    uri = f"file:{quote(str(path))}?mode={mode}"

    def connect() -> sqlite3.Connection:
        # Autocommit (isolation_level None): otherwise the driver sends SAVEPOINT without BEGIN.
        return sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS
        )

    engine = create_engine(
        "sqlite+pysqlite://",
        creator=connect,
        poolclass=QueuePool,
        pool_size=pool_size,
        max_overflow=0,
    )

    @event.listens_for(engine, "connect")
    def _set_pragmas(connection: Any, record: Any) -> None:
        for pragma in pragmas:
            connection.execute(pragma).close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def quick_check(path: Path) -> None:
    """Raise :class:`IntegrityError` if SQLite finds the file damaged."""
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=BUSY_SECONDS)
    try:
        rows = connection.execute("PRAGMA quick_check").fetchall()
    finally:
        connection.close()
    if rows != [("ok",)]:
        found = "; ".join(str(row[0]) for row in rows[:5])
        raise IntegrityError(
            f"the catalog {path} is damaged ({found}): move the file away and restore a backup of "
            "it, or run `forebay recover` on the object tier"
        )


def back_up(path: Path, version: int) -> Path:
    """A durable copy of the catalog beside it, named after its schema *version*."""
    target = path.with_name(f"catalog-backup-v{version}.sqlite")
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    create_file(part)
    source = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY_SECONDS)
    copy = sqlite3.connect(part)
    try:
        source.backup(copy)
    finally:
        copy.close()
        source.close()
    _fsync(part)
    part.replace(target)
    _fsync(path.parent)
    return target


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
