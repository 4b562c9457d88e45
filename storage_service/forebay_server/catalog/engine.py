"""The catalog: one writer thread with group commit, beside it readers of consistent snapshots.

Queries are plain functions that take a :class:`Connection` (``catalog/queries_*.py``); this module
runs them. A function given to :meth:`Catalog.write` runs in a savepoint of its own inside a
transaction that it may share with other requests: it is applied as a whole or not at all, and the
answer comes after the transaction is durable. It must not wait for anything but the database, and
it may run again where the database lost the transaction: only what it returns counts.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from sqlalchemy import Connection

from forebay_server.catalog import schema
from forebay_server.catalog.database import AWAY_SECONDS, Database
from forebay_server.catalog.failures import translate
from forebay_server.catalog.migrations import MIGRATIONS, Migration
from forebay_server.catalog.postgresql import SCHEMES, PostgresqlDatabase, parse_url
from forebay_server.catalog.queries_blobs import BlobLocation, locate_blobs
from forebay_server.catalog.sqlite import SqliteDatabase
from forebay_server.catalog.tables import SCHEMA_VERSION
from forebay_wire.errors import DaemonUnavailable, InvalidRequest, StorageError

__all__ = ["Catalog", "Connection", "sqlite_url"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_QUEUED_WRITES: Final = 4096
"""Requests waiting for the writer thread; further ones wait outside."""

NUM_READERS: Final = 4

OPEN_SECONDS: Final = 10.0
"""How long the opening waits for a server that just starts, or for the last owner to be gone."""

LOOK_SECONDS: Final = 0.1
"""How often commits of other processes are looked for while somebody waits for one."""

FIRST_RETRY_SECONDS: Final = 0.05
LONGEST_RETRY_SECONDS: Final = 1.0

_SCHEME: Final = "sqlite:///"


def sqlite_url(path: Path) -> str:
    """The URL of the catalog in the file *path*."""
    return f"{_SCHEME}{path.resolve()}"


def _open_database(url: str, owner: str | None) -> Database:
    if url.startswith(_SCHEME) and url[len(_SCHEME) :]:
        return SqliteDatabase.open(Path(url[len(_SCHEME) :]), NUM_READERS)
    if url.startswith(SCHEMES):
        return PostgresqlDatabase(parse_url(url), NUM_READERS, owner)
    raise InvalidRequest(
        f"catalog URL {url!r} is not understood: use sqlite:///PATH or "
        "postgresql://USER@HOST:PORT/DATABASE"
    )


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

    def __init__(self, database: Database) -> None:
        self.where = database.where
        self._database = database
        # Guards what follows it; notified when a request comes or goes and at the closing.
        self._changed = threading.Condition()
        self._pending: deque[_Request[Any]] = deque()
        self._closed = False
        self._failure: BaseException | None = None
        self._on_failure: Callable[[BaseException], object] = lambda error: None
        self._watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._threads = [
            threading.Thread(target=self._write_loop, name="catalog-write", daemon=True)
        ]
        if database.has_other_writers:
            self._threads.append(
                threading.Thread(target=self._look_loop, name="catalog-look", daemon=True)
            )
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="catalog-read")

    @classmethod
    def open(
        cls,
        url: str,
        *,
        owner: str | None = None,
        schema_version: int = SCHEMA_VERSION,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> Catalog:
        """Open or create the catalog at *url* (``sqlite:///PATH``, ``postgresql://…``); blocks.

        With *owner*, a name for messages, this is the only one that writes:
        :class:`AlreadyRunning` where another owner has it. A file of SQLite has one user anyway.

        An SQLite file that was not closed cleanly is checked first. An older schema is migrated
        after a backup; a newer one raises :class:`VersionMismatch`, a damaged file
        :class:`IntegrityError`.
        """
        try:
            database = _open_database(url, owner)
        except Exception as error:
            raise translate(error, url) from error
        try:
            _patiently(
                database,
                lambda: _prepare(database, schema_version, migrations),
                may_go_on=lambda: True,
                seconds=OPEN_SECONDS,
            )
        except Exception as error:
            database.close()
            raise translate(error, database.where) from error
        catalog = cls(database)
        for thread in catalog._threads:
            thread.start()
        return catalog

    def listen_failure(self, listener: Callable[[BaseException], object]) -> None:
        """Have *listener* called, from any thread, when nobody can know any more what the catalog
        holds: before any caller is answered, so that nobody acts on a guess."""
        self._on_failure = listener

    def close(self) -> None:
        """Apply what is queued, then close; later calls raise. Idempotent, blocks."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()
        self._database.close()

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

        def look() -> T:
            with self._database.readers.connect() as connection, connection.begin():
                return function(connection)

        try:
            return _patiently(self._database, look, may_go_on=lambda: not self._closed)
        except Exception as error:
            if self._database.is_fatal(error):
                self._fail(error)
            translated = translate(error, self.where)
            if translated is error:
                raise
            raise translated from error

    async def wait_until(
        self, probe: Callable[[Connection], T | None], timeout_seconds: float
    ) -> T | None:
        """What *probe* finds, looked for now and after each commit; None after the timeout.

        Commits of other processes are noticed within :data:`LOOK_SECONDS`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        committed = asyncio.Event()
        with self._changed:
            self._watchers[committed] = loop
            self._changed.notify_all()
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
        if self._failure is not None:
            raise StorageError(
                f"the catalog {self.where} failed before ({self._failure}): stop the daemon, see "
                "to the cause, start it again"
            )

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
            count = min(len(self._pending), self._database.max_writes_per_commit)
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
            if self._failure is not None:
                raise self._failure
            _patiently(
                self._database,
                lambda: self._transact(live, outcomes),
                may_go_on=lambda: not self._closed,
            )
        except Exception as error:  # noqa: BLE001 - goes to every caller; the thread must live
            if self._database.is_fatal(error):
                self._fail(error)
            lost = translate(error, self.where)
            failed = {id(outcome.request): outcome for outcome in outcomes if outcome.error}
            outcomes = [failed.get(id(item), _Outcome(item, error=lost)) for item in live]
        for outcome in outcomes:
            outcome.tell()
        self._announce()

    def _transact(self, live: list[_Request[Any]], outcomes: list[_Outcome]) -> None:
        """Apply *live* in one transaction and make it durable; fills *outcomes* anew."""
        outcomes.clear()
        database = self._database
        with database.writer.connect() as connection, connection.begin() as transaction:
            entered = database.enter(connection)
            for request in live:
                outcomes.append(self._apply(connection, request))  # noqa: PERF401 - kept on error
            database.commit(transaction, entered)

    def _apply(self, connection: Connection, request: _Request[Any]) -> _Outcome:
        """Run one request in its savepoint; raises only if the whole transaction is gone."""
        savepoint = connection.begin_nested()
        try:
            value = request.function(connection)
            savepoint.commit()
        except Exception as error:
            if self._database.is_fatal(error) or self._database.lost_transaction(connection):
                raise
            savepoint.rollback()
            return _Outcome(request, error=translate(error, self.where))
        return _Outcome(request, value=value)

    def _fail(self, error: BaseException) -> None:
        """From here on nothing is written: the database may hold something else than we think."""
        with self._changed:
            if self._failure is None:
                self._failure = translate(error, self.where)
        self._on_failure(error)

    # ------------------------------------------------------------------------ commits of others

    def _look_loop(self) -> None:
        """Wake the watchers when another process has committed."""
        seen = ""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._watchers)
                self._changed.wait_for(lambda: self._closed, LOOK_SECONDS)
                if self._closed:
                    return
            try:
                with self._database.readers.connect() as connection, connection.begin():
                    moment = self._database.moment(connection)
            except Exception:  # noqa: BLE001 - the watchers' own reads tell them; this must live
                moment = ""
            if moment != seen:
                seen = moment
                self._announce()

    def _announce(self) -> None:
        with self._changed:
            for event, loop in self._watchers.items():
                if not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)


def _prepare(database: Database, target: int, migrations: Sequence[Migration]) -> None:
    with database.writer.connect() as connection:
        schema.prepare(connection, database, target=target, migrations=migrations)


def _patiently(
    database: Database,
    work: Callable[[], T],
    may_go_on: Callable[[], bool],
    seconds: float | None = None,
) -> T:
    """The result of *work*, begun again while the database is away, for a bounded time.

    Only after failures of which nothing is left in the database.
    """
    limit = AWAY_SECONDS if seconds is None else seconds
    deadline = time.monotonic() + limit
    delay = FIRST_RETRY_SECONDS
    while True:
        try:
            return work()
        except Exception as error:
            is_late = time.monotonic() + delay > deadline
            if is_late or not database.is_passing(error) or not may_go_on():
                raise
            if delay == FIRST_RETRY_SECONDS:
                said = translate(error, database.where)
                logger.warning("waiting for the catalog, at most %.0f s: %s", limit, said)
        time.sleep(delay * (0.5 + random.random() / 2))
        delay = min(delay * 2, LONGEST_RETRY_SECONDS)
