"""What only the SQLite catalog does: its files, damage to them, full and failing disks, backups."""

import asyncio
import errno
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, update

from forebay_server.catalog import queries_blobs, sqlite, wal
from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.migrations import Migration
from forebay_server.catalog.queries_settings import get_setting, put_setting
from forebay_server.catalog.tables import SCHEMA_VERSION, replicas
from forebay_wire.errors import (
    AlreadyExists,
    IntegrityError,
    NotFound,
    ResourceExhausted,
    StorageError,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    opened = Catalog.open(sqlite_url(path))
    yield opened
    opened.close()


def put(key: str, value: str = "x"):
    return lambda connection: put_setting(connection, key, value)


def get(key: str):
    return lambda connection: get_setting(connection, key)


def add_blob(number: int):
    def write(connection: Connection) -> str:
        return queries_blobs.insert_replica(
            connection, f"{number:064x}", 9, 1, "ssd", f"{number:032x}", 99
        )

    return write


async def test_a_full_disk_refuses_the_change_and_the_catalog_lives(catalog: Catalog) -> None:
    await catalog.write(put("before"))

    def limit_pages(extra: int):
        def change(connection: Connection) -> None:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages + extra}").close()

        return change

    await catalog.write(limit_pages(2))
    with pytest.raises(ResourceExhausted, match="is full"):
        await catalog.write(put("big", "x" * (1 << 20)))
    assert await catalog.read(get("big")) is None
    await catalog.write(limit_pages(1 << 20))
    await catalog.write(put("big", "x" * (1 << 20)))
    assert await catalog.read(get("before")) == "x"


async def test_work_beside_a_full_disk_is_answered_with_an_error_or_kept(catalog: Catalog) -> None:
    def limit_pages(connection: Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages + 4}").close()

    await catalog.write(limit_pages)
    big = "x" * (1 << 20)
    work = [catalog.write(put(f"k{i}", big if i % 3 == 1 else "x")) for i in range(30)]
    answers = await asyncio.gather(*work, return_exceptions=True)
    for number, answer in enumerate(answers):
        stored = await catalog.read(get(f"k{number}"))
        assert (stored is not None) == (answer is None)
        assert answer is None or isinstance(answer, ResourceExhausted | StorageError)
    assert any(isinstance(answer, ResourceExhausted) for answer in answers)


def test_the_files_are_readable_for_their_owner_only(catalog: Catalog, path: Path) -> None:
    catalog.write_now(put("a"))
    found = sorted(path.parent.iterdir())
    assert [file.name for file in found] == [
        "catalog.sqlite",
        "catalog.sqlite-mark",
        "catalog.sqlite-shm",
        "catalog.sqlite-wal",
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in found} == {0o600}


def test_closing_leaves_one_file_and_its_seal(path: Path) -> None:
    catalog = Catalog.open(sqlite_url(path))
    catalog.write_now(put("a"))
    catalog.read_now(get("a"))
    catalog.close()
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["catalog.sqlite", "catalog.sqlite-seal"]


def test_a_file_that_is_no_catalog_is_refused(path: Path) -> None:
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(IntegrityError, match="damaged"):
        Catalog.open(sqlite_url(path))


def test_damage_is_found_after_an_unclean_end(path: Path) -> None:
    catalog = Catalog.open(sqlite_url(path))
    for number in range(300):
        catalog.write_now(add_blob(number))
    catalog.close()
    with path.open("r+b") as file:
        file.seek(5 * 4096)
        file.write(os.urandom(3 * 4096))
    path.with_name("catalog.sqlite-wal").write_bytes(b"left over by a crash" * 10)
    with pytest.raises(IntegrityError, match="damaged"):
        Catalog.open(sqlite_url(path))


NEXT = SCHEMA_VERSION + 1
STEP = Migration(
    NEXT,
    "nodes have an address",
    lambda connection: connection.exec_driver_sql(
        "ALTER TABLE nodes ADD COLUMN address TEXT NOT NULL DEFAULT ''"
    ).close(),
)


def test_an_older_schema_is_migrated_after_a_backup(path: Path) -> None:
    catalog = Catalog.open(sqlite_url(path))
    catalog.write_now(put("kept", "yes"))
    catalog.close()
    migrated = Catalog.open(sqlite_url(path), schema_version=NEXT, migrations=[STEP])
    try:
        assert migrated.read_now(get("kept")) == "yes"
        assert migrated.read_now(get("schema_version")) == str(NEXT)
        columns = "SELECT address FROM nodes"
        assert migrated.read_now(lambda c: c.exec_driver_sql(columns).all()) == []
    finally:
        migrated.close()
    backup = path.with_name(f"catalog-backup-v{SCHEMA_VERSION}.sqlite")
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    with sqlite3.connect(backup) as connection:
        rows = dict(connection.execute("SELECT key, value FROM settings"))
    connection.close()
    assert (rows["kept"], rows["schema_version"]) == ("yes", str(SCHEMA_VERSION))


# ------------------------------------------------------------------------------- I/O errors


def io_error(connection: Connection) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
    raise error


async def test_an_io_error_is_told_first_and_ends_all_writing(catalog: Catalog) -> None:
    order: list[str] = []
    catalog.listen_failure(lambda error: order.append("told"))
    writing = asyncio.create_task(catalog.write(io_error))
    writing.add_done_callback(lambda task: order.append("answered"))
    with pytest.raises(StorageError, match="SQLITE_IOERR_FSYNC"):
        await writing
    assert order == ["told", "answered"]
    with pytest.raises(StorageError, match="failed before"):
        await catalog.write(put("a"))


async def test_an_io_error_of_a_reader_ends_all_writing_too(catalog: Catalog) -> None:
    with pytest.raises(StorageError, match="SQLITE_IOERR_FSYNC"):
        await catalog.read(io_error)
    with pytest.raises(StorageError, match="failed before"):
        await catalog.write(put("a"))


# ---------------------------------------------------------------------------- seal and digests


def test_a_sealed_file_is_not_read_row_by_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Catalog.open(sqlite_url(path)).close()
    checked: list[Path] = []
    monkeypatch.setattr(sqlite, "check", checked.append)
    Catalog.open(sqlite_url(path)).close()
    assert checked == []
    path.with_name("catalog.sqlite-seal").write_bytes(b"{}")
    Catalog.open(sqlite_url(path)).close()
    assert checked == [path]


def test_a_changed_value_is_found_by_its_digest(path: Path) -> None:
    catalog = Catalog.open(sqlite_url(path))
    catalog.write_now(put("name", "some value of this row"))
    catalog.close()
    content = path.read_bytes()
    assert content.count(b"some value of") == 1
    path.write_bytes(content.replace(b"some value of", b"some malus of"))
    with pytest.raises(IntegrityError, match="settings: 1 rows do not match their digests"):
        Catalog.open(sqlite_url(path))


def test_digests_follow_every_change(path: Path) -> None:
    catalog = Catalog.open(sqlite_url(path))
    for number in range(20):
        catalog.write_now(add_blob(number))
    for number in range(0, 20, 2):
        catalog.write_now(lambda c, n=number: queries_blobs.remove_orphan(c, f"{n:064x}"))
    catalog.write_now(lambda c: c.execute(update(replicas).values(tier="hdd", verified=1.5)))
    catalog.close()
    sqlite.check(path)


# --------------------------------------------------------------------------------------- backup


async def test_a_backup_beside_a_writer_is_one_moment(catalog: Catalog, path: Path) -> None:
    def move(connection: Connection) -> None:
        for key in ("left", "right"):
            put_setting(connection, key, str(int(get_setting(connection, key) or 0) + 1))

    is_over = False

    async def write() -> None:
        while not is_over:
            await catalog.write(move)

    await catalog.write(move)
    writing = asyncio.create_task(write())
    targets = [path.with_name(f"backup{number}") for number in range(3)]
    for target in targets:
        await asyncio.to_thread(sqlite.back_up, path, target)
    is_over = True
    await writing
    for target in targets:
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
        restored = Catalog.open(sqlite_url(target))
        left, right = (restored.read_now(get(key)) for key in ("left", "right"))
        restored.close()
        assert left == right
        assert int(left or 0) > 0


def test_a_backup_replaces_nothing_and_leaves_nothing_half_done(path: Path) -> None:
    with pytest.raises(NotFound, match="no catalog"):
        sqlite.back_up(path, path.with_name("backup"))
    catalog = Catalog.open(sqlite_url(path))
    catalog.write_now(put("a"))
    catalog.close()
    existing = path.with_name("existing")
    existing.write_bytes(b"mine")
    with pytest.raises(AlreadyExists, match="replaces none"):
        sqlite.back_up(path, existing)
    assert existing.read_bytes() == b"mine"
    with pytest.raises(StorageError, match="cannot write the backup"):
        sqlite.back_up(path, path.parent / "no" / "such" / "folder")
    damaged = path.read_bytes().replace(b"schema_version", b"schema_wersion")
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError):
        sqlite.back_up(path, path.with_name("backup"))
    assert not list(path.parent.glob("backup*"))


async def test_a_commit_that_cannot_be_marked_is_a_failure_of_the_catalog(
    catalog: Catalog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is durable though its caller hears of an error: nobody may go on from what it thinks."""
    told: list[BaseException] = []
    catalog.listen_failure(told.append)
    await catalog.write(put("before"))
    mark = wal.mark_path(path).stat()
    write = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if os.path.samestat(os.fstat(descriptor), mark):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        await catalog.write(put("during"))
    monkeypatch.undo()
    assert len(told) == 1
    with pytest.raises(StorageError, match="failed before"):
        await catalog.read(get("during"))
