"""How fast does the catalog answer with a million blobs in it, on each engine?

Both engines hold the same rows: a blob, a replica, an extent and a file each. Measured are single
calls of ``Catalog.locate`` at both sizes, the commit of a dataset version of 10,000 sealed shards
through the use case that the daemon runs, and calls per second of many callers at once. PostgreSQL
is a server of this script's own with its default durability, on the same disk, over a Unix socket.
"""

# ruff: noqa: S608 - statements are put together from this script's own constants

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness import Options, Report, Samples, parse_options, percentile
from sqlalchemy import Connection, func, insert, select

from forebay_server.catalog.clock import now
from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.queries_settings import put_setting
from forebay_server.catalog.tables import blobs, extents, files, replicas, uploads
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.shards import ShardCommit
from forebay_server.testing.postgresql import PostgresqlServer
from forebay_wire.ids import new_random_name

SMALL = 10_000
LARGE = 1_000_000
LARGE_QUICK = 100_000
NUM_SHARDS = 10_000
UID = 1000
BLOB_BYTES = 64 << 20

NUM_LOCATES = 1000
"""Single calls a repeat, half as many with ``--quick``: ten lie above the 99th percentile."""
NUM_CALLERS = 64
CALLS_EACH = 10

# Scattered like digests, and computable in both engines and here.
_SQLITE_ID = "printf('%08x%0{width}x', (i * 2654435761) & 4294967295, i)"
_POSTGRESQL_ID = (
    "lpad(to_hex((i * 2654435761) & 4294967295), 8, '0') || lpad(to_hex(i), {width}, '0')"
)
_ROWS = (
    ("files", "file, tier, num_bytes, state, created", "{name}, 'ssd', 67109888, 'live', 0"),
    ("blobs", "blob, num_bytes, num_segments, created", "{blob}, 67108864, 16, 0"),
    (
        "replicas",
        "replica, blob, tier, node, encoding, state, reason, created",
        "{name}, {blob}, 'ssd', '', 'raw', 'live', '', 0",
    ),
    (
        "extents",
        "replica, seq, blob_offset, file, file_offset, num_bytes",
        "{name}, 0, 0, {name}, 0, 67108864",
    ),
)


def blob_id(number: int) -> str:
    return f"{(number * 2654435761) & 0xFFFFFFFF:08x}{number:056x}"


def fill(connection: Connection, start: int, end: int, *, only: str = "") -> None:
    """Add the blobs *start* to *end*, each with a replica of one extent; or rows of one table."""
    is_sqlite = connection.dialect.name == "sqlite"
    template = _SQLITE_ID if is_sqlite else _POSTGRESQL_ID
    name, blob = template.format(width=24), template.format(width=56)
    numbers = (
        f"WITH RECURSIVE n(i) AS (SELECT {start} UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {end})"
        if is_sqlite
        else f"WITH n(i) AS (SELECT generate_series({start}::bigint, {end} - 1))"
    )
    for table, columns, values in _ROWS:
        if only not in ("", table):
            continue
        chosen = values.format(name=name, blob=blob)
        statement = f"{numbers} INSERT INTO {table} ({columns}) SELECT {chosen} FROM n"
        if is_sqlite:  # there WITH comes behind INSERT INTO
            statement = f"INSERT INTO {table} ({columns}) {numbers} SELECT {chosen} FROM n"
        connection.exec_driver_sql(statement.replace("%", "%%") if not is_sqlite else statement)


class _Quiet:
    """The daemon's other parts, which a commit tells and does not wait for."""

    def committed(self, sessions: Iterable[str]) -> None:
        """The sessions have ended."""

    def wake(self) -> None:
        """There may be new work."""


@dataclass
class Store:
    """One catalog with its number of blobs."""

    engine: str
    catalog: Catalog
    num_blobs: int = 0

    async def grow(self, num_blobs: int) -> None:
        step = 20_000
        for start in range(self.num_blobs, num_blobs, step):
            end = min(start + step, num_blobs)
            await self.catalog.write(lambda c, start=start, end=end: fill(c, start, end))
        self.num_blobs = num_blobs
        if self.engine == "postgresql":  # what autovacuum does by itself within a minute
            await self.catalog.write(lambda c: c.exec_driver_sql("ANALYZE").close())

    async def locate(self, count: int) -> list[float]:
        """Milliseconds of *count* calls, one after the other, of a random blob each."""
        taken = []
        for _ in range(count):
            wanted = blob_id(random.randrange(self.num_blobs))
            start = time.perf_counter()
            found = await self.catalog.locate([wanted])
            taken.append((time.perf_counter() - start) * 1e3)
            assert found[wanted].replicas[0].extents
        return taken

    async def commit_version(self) -> float:
        """Seconds of the commit of a version of 10,000 sealed shards."""
        shards = tuple(
            ShardCommit(new_random_name(), new_random_name() * 2, BLOB_BYTES, 1000, (1000,))
            for _ in range(NUM_SHARDS)
        )
        await self.catalog.write(lambda connection: seal_all(connection, shards))
        quiet = _Quiet()
        datasets = Datasets(self.catalog, quiet, quiet)  # type: ignore[arg-type]
        name = f"d-{new_random_name()}"
        commit = VersionCommit(name, 0, b"schema", shards, new_random_name())
        start = time.perf_counter()
        made = await datasets.commit_version(commit, UID)
        taken = time.perf_counter() - start
        assert made.num_shards == NUM_SHARDS
        return taken

    async def writes_per_second(self) -> float:
        async def call(caller: int) -> None:
            for number in range(CALLS_EACH):
                await self.catalog.write(
                    lambda c, n=number: put_setting(c, f"caller{caller}", f"{n}")
                )

        return await calls_per_second(call)

    async def reads_per_second(self) -> float:
        async def call(caller: int) -> None:
            for _ in range(CALLS_EACH):
                await self.catalog.locate([blob_id(random.randrange(self.num_blobs))])

        return await calls_per_second(call)


async def calls_per_second(call: object) -> float:
    start = time.perf_counter()
    await asyncio.gather(*(call(caller) for caller in range(NUM_CALLERS)))  # type: ignore[operator]
    return NUM_CALLERS * CALLS_EACH / (time.perf_counter() - start)


def seal_all(connection: Connection, shards: tuple[ShardCommit, ...]) -> None:
    """What 10,000 uploads have left when all are sealed."""
    names = [(shard, new_random_name()) for shard in shards]
    at = connection.scalar(select(now()))
    connection.execute(
        insert(files),
        [
            {"file": name, "tier": "ssd", "num_bytes": BLOB_BYTES, "created": at}
            for _, name in names
        ],
    )
    connection.execute(
        insert(blobs),
        [
            {"blob": one.blob, "num_bytes": BLOB_BYTES, "num_segments": 16, "created": at}
            for one in shards
        ],
    )
    connection.execute(
        insert(replicas),
        [{"replica": name, "blob": one.blob, "tier": "ssd", "created": at} for one, name in names],
    )
    connection.execute(
        insert(extents),
        [
            {
                "replica": name,
                "seq": 0,
                "blob_offset": 0,
                "file": name,
                "file_offset": 0,
                "num_bytes": BLOB_BYTES,
            }
            for _, name in names
        ],
    )
    connection.execute(
        insert(uploads),
        [
            {
                "session": one.session,
                "owner": "dataset",
                "uid": UID,
                "tier": "ssd",
                "file": name,
                "state": "landed",
                "blob": one.blob,
                "expires": at + 3600,
                "created": at,
            }
            for one, name in names
        ],
    )


@contextlib.asynccontextmanager
async def opened(url: str, engine: str) -> AsyncIterator[Store]:
    catalog = await asyncio.to_thread(Catalog.open, url, owner="benchmark")
    try:
        yield Store(engine, catalog)
    finally:
        await asyncio.to_thread(catalog.close)


async def measure(url: str, engine: str, options: Options, report: Report) -> None:
    """All figures of one engine."""
    large = LARGE_QUICK if options.quick else LARGE
    samples = Samples()
    async with opened(url, engine) as store:
        await store.grow(SMALL)
        await store.locate(200)
        for _ in range(options.repeats):
            samples.add("small", statistics.median(await store.locate(NUM_LOCATES // 4)))
        await store.grow(large)
        await store.locate(200)
        for _ in range(options.repeats):
            taken = await store.locate(NUM_LOCATES // 2 if options.quick else NUM_LOCATES)
            samples.add("large", statistics.median(taken))
            samples.add("p99", percentile(taken, 0.99))
            samples.add("writes", await store.writes_per_second())
            samples.add("reads", await store.reads_per_second())
        for _ in range(min(options.repeats, 2 if options.quick else 7)):
            samples.add("commit", await store.commit_version())
        held = await store.catalog.read(lambda c: c.scalar(select(func.count()).select_from(blobs)))
        assert held is not None
        assert held >= large
    found = samples.by_case
    growth = statistics.median(found["large"]) / statistics.median(found["small"])
    report.ratio("locate_growth", [growth], at_most=2)
    report.value("locate_p99_ms", found["p99"], at_most=5)
    report.value("commit_10k_shards_s", found["commit"], at_most=2)
    for name in ("small", "large"):
        report.value(f"{engine}_locate_p50_ms_{name}", found[name])
    report.value(f"{engine}_locate_p99_ms", found["p99"])
    report.value(f"{engine}_commit_10k_shards_s", found["commit"])
    report.value(f"{engine}_writes_per_s", found["writes"])
    report.value(f"{engine}_reads_per_s", found["reads"])


def run(options: Options, folder: Path) -> Report:
    """All figures of this script."""
    large = LARGE_QUICK if options.quick else LARGE
    report = Report(f"The catalog with {SMALL:,} and {large:,} blobs")
    asyncio.run(measure(sqlite_url(folder / "catalog.sqlite"), "sqlite", options, report))
    try:
        server = PostgresqlServer(settings={"fsync": "on", "shared_buffers": "256MB"})
        with server:
            asyncio.run(measure(server.new_database(), "postgresql", options, report))
    except FileNotFoundError as error:
        print(f"PostgreSQL is missing: {error}")
        for name in ("locate_p99_ms", "commit_10k_shards_s"):
            report.value(name, None)
        report.ratio("locate_growth", None)
    return report


def main() -> int:
    options = parse_options(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(prefix="forebay-catalog-", dir=options.work) as folder:
        return run(options, Path(folder)).finish(options)


if __name__ == "__main__":
    sys.exit(main())
