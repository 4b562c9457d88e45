"""How the catalog lies in an SQLite file: pragmas, transactions, checks at the opening, backup."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from blake3 import blake3
from sqlalchemy import Connection, Engine, Transaction, create_engine, event
from sqlalchemy.pool import QueuePool

from forebay_server.catalog import row_digests, seal, wal
from forebay_server.catalog.failures import is_sqlite_io_error
from forebay_wire.errors import AlreadyExists, IntegrityError, NotFound, StorageError

BUSY_SECONDS: Final = 10.0
"""How long a statement waits for a foreign process (the sqlite3 shell) that holds a lock."""

CACHE_KIB: Final = 64 * 1024
"""Of the writer; each reader has a quarter of it. A large commit must not spill."""

WRITER_PRAGMAS: Final = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",  # NORMAL would lose acknowledged commits at a power cut
    "PRAGMA foreign_keys=ON",
    "PRAGMA journal_size_limit=67108864",  # a WAL that grew once does not stay large
    f"PRAGMA cache_size=-{CACHE_KIB}",
    "PRAGMA trusted_schema=ON",  # the triggers call a function of ours
)
READER_PRAGMAS: Final = (
    "PRAGMA query_only=ON",
    f"PRAGMA cache_size=-{CACHE_KIB // 4}",
    # Only the writer checkpoints: before 3.51.3 two checkpointing connections can reset the WAL
    # under each other and lose commits.
    "PRAGMA wal_autocheckpoint=0",
)


SCHEMA_TEXT_KEY: Final = "schema_text"
"""The setting that holds the digest of the schema as it was declared."""

_WHAT_TO_DO: Final = (
    "move the file away and restore a backup of it, or run `forebay recover` on the object tier"
)


class SqliteDatabase:
    """The file *path*, of which this process is the only user that writes."""

    max_writes_per_commit = 256
    has_other_writers = False

    def __init__(self, path: Path, num_readers: int) -> None:
        """*path* exists and is known to be good: see :meth:`open`."""
        self.path = path
        self.where = str(path)
        self.writer = writer_engine(path)
        self.readers = reader_engine(path, num_readers)
        self._marker = wal.Marker(path)

    @classmethod
    def open(cls, path: Path, num_readers: int) -> SqliteDatabase:
        """Open or create the file; :class:`IntegrityError` if it is not what was written."""
        is_new = not path.exists() or path.stat().st_size == 0
        is_known_good = is_new or (was_closed_cleanly(path) and seal.is_sealed(path))
        create_file(path)
        if not is_known_good:
            check(path)
        seal.break_seal(path)
        return cls(path, num_readers)

    def enter(self, connection: Connection) -> object:
        return None  # BEGIN IMMEDIATE has waited for the lock

    def commit(self, transaction: Transaction, entered: object) -> None:
        transaction.commit()
        self._marker.note()

    def lost_transaction(self, connection: Connection) -> bool:
        driver = connection.connection.dbapi_connection
        return driver is None or not driver.in_transaction

    def is_passing(self, error: BaseException) -> bool:
        return False

    def is_fatal(self, error: BaseException) -> bool:
        """After an I/O error the file may hold the commit or not; a repeated fsync would lie. What
        could not be marked was committed, though its callers are told that it failed."""
        return is_sqlite_io_error(error) or isinstance(error, wal.MarkFailed)

    def moment(self, connection: Connection) -> str:
        return ""  # nobody else writes

    def back_up(self, connection: Connection, version: int) -> None:
        target = self.path.with_name(f"catalog-backup-v{version}.sqlite")
        target.unlink(missing_ok=True)
        back_up(self.path, target)

    def finish_schema(self, connection: Connection) -> None:
        """Digests for all rows, and one of the schema itself."""
        driver: Any = connection.connection.driver_connection
        row_digests.install(driver)
        digest = _digest_of_schema(driver)
        driver.execute(
            "INSERT INTO settings (key, value) VALUES (?, ?)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (SCHEMA_TEXT_KEY, digest),
        )

    def close(self) -> None:
        self._marker.close()
        drop_mark(self.path)
        # Readers first: the last connection to close must be able to empty and remove the WAL.
        self.readers.dispose()
        self.writer.dispose()
        if was_closed_cleanly(self.path):
            seal.put_seal(self.path)


def drop_mark(path: Path) -> None:
    """Remove the mark, durably: the log that it speaks of is whole, or about to go."""
    if wal.drop_mark(path):
        seal.sync_folder(path.parent)


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
    def _set_up(connection: Any, record: Any) -> None:
        row_digests.register(connection)
        for pragma in pragmas:
            connection.execute(pragma).close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def check(path: Path) -> None:
    """Read all of the file; :class:`IntegrityError` unless it is as it was written.

    The log by its mark, structure, indexes and constraints by SQLite, the schema and every row by
    their digests.
    """
    lost = wal.find_loss(path)
    if lost is not None:
        raise IntegrityError(f"the catalog {path} has lost commits ({lost}): {_WHAT_TO_DO}")
    drop_mark(path)
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    try:
        row_digests.register(connection)
        found = _find_damage(connection)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if is_sqlite_io_error(error):
            raise
        found = str(error)
    finally:
        connection.close()
    if found is not None:
        raise IntegrityError(f"the catalog {path} is damaged ({found}): {_WHAT_TO_DO}")


def _find_damage(connection: sqlite3.Connection) -> str | None:
    rows = connection.execute("PRAGMA integrity_check(5)").fetchall()
    if rows != [("ok",)]:
        return "; ".join(str(row[0]) for row in rows)
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'settings'").fetchone():
        return None  # nothing was ever created in it
    sealed = connection.execute(
        "SELECT value FROM settings WHERE key = ?", (SCHEMA_TEXT_KEY,)
    ).fetchone()
    if sealed is not None and sealed[0] != _digest_of_schema(connection):
        return "its schema is not the one that was declared"
    return row_digests.find_damage(connection)


def _digest_of_schema(connection: sqlite3.Connection) -> str:
    return blake3(row_digests.schema_text(connection).encode()).hexdigest()


def back_up(path: Path, target: Path) -> None:
    """A durable copy of the catalog *path*, as of one commit, while it may be in use.

    The copy is checked before it gets its name. :class:`AlreadyExists` if *target* exists.
    """
    if target.exists():
        raise AlreadyExists(f"{target} exists: name a file that does not, a backup replaces none")
    if not path.is_file():
        raise NotFound(f"there is no catalog {path}: name the data folder with --data")
    part = target.with_name(target.name + ".part")
    try:
        part.unlink(missing_ok=True)
        create_file(part)
        _copy(path, part)
        check(part)
        _fsync(part)
        part.replace(target)
        seal.sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write the backup {target}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _copy(path: Path, part: Path) -> None:
    source = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY_SECONDS)
    copy = sqlite3.connect(part)
    try:
        source.backup(copy)
        # One file: opening it must leave no log beside it.
        copy.execute("PRAGMA journal_mode=DELETE").close()
    finally:
        copy.close()
        source.close()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
