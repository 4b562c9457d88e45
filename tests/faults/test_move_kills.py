"""A mover that is killed or stopped at every named step: every blob stays readable, no row is left
without its file and no file without its row."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update

import forebay
from forebay_server.catalog.engine import Catalog, Connection, sqlite_url
from forebay_server.catalog.queries_blobs import blobs_in_tier, known_files, locate_blobs
from forebay_server.catalog.queries_jobs import MIGRATE, claim, enqueue
from forebay_server.catalog.queries_manifests import insert_manifest
from forebay_server.catalog.tables import jobs
from forebay_server.move.jobs import Progress, take_over_jobs
from forebay_server.move.migrate import migrate_target
from forebay_server.publish.reconcile import reconcile
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.moving import open_moving
from forebay_server.testing.warm import WarmPython
from forebay_server.tier.verify import verify_file
from forebay_wire.failpoints import MOVE, VARIABLE

MOVER = Path(__file__).with_name("move_blob.py")
Rows = Callable[[forebay.Client, str, int], None]


def queue_moves(data: Path) -> int:
    """Queue the move of every blob from ssd to hdd; the daemon is not running."""

    def queue(connection: Connection) -> int:
        found = blobs_in_tier(connection, "ssd", "", 1000)
        for blob in found:
            enqueue(connection, MIGRATE, migrate_target(blob, "ssd", "hdd"))
        return len(found)

    catalog = Catalog.open(sqlite_url(data / "catalog.sqlite"))
    try:
        return catalog.write_now(queue)
    finally:
        catalog.close()


def rows_by_tier(data: Path) -> dict[str, set[str]]:
    """Tier to the names of the files that rows name; the daemon is not running."""
    catalog = Catalog.open(sqlite_url(data / "catalog.sqlite"))
    try:
        return {
            tier: set(catalog.read_now(lambda c, t=tier: known_files(c, t)))
            for tier in ("ssd", "hdd")
        }
    finally:
        catalog.close()


def files_in(data: Path, tier: str) -> set[str]:
    return {path.name for path in (data / tier / "files").rglob("*") if path.is_file()}


def start_mover(folder: Path, blob: str, failpoints: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(MOVER), str(folder), blob],
        stdout=subprocess.PIPE,
        env={**os.environ, VARIABLE: failpoints},
    )


@pytest.mark.parametrize("point", MOVE)
async def test_a_mover_killed_anywhere_is_followed_by_one_that_finishes(
    point: str, tmp_path: Path, warm_server: WarmPython
) -> None:
    data = os.urandom(100_000)
    async with open_moving(tmp_path, run_jobs=False) as moving:
        await reconcile(moving.node.catalog, moving.node.tiers)
        blob = (await moving.node.add_blob([data], "ssd")).blob_id
        await moving.node.catalog.write(lambda c: insert_manifest(c, "0" * 64, 1, b"", [blob]))
    mover = await asyncio.to_thread(warm_server.run, [MOVER, tmp_path, blob], {VARIABLE: point})
    assert mover.returncode == -signal.SIGKILL, "the failpoint was not passed"
    async with open_moving(tmp_path, run_jobs=False) as moving:
        node = moving.node
        for replica in (await node.locate(blob)).live():
            with node.tiers.get(replica.tier).read(replica.extents[0].file) as reader:
                verify_file(reader, blob)
        # As a start of the daemon does it.
        await reconcile(node.catalog, node.tiers)
        assert await take_over_jobs(node.catalog) == 1
        taken = await node.catalog.write(lambda c: claim(c, "next-0", 60, [MIGRATE]))
        assert taken is not None
        await moving.migrator(Progress(taken, "next-0"))
        assert await moving.tiers_of(blob) == ["hdd"]
        (replica,) = (await node.locate(blob)).replicas
        assert files_in(tmp_path, "ssd") == set()
        assert files_in(tmp_path, "hdd") == {replica.extents[0].file}
        with node.tiers.get("hdd").read(replica.extents[0].file) as reader:
            verify_file(reader, blob)


def test_a_daemon_killed_amid_its_moves_finishes_them_at_its_next_start(
    tmp_path: Path,
    write_rows: Rows,
    check_rows: Rows,
    wait_until: Callable[[Callable[[], bool], str], None],
) -> None:
    daemon = DaemonProcess(tmp_path / "data", "--object-url", "none")
    try:
        daemon.start().wait_ready()
        with forebay.connect(daemon.address()["rpc"]) as client:
            write_rows(client, "rows", 1)
        daemon.terminate()
        num_blobs = queue_moves(daemon.data)
        daemon.start(environment={VARIABLE: "migrate.after_remove:2"})
        assert daemon.wait_exit() == -signal.SIGKILL, "the failpoint was not passed"
        daemon.start().wait_ready()
        with forebay.connect(daemon.address()["rpc"]) as client:
            check_rows(client, "rows", 1)

            def is_settled() -> bool:
                return not [job for job in client.status().jobs if job.kind == MIGRATE]

            wait_until(is_settled, "the moves are done")
            check_rows(client, "rows", 1)
        daemon.terminate()
        rows = rows_by_tier(daemon.data)
        assert {tier: files_in(daemon.data, tier) for tier in rows} == rows
        assert rows["ssd"] == set()
        assert len(rows["hdd"]) == num_blobs
    finally:
        daemon.kill()


async def test_a_mover_that_is_stopped_and_wakes_up_after_its_lease_takes_nothing_away(
    tmp_path: Path,
) -> None:
    async with open_moving(tmp_path, run_jobs=False) as moving:
        blob = (await moving.node.add_blob([os.urandom(1000)], "ssd")).blob_id
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    holding = os.open(fifo, os.O_RDWR)
    mover = start_mover(tmp_path, blob, f"migrate.before_remove@{fifo}")
    catalog: Catalog | None = None
    try:
        assert mover.stdout is not None
        assert await asyncio.to_thread(mover.stdout.readline) == b"claimed\n"
        catalog = Catalog.open(sqlite_url(tmp_path / "catalog.sqlite"))
        async with asyncio.timeout(60):
            while not await catalog.read(lambda c: is_copied(c, blob)):  # noqa: ASYNC110 - another process writes
                await asyncio.sleep(0.02)
        mover.send_signal(signal.SIGSTOP)
        assert await catalog.write(take_over)
        fifo.unlink()
        os.close(holding)
        mover.send_signal(signal.SIGCONT)
        output, _ = await asyncio.to_thread(mover.communicate)
        assert b"refused: the job for" in output
        located = await catalog.locate([blob])
        assert sorted(one.tier for one in located[blob].live()) == ["hdd", "ssd"]
    finally:
        mover.kill()
        mover.wait()
        if catalog is not None:
            catalog.close()
    assert [len(files_in(tmp_path, tier)) for tier in ("ssd", "hdd")] == [1, 1]


def is_copied(connection: Connection, blob: str) -> bool:
    return len(locate_blobs(connection, [blob])[blob].replicas) == 2


def take_over(connection: Connection) -> bool:
    """The lease of the mover runs out, and another one takes its job."""
    connection.execute(update(jobs).values(expires=1.0))
    return claim(connection, "other-0", 3600, [MIGRATE]) is not None
