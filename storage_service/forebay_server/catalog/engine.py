"""The catalog: one writer thread with group commit, beside it readers of consistent snapshots.

Queries are plain functions that take a :class:`Connection` (``catalog/queries_*.py``); this module
runs them. A function given to :meth:`Catalog.write` runs in a savepoint of its own inside a
transaction that it may share with other requests: it is applied as a whole or not at all, and the
answer comes after the transaction is durable. It must not wait for anything but the database.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from sqlalchemy import Connection, Engine

from forebay_server.catalog import schema, sqlite
from forebay_server.catalog.failures import translate
from forebay_server.catalog.migrations import MIGRATIONS, Migration
from forebay_server.catalog.queries_blobs import BlobLocation, locate_blobs
from forebay_server.catalog.tables import SCHEMA_VERSION
from forebay_wire.errors import DaemonUnavailable, InvalidRequest

__all__ = ["Catalog", "Connection", "sqlite_url"]

T = TypeVar("T")

MAX_QUEUED_WRITES: Final = 4096
"""Requests waiting for the writer thread; further ones wait outside."""

MAX_WRITES_PER_COMMIT: Final = 256
"""Requests that share one transaction: bounds how long the first one waits for the last."""

NUM_READERS: Final = 4

_SCHEME: Final = "sqlite:///"


def sqlite_url(path: Path) -> str:
    """The URL of the catalog in the file *path*."""
    return f"{_SCHEME}{path.resolve()}"


@dataclass(frozen=True)
class _Request(Generic[T]):
    function: Callable[[Connection], T]
    future: Future[T]


@dataclass(frozen=True)
class _Outcome:
    request: _Request[Any]
    value: Any = None
    error: BaseException | None = None

    def tell(self) -> None:
        if self.error is not None:
            self.request.future.set_exception(self.error)
        else:
            self.request.future.set_result(self.value)


class Catalog:
    """One open catalog. Thread-safe; whoever opened it closes it."""

    def __init__(self, path: Path, writer: Engine, readers: Engine) -> None:
        self.path = path
        self._writer = writer
        self._readers = readers
        # Guards what follows it; notified when a request comes or goes and at the closing.
        self._changed = threading.Condition()
        self._pending: deque[_Request[Any]] = deque()
        self._closed = False
        self._watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._thread = threading.Thread(target=self._write_loop, name="catalog-write", daemon=True)
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="catalog-read")

    @classmethod
    def open(
        cls,
        url: str,
        *,
        schema_version: int = SCHEMA_VERSION,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> Catalog:
        """Open or create the catalog at *url* (``sqlite:///PATH``); blocks.

        After an unclean end the file is checked first. An older schema is migrated after a backup
        beside the file; a newer one raises :class:`VersionMismatch`, a damaged file
        :class:`IntegrityError`.
        """
        if not url.startswith(_SCHEME) or not url[len(_SCHEME) :]:
            raise InvalidRequest(f"catalog URL {url!r} is not understood: use sqlite:///PATH")
        path = Path(url[len(_SCHEME) :])
        try:
            clean = sqlite.was_closed_cleanly(path)
            sqlite.create_file(path)
            if not clean:
                sqlite.quick_check(path)
            writer = sqlite.writer_engine(path)
            with writer.connect() as connection:
                schema.prepare(
                    connection,
                    lambda version: sqlite.back_up(path, version),
                    target=schema_version,
                    migrations=migrations,
                )
        except Exception as error:
            raise translate(error, str(path)) from error
        catalog = cls(path, writer, sqlite.reader_engine(path, NUM_READERS))
        catalog._thread.start()
        return catalog

    def close(self) -> None:
        """Apply what is queued, then close; later calls raise. Idempotent, blocks."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown()
        # Readers first: the last connection to close must be able to empty and remove the WAL.
        self._readers.dispose()
        self._writer.dispose()

    # ------------------------------------------------------------------------------- requests

    async def write(self, function: Callable[[Connection], T]) -> T:
        """The result of *function* run in the writer thread, once it is durable.

        If it raises, nothing of it is stored. A caller that is cancelled while the request waits
        takes it back; one that is cancelled later does not.
        """
        request = _Request(function, Future[T]())
        if not self._offer(request):
            await asyncio.to_thread(self._enqueue, request)
        return await asyncio.wrap_future(request.future)

    def write_now(self, function: Callable[[Connection], T]) -> T:
        """:meth:`write` for threads without an event loop; blocks."""
        request = _Request(function, Future[T]())
        self._enqueue(request)
        return request.future.result()

    async def read(self, function: Callable[[Connection], T]) -> T:
        """The result of *function* on one snapshot that holds every write answered before."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.read_now, function)

    def read_now(self, function: Callable[[Connection], T]) -> T:
        """:meth:`read` for threads without an event loop; blocks."""
        try:
            with self._readers.connect() as connection, connection.begin():
                return function(connection)
        except Exception as error:
            translated = translate(error, str(self.path))
            if translated is error:
                raise
            raise translated from error

    async def wait_until(
        self, probe: Callable[[Connection], T | None], timeout_seconds: float
    ) -> T | None:
        """What *probe* finds, looked for now and after each commit; None after the timeout."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        committed = asyncio.Event()
        with self._changed:
            self._watchers[committed] = loop
        try:
            while True:
                committed.clear()
                found = await self.read(probe)
                if found is not None:
                    return found
                async with asyncio.timeout_at(deadline):
                    await committed.wait()
        except TimeoutError:
            return None
        finally:
            with self._changed:
                del self._watchers[committed]

    async def locate(self, blobs: Sequence[str]) -> dict[str, BlobLocation]:
        """Where the known ones of *blobs* lie; unknown ones are left out."""
        return await self.read(lambda connection: locate_blobs(connection, blobs))

    # ----------------------------------------------------------------------- the writer thread

    def _check_open(self) -> None:
        if self._closed:
            raise DaemonUnavailable("the catalog is closed: the daemon is stopping; connect again")

    def _offer(self, request: _Request[Any]) -> bool:
        """Queue *request* unless the queue is full; never blocks for long."""
        with self._changed:
            self._check_open()
            if len(self._pending) >= MAX_QUEUED_WRITES:
                return False
            self._pending.append(request)
            self._changed.notify_all()
            return True

    def _enqueue(self, request: _Request[Any]) -> None:
        """Queue *request*; blocks while the queue is full."""
        while not self._offer(request):
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or len(self._pending) < MAX_QUEUED_WRITES
                )

    def _take(self) -> list[_Request[Any]]:
        """The next requests to commit together; empty once closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._pending)
            count = min(len(self._pending), MAX_WRITES_PER_COMMIT)
            batch = [self._pending.popleft() for _ in range(count)]
            self._changed.notify_all()
            return batch

    def _write_loop(self) -> None:
        while batch := self._take():
            self._commit(batch)

    def _commit(self, batch: list[_Request[Any]]) -> None:
        """One transaction for *batch*; every future is answered, whatever happens."""
        live = [item for item in batch if item.future.set_running_or_notify_cancel()]
        outcomes: list[_Outcome] = []
        try:
            with self._writer.connect() as connection, connection.begin():
                for request in live:
                    outcomes.append(self._apply(connection, request))  # noqa: PERF401 - kept on error
        except Exception as error:  # noqa: BLE001 - goes to every caller; the thread must live
            lost = translate(error, str(self.path))
            failed = {id(outcome.request): outcome for outcome in outcomes if outcome.error}
            outcomes = [failed.get(id(item), _Outcome(item, error=lost)) for item in live]
        for outcome in outcomes:
            outcome.tell()
        self._announce()

    def _apply(self, connection: Connection, request: _Request[Any]) -> _Outcome:
        """Run one request in its savepoint; raises only if the whole transaction is gone."""
        savepoint = connection.begin_nested()
        try:
            value = request.function(connection)
            savepoint.commit()
        except Exception as error:
            if self._lost_transaction(connection):
                raise
            savepoint.rollback()
            return _Outcome(request, error=translate(error, str(self.path)))
        return _Outcome(request, value=value)

    @staticmethod
    def _lost_transaction(connection: Connection) -> bool:
        """Whether SQLite rolled everything back by itself, as it may on a full disk."""
        driver = connection.connection.dbapi_connection
        return driver is None or not driver.in_transaction

    def _announce(self) -> None:
        with self._changed:
            for event, loop in self._watchers.items():
                if not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)
