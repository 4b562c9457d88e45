"""What only the PostgreSQL catalog does: several writers, one owner, a server that goes away."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from forebay_server.catalog import engine, postgresql, queries_jobs
from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_settings import get_setting, put_setting
from forebay_server.testing.postgresql import GUARDED_USER, PostgresqlServer
from forebay_wire.errors import (
    AlreadyRunning,
    DaemonUnavailable,
    ForebayError,
    InvalidRequest,
    PermissionDenied,
    StorageError,
)

pytestmark = pytest.mark.needs("initdb", "postgres", package="postgresql")


@pytest.fixture
def url(postgresql: PostgresqlServer) -> str:
    return postgresql.empty_database()


@pytest.fixture
def open_catalog() -> Iterator[Callable[..., Catalog]]:
    """Opens catalogs and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(url: str, owner: str | None = None) -> Catalog:
            catalog = Catalog.open(url, owner=owner)
            stack.callback(catalog.close)
            return catalog

        yield open_one


def count(connection: Connection) -> int:
    """Reads and writes: two that interleave would lose a step."""
    number = int(get_setting(connection, "count") or 0) + 1
    put_setting(connection, "count", str(number))
    return number


def read_count(connection: Connection) -> int:
    return int(get_setting(connection, "count") or 0)


# --------------------------------------------------------------------------- several processes


async def test_two_writers_interleave_without_losing_a_change(
    url: str, open_catalog: Callable[..., Catalog]
) -> None:
    first, second = await asyncio.gather(
        asyncio.to_thread(open_catalog, url), asyncio.to_thread(open_catalog, url)
    )
    answers = await asyncio.gather(
        *(catalog.write(count) for _ in range(100) for catalog in (first, second))
    )
    assert sorted(answers) == list(range(1, 201))
    assert await first.read(read_count) == 200


async def test_a_job_goes_to_one_of_two_writers(
    url: str, open_catalog: Callable[..., Catalog]
) -> None:
    catalogs = [open_catalog(url), open_catalog(url)]
    for number in range(20):
        target = f"m{number}"
        await catalogs[0].write(lambda c, target=target: queries_jobs.enqueue(c, "flush", target))
    taken: list[str] = []

    async def work(catalog: Catalog, owner: str) -> None:
        while job := await catalog.write(lambda c: queries_jobs.claim(c, owner, 60, ["flush"])):
            taken.append(job.target)

    await asyncio.gather(*(work(catalog, f"{id(catalog)}") for catalog in catalogs))
    assert sorted(taken) == sorted(f"m{number}" for number in range(20))


async def test_wait_until_sees_the_commit_of_another_process(
    url: str, open_catalog: Callable[..., Catalog]
) -> None:
    waiting_one, other = open_catalog(url), open_catalog(url)
    waiting = asyncio.create_task(
        waiting_one.wait_until(lambda c: get_setting(c, "there"), timeout_seconds=60)
    )
    await waiting_one.read(read_count)
    await other.write(lambda c: put_setting(c, "there", "yes"))
    assert await waiting == "yes"


def test_one_owner_at_a_time(
    url: str, open_catalog: Callable[..., Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "OPEN_SECONDS", 0.3)
    first = Catalog.open(url, owner="node a")
    try:
        with pytest.raises(AlreadyRunning, match="forebay node a, from the same machine"):
            Catalog.open(url, owner="node b")
        first.write_now(count)
    finally:
        first.close()
    assert open_catalog(url, "node b").write_now(count) == 2


async def test_an_owner_that_lost_its_catalog_to_another_writes_no_more(
    url: str,
    postgresql: PostgresqlServer,
    open_catalog: Callable[..., Catalog],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = open_catalog(url, "node a")
    failures: list[BaseException] = []
    first.listen_failure(failures.append)
    await first.write(count)
    database = url.split("/")[3].split("?")[0]
    postgresql.run_sql(
        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'", database
    )
    monkeypatch.setattr(engine, "AWAY_SECONDS", 0.5)
    second = await asyncio.to_thread(open_catalog, url, "node b")
    with pytest.raises(AlreadyRunning, match="node b"):
        await first.write(count)
    assert [type(error) for error in failures] == [AlreadyRunning]
    with pytest.raises(StorageError, match="failed before"):
        await first.write(count)
    assert await second.write(count) == 2


# ------------------------------------------------------------------------- a server that goes away


@pytest.mark.slow
async def test_work_goes_on_over_restarts_of_the_server(
    url: str, open_catalog: Callable[..., Catalog]
) -> None:
    with PostgresqlServer() as server:
        catalog = open_catalog(server.new_database(), "node a")
        acknowledged = 0
        is_over = asyncio.Event()

        async def write() -> None:
            nonlocal acknowledged
            while not is_over.is_set():
                await catalog.write(count)
                acknowledged += 1

        async def read() -> None:
            while not is_over.is_set():
                seen = acknowledged
                assert await catalog.read(read_count) >= seen

        working = [asyncio.create_task(work()) for work in (write, write, write, read)]
        for _ in range(3):
            before = acknowledged
            async with asyncio.timeout(60):
                while acknowledged < before + 20:
                    await asyncio.sleep(0.01)
                    for task in working:
                        assert not task.done(), task.exception()
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
        is_over.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*working)
        # Each was applied once: none lost, none repeated.
        assert await catalog.read(read_count) == acknowledged
        catalog.close()


class CuttingProxy:
    """Stands before a server's socket and breaks a connection at its next COMMIT."""

    def __init__(self, server: Path, folder: Path) -> None:
        self.folder = folder
        self._server = str(server / ".s.PGSQL.5432")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen()
        self._passes_commit: bool | None = None
        self.num_cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, passes_commit: bool) -> None:
        """Break the next COMMIT, after it reached the server or before."""
        self._passes_commit = passes_commit

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as upstream, contextlib.suppress(OSError):
            upstream.connect(self._server)
            threading.Thread(target=self._answer, args=(upstream, client), daemon=True).start()
            while data := client.recv(1 << 16):
                if self._passes_commit is not None and b"COMMIT\0" in data:
                    passes, self._passes_commit = self._passes_commit, None
                    self.num_cut += 1
                    client.shutdown(socket.SHUT_RDWR)  # no answer comes through any more
                    if passes:
                        upstream.sendall(data)
                    upstream.shutdown(socket.SHUT_WR)
                    return
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _answer(upstream: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := upstream.recv(1 << 16):
                client.sendall(data)


@pytest.fixture
def proxy(
    postgresql: PostgresqlServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CuttingProxy]:
    made = CuttingProxy(postgresql.folder, tmp_path_factory.mktemp("p"))
    yield made
    made.close()


@pytest.mark.parametrize("passes_commit", [True, False])
async def test_a_commit_whose_answer_is_lost_is_looked_up_and_not_repeated(
    url: str, proxy: CuttingProxy, open_catalog: Callable[..., Catalog], passes_commit: bool
) -> None:
    catalog = open_catalog(url.split("?")[0] + f"?host={proxy.folder}", "node a")
    assert await catalog.write(count) == 1
    proxy.cut(passes_commit=passes_commit)
    assert await catalog.write(count) == 2
    assert proxy.num_cut == 1
    assert await catalog.read(read_count) == 2
    assert await catalog.write(count) == 3


async def test_an_outcome_that_cannot_be_known_is_said_and_ends_the_catalog(
    url: str,
    proxy: CuttingProxy,
    open_catalog: Callable[..., Catalog],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgresql, "AWAY_SECONDS", 0.0)
    catalog = open_catalog(url.split("?")[0] + f"?host={proxy.folder}", "node a")
    failures: list[BaseException] = []
    catalog.listen_failure(failures.append)
    proxy.cut(passes_commit=True)
    with pytest.raises(StorageError, match="same request id"):
        await catalog.write(count)
    assert len(failures) == 1
    with pytest.raises(StorageError, match="failed before"):
        await catalog.write(count)


# -------------------------------------------------------------------------------- bad input


def test_a_password_in_the_url_is_refused_and_not_repeated(url: str) -> None:
    for text in ("postgresql://lab:hunter2@host/d", "postgresql://host/d?password=hunter2"):
        with pytest.raises(InvalidRequest, match="PGPASSWORD") as raised:
            Catalog.open(text)
        assert "hunter2" not in raised.value.message


def test_a_password_comes_from_the_environment(
    url: str, postgresql: PostgresqlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = url.split("/")[3].split("?")[0]
    postgresql.run_sql(f"CREATE ROLE {GUARDED_USER} LOGIN SUPERUSER PASSWORD 'secret'")
    guarded = postgresql.url(database, GUARDED_USER)
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    with pytest.raises(PermissionDenied, match="PGPASSFILE") as raised:
        Catalog.open(guarded)
    assert "hunter2" not in str(raised.value)
    monkeypatch.setenv("PGPASSWORD", "secret")
    catalog = Catalog.open(guarded)
    assert catalog.write_now(count) == 1
    catalog.close()


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("postgresql://lab@host", InvalidRequest, "names no database"),
        ("postgresql://lab@/nowhere?host=HOST", InvalidRequest, "create it"),
        ("postgresql://lab@/d?host=/tmp/no/such/folder", DaemonUnavailable, "does not answer"),
        ("postgresql://lab@h:port/d", InvalidRequest, "cannot be read"),
        ("postgresql://lab@/d?host=HOST&colour=red", ForebayError, "colour"),
    ],
)
def test_a_catalog_that_cannot_be_reached_says_why(
    postgresql: PostgresqlServer,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    error: type[ForebayError],
    said: str,
) -> None:
    monkeypatch.setattr(engine, "OPEN_SECONDS", 0.1)
    with pytest.raises(error, match=said):
        Catalog.open(text.replace("HOST", str(postgresql.folder)))
