"""What the catalog promises on each engine: durable answers, whole changes, its own rules."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Connection, func, insert, select

from forebay_server.catalog import (
    queries_blobs,
    queries_damage,
    queries_evict,
    queries_jobs,
    queries_moves,
    queries_policies,
    queries_uploads,
)
from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.migrations import Migration
from forebay_server.catalog.queries_settings import get_setting, put_setting
from forebay_server.catalog.tables import (
    SCHEMA_VERSION,
    attempts,
    datasets,
    files,
    generations,
    jobs,
    manifest_blobs,
    manifests,
    runs,
    settings,
    versions,
)
from forebay_wire.errors import (
    Conflict,
    DaemonUnavailable,
    InvalidRequest,
    StorageError,
    VersionMismatch,
)


@pytest.fixture
def catalog(catalog_url: str) -> Iterator[Catalog]:
    opened = Catalog.open(catalog_url)
    yield opened
    opened.close()


def put(key: str, value: str = "x"):
    return lambda connection: put_setting(connection, key, value)


def get(key: str):
    return lambda connection: get_setting(connection, key)


def add_blob(number: int, tier: str = "ssd"):
    """Makes blob *number* known, in a file of its own."""

    def write(connection: Connection) -> str:
        name = f"{number:016x}{int.from_bytes(tier.encode()):016x}"
        return queries_blobs.insert_replica(connection, f"{number:064x}", 9, 1, tier, name, 99)

    return write


# ------------------------------------------------------------------------------------- writing


async def test_what_is_answered_can_be_read(catalog: Catalog) -> None:
    await catalog.write(put("a", "1"))
    assert await catalog.read(get("a")) == "1"
    assert catalog.read_now(get("a")) == "1"


async def test_a_failing_request_takes_back_its_own_changes_only(catalog: Catalog) -> None:
    def fail(connection: Connection) -> None:
        put_setting(connection, "bad", "x")
        raise ValueError("mine")

    gate = threading.Event()
    first = asyncio.create_task(catalog.write(lambda connection: gate.wait(10)))
    await asyncio.sleep(0)  # the others queue up behind it and share one transaction
    group = [catalog.write(work) for work in (put("one"), fail, put("two"))]
    pending = asyncio.gather(*group, return_exceptions=True)
    await asyncio.sleep(0)
    gate.set()
    await first
    answers = await pending
    assert isinstance(answers[1], ValueError)
    assert [answers[0], answers[2]] == [None, None]
    assert [await catalog.read(get(key)) for key in ("one", "bad", "two")] == ["x", None, "x"]


async def test_requests_that_wait_share_one_commit(catalog: Catalog) -> None:
    gate = threading.Event()
    first = asyncio.create_task(catalog.write(lambda connection: gate.wait(10)))
    await asyncio.sleep(0)
    pending = asyncio.gather(*(catalog.write(Connection.get_transaction) for _ in range(100)))
    await asyncio.sleep(0)
    gate.set()
    await first
    assert len(set(await pending)) < 5


async def test_a_request_that_waits_can_be_taken_back(catalog: Catalog) -> None:
    inside, gate = threading.Event(), threading.Event()

    def wait(connection: Connection) -> None:
        inside.set()
        assert gate.wait(10)

    first = asyncio.create_task(catalog.write(wait))
    await asyncio.to_thread(inside.wait, 10)
    second = asyncio.create_task(catalog.write(put("late")))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    gate.set()
    await first
    await catalog.write(put("next"))
    assert await catalog.read(get("late")) is None


async def test_a_reader_sees_one_snapshot_while_the_writer_goes_on(catalog: Catalog) -> None:
    await catalog.write(put("a", "old"))
    inside, written = threading.Event(), threading.Event()

    def read_twice(connection: Connection) -> tuple[str | None, str | None]:
        before = get_setting(connection, "a")
        inside.set()
        assert written.wait(10)
        return before, get_setting(connection, "a")

    reading = asyncio.create_task(catalog.read(read_twice))
    await asyncio.to_thread(inside.wait, 10)
    await catalog.write(put("a", "new"))
    written.set()
    assert await reading == ("old", "old")
    assert await catalog.read(get("a")) == "new"


async def test_a_reader_cannot_write(catalog: Catalog) -> None:
    with pytest.raises(StorageError, match=r"read-?only"):
        await catalog.read(put("a"))


async def test_wait_until_answers_at_the_commit_that_makes_it_true(catalog: Catalog) -> None:
    waiting = asyncio.create_task(catalog.wait_until(get("a"), 20))
    for number in range(5):
        await catalog.write(put(f"other{number}"))
    assert not waiting.done()
    await catalog.write(put("a", "now"))
    async with asyncio.timeout(5):
        assert await waiting == "now"
    assert await catalog.wait_until(get("never"), 0.05) is None


async def test_a_closed_catalog_refuses_and_has_applied_what_was_queued(catalog_url: str) -> None:
    catalog = Catalog.open(catalog_url)
    writes = [asyncio.create_task(catalog.write(put(f"k{i}"))) for i in range(50)]
    await asyncio.sleep(0)
    await asyncio.to_thread(catalog.close)
    await asyncio.gather(*writes)
    with pytest.raises(DaemonUnavailable):
        await catalog.write(put("late"))
    with pytest.raises(DaemonUnavailable):
        await catalog.read(get("k0"))
    catalog.close()
    reopened = Catalog.open(catalog_url)
    assert reopened.read_now(get("k49")) == "x"
    reopened.close()


# ----------------------------------------------------------------------------------- its rules


async def test_one_live_replica_of_a_blob_in_a_tier(catalog: Catalog) -> None:
    replica = await catalog.write(add_blob(1))
    again = lambda connection: queries_blobs.insert_replica(  # noqa: E731 - one expression
        connection, f"{1:064x}", 9, 1, "ssd", "a" * 32, 99
    )
    with pytest.raises(Conflict):
        await catalog.write(again)
    await catalog.write(add_blob(1, "hdd"))
    await catalog.write(lambda connection: queries_damage.quarantine(connection, replica, "bad"))
    await catalog.write(again)


async def test_a_blob_that_a_manifest_names_cannot_be_deleted(catalog: Catalog) -> None:
    await catalog.write(add_blob(1))

    def name(connection: Connection) -> None:
        connection.execute(insert(manifests).values(manifest="m", kind=1, data=b""))
        connection.execute(insert(manifest_blobs).values(manifest="m", blob=f"{1:064x}"))

    await catalog.write(name)
    with pytest.raises(Conflict):
        await catalog.write(
            lambda connection: connection.exec_driver_sql("DELETE FROM blobs").close()
        )
    assert (
        await catalog.write(lambda connection: queries_blobs.remove_orphan(connection, f"{1:064x}"))
        == []
    )
    await catalog.write(
        lambda connection: connection.exec_driver_sql("DELETE FROM manifests").close()
    )
    gone = await catalog.write(
        lambda connection: queries_blobs.remove_orphan(connection, f"{1:064x}")
    )
    assert [ref.tier for ref in gone] == ["ssd"]
    assert await catalog.locate([f"{1:064x}"]) == {}


async def test_what_policies_keep_is_not_spare(catalog: Catalog) -> None:
    """Datasets with the policies hot and none, and a blob of nobody, each in two tiers."""
    blobs = {name: f"{number:064x}" for number, name in enumerate(("kept", "plain", "nobody"), 1)}
    for number in range(1, 4):
        for tier in ("ssd", "object"):
            await catalog.write(add_blob(number, tier))

    def name_them(connection: Connection) -> None:
        for number, name in enumerate(("kept", "plain"), 1):
            manifest = f"{number + 100:064x}"
            connection.execute(insert(manifests).values(manifest=manifest, kind=1, data=b""))
            connection.execute(insert(manifest_blobs).values(manifest=manifest, blob=blobs[name]))
            connection.execute(insert(datasets).values(name=name))
            connection.execute(
                insert(versions).values(
                    dataset=name,
                    version=1,
                    manifest=manifest,
                    num_rows=1,
                    num_bytes=9,
                    num_shards=1,
                    request=name,
                )
            )
        queries_policies.assign_policy(connection, "dataset kept", "hot")

    await catalog.write(name_them)

    def spare(default: str) -> Callable[[Connection], set[str]]:
        claim = queries_policies.Claim(frozenset({"hot"}), frozenset({"hot", "warm"}), default)
        return lambda one: {
            found.blob
            for found in queries_evict.spare_replicas(one, "ssd", ["ssd", "object"], claim=claim)
        }

    assert await catalog.read(spare("warm")) == {blobs["plain"], blobs["nobody"]}
    assert await catalog.read(spare("hot")) == {blobs["nobody"]}
    assert await catalog.read(queries_policies.unassigned_owners) == ["dataset plain"]
    (placed,) = await catalog.read(
        lambda one: queries_policies.blobs_of_owner(one, "dataset kept", "", 10)
    )
    assert (placed.blob, placed.owners, placed.has_job) == (blobs["kept"], ("dataset kept",), False)
    assert sorted(placed.tiers) == ["object", "ssd"]
    claim = queries_policies.Claim(frozenset({"hot"}), frozenset({"hot"}), "hot")
    among = ["ssd", "object"]
    with pytest.raises(Conflict, match="a policy that keeps it in tier ssd"):
        await catalog.write(
            lambda one: queries_moves.give_up_replica(
                one, blobs["kept"], "ssd", "evicted", "", among=among, claim=claim
            )
        )
    assert await catalog.write(
        lambda one: queries_moves.give_up_replica(
            one, blobs["nobody"], "ssd", "evicted", "", among=among, claim=claim
        )
    )


async def test_one_live_job_for_a_target(catalog: Catalog) -> None:
    await catalog.write(lambda connection: queries_jobs.enqueue(connection, "flush", "m"))

    def second(connection: Connection) -> None:
        connection.execute(insert(jobs).values(job="b" * 32, kind="flush", target="m"))

    with pytest.raises(Conflict):
        await catalog.write(second)


async def test_a_step_is_one_generation_of_an_attempt(catalog: Catalog) -> None:
    def add(connection: Connection) -> None:
        connection.execute(insert(generations).values(run="r", attempt=1, step=5, num_ranks=1))

    def open_run(connection: Connection) -> None:
        connection.execute(insert(runs).values(run="r"))
        connection.execute(insert(attempts).values(run="r", attempt=1, num_ranks=1, request="q"))

    with pytest.raises(Conflict):
        await catalog.write(add)  # no such attempt
    await catalog.write(open_run)
    await catalog.write(add)
    with pytest.raises(Conflict):
        await catalog.write(add)


async def test_a_job_is_leased_to_one_owner_until_the_lease_runs_out(catalog: Catalog) -> None:
    def claim(owner: str, seconds: float):
        return lambda connection: queries_jobs.claim(connection, owner, seconds, ["flush"])

    await catalog.write(lambda connection: queries_jobs.enqueue(connection, "flush", "m"))
    taken = await catalog.write(claim("a", 0.2))
    assert taken is not None
    assert await catalog.write(claim("b", 60)) is None
    async with asyncio.timeout(10):
        while (again := await catalog.write(claim("b", 60))) is None:  # noqa: ASYNC110 - a lease
            await asyncio.sleep(0.02)
    assert (again.job, again.tries) == (taken.job, 2)
    assert not await catalog.write(
        lambda connection: queries_jobs.finish(connection, taken.job, "a")
    )
    assert await catalog.write(lambda connection: queries_jobs.finish(connection, taken.job, "b"))
    assert await catalog.write(claim("c", 60)) is None


async def test_a_lease_runs_by_the_catalogs_clock(catalog: Catalog) -> None:
    def begin(connection: Connection) -> None:
        for number, seconds in enumerate((-1.0, 60.0)):
            queries_uploads.insert_upload(
                connection,
                f"{number:032x}",
                owner="o",
                uid=1,
                tier="ssd",
                file=f"{number:032x}",
                lease_seconds=seconds,
            )

    await catalog.write(begin)
    expired = await catalog.read(lambda c: queries_uploads.expired_uploads(c, 10))
    assert expired == [f"{0:032x}"]
    assert (
        await catalog.write(lambda c: queries_uploads.end_expired(c, f"{1:032x}", ["ssd"])) is None
    )
    assert (
        await catalog.write(lambda c: queries_uploads.end_expired(c, f"{0:032x}", ["ssd"]))
        is not None
    )


# --------------------------------------------------------------------------------- opening it


@pytest.mark.parametrize("url", ["mysql://nowhere", "sqlite:///", "nothing", ""])
def test_another_kind_of_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="sqlite:///PATH or postgresql://"):
        Catalog.open(url)


def test_a_newer_schema_is_refused(catalog_url: str) -> None:
    catalog = Catalog.open(catalog_url)
    catalog.write_now(put("schema_version", str(SCHEMA_VERSION + 1)))
    catalog.close()
    with pytest.raises(VersionMismatch, match="upgrade this one"):
        Catalog.open(catalog_url)


def _add_column(connection: Connection) -> None:
    connection.exec_driver_sql("ALTER TABLE nodes ADD COLUMN address TEXT NOT NULL DEFAULT ''")


NEXT = SCHEMA_VERSION + 1
STEP = Migration(NEXT, "nodes have an address", _add_column)


def test_an_older_schema_is_migrated(catalog_url: str) -> None:
    catalog = Catalog.open(catalog_url)
    catalog.write_now(put("kept", "yes"))
    catalog.close()
    migrated = Catalog.open(catalog_url, schema_version=NEXT, migrations=[STEP])
    try:
        assert migrated.read_now(get("kept")) == "yes"
        assert migrated.read_now(get("schema_version")) == str(NEXT)
        columns = "SELECT address FROM nodes"
        assert migrated.read_now(lambda c: c.exec_driver_sql(columns).all()) == []
    finally:
        migrated.close()


def test_a_failing_migration_leaves_the_old_schema(catalog_url: str) -> None:
    Catalog.open(catalog_url).close()

    def fail(connection: Connection) -> None:
        _add_column(connection)
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        Catalog.open(catalog_url, schema_version=NEXT, migrations=[Migration(NEXT, "bad", fail)])
    catalog = Catalog.open(catalog_url)
    try:
        assert catalog.read_now(get("schema_version")) == str(SCHEMA_VERSION)
    finally:
        catalog.close()


def test_a_gap_between_migrations_is_refused(catalog_url: str) -> None:
    Catalog.open(catalog_url).close()
    with pytest.raises(VersionMismatch, match="older Forebay"):
        Catalog.open(catalog_url, schema_version=NEXT + 1, migrations=[STEP])


# ------------------------------------------------------------------------------------ kill -9

WRITER = """
import sys
from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_settings import put_setting
import asyncio

async def main():
    catalog = Catalog.open(sys.argv[1], owner="writer")
    async def one(number):
        while True:
            key = f"{sys.argv[2]}-{number}"
            await catalog.write(lambda c: put_setting(c, key, "x" * (number % 900)))
            print(key, flush=True)
            number += 10
    await asyncio.gather(*(one(start) for start in range(10)))

asyncio.run(main())
"""


def test_every_answered_commit_survives_kill_9(catalog_url: str) -> None:
    acknowledged: list[str] = []
    for round_number in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, catalog_url, str(round_number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(60 + 37 * round_number)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        acknowledged += [line.strip() for line in lines if line.endswith("\n")]
        catalog = Catalog.open(catalog_url, owner="reader")
        try:
            stored = set(catalog.read_now(lambda c: c.scalars(select(settings.c.key)).all()))
        finally:
            catalog.close()
        assert set(acknowledged) <= stored


async def test_reads_beside_a_writer_never_see_half_of_a_change(catalog: Catalog) -> None:
    def move(connection: Connection) -> None:
        for key in ("left", "right"):
            put_setting(connection, key, str(int(get_setting(connection, key) or 0) + 1))

    def look(connection: Connection) -> tuple[str | None, str | None]:
        return get_setting(connection, "left"), get_setting(connection, "right")

    async def read_often() -> None:
        for _ in range(50):
            left, right = await catalog.read(look)
            assert left == right

    await asyncio.gather(read_often(), *(catalog.write(move) for _ in range(100)))
    assert await catalog.read(look) == ("100", "100")


async def test_a_thousand_writers_and_readers_agree(catalog: Catalog) -> None:
    async def write(number: int) -> None:
        await catalog.write(add_blob(number))
        found = await catalog.locate([f"{number:064x}"])
        assert len(found) == 1

    await asyncio.gather(*(write(number) for number in range(300)))
    count = select(func.count()).select_from(files)
    assert await catalog.read(lambda connection: connection.scalar(count)) == 300
