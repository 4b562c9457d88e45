"""No flipped bit in a catalog file gives a wrong answer: it is found, or it changes nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select

from forebay_server.catalog import queries_blobs, queries_jobs
from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.queries_settings import put_setting
from forebay_server.catalog.tables import attempts, datasets, manifests, metadata, runs, versions
from forebay_wire.errors import ForebayError

NUM_FLIPS = 120
"""Spread over the file, each in another bit of its byte."""


def fill(connection: Connection) -> None:
    """A few rows of what matters most, long enough for overflow pages."""
    for number in range(20):
        queries_blobs.insert_replica(
            connection, f"{number:064x}", 1000 + number, 1, "ssd", f"{number:032x}", 2000 + number
        )
        queries_jobs.enqueue(connection, "flush", f"{number:064x}")
    connection.execute(insert(datasets).values(name="d"))
    connection.execute(insert(runs).values(run="r"))
    for number in range(1, 6):
        manifest = f"{number:064x}"
        connection.execute(
            insert(manifests).values(manifest=manifest, kind=1, data=bytes(range(256)) * 30)
        )
        connection.execute(
            insert(versions).values(
                dataset="d",
                version=number,
                manifest=manifest,
                num_rows=number * 7,
                num_bytes=number * 9,
                num_shards=number,
                request=f"{number}",
            )
        )
        connection.execute(
            insert(attempts).values(
                run="r",
                attempt=number,
                parent_attempt=number - 1,
                parent_step=number * 11,
                num_ranks=1,
                request=f"{number}",
            )
        )
    put_setting(connection, "kept", "yes")


def all_rows(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
    return {
        table.name: sorted(map(tuple, connection.execute(select(table)).all()), key=repr)
        for table in metadata.sorted_tables
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "catalog.sqlite"
    catalog = Catalog.open(sqlite_url(path))
    catalog.write_now(fill)
    catalog.close()
    return path


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (old,) = file.read(1)
        file.seek(position)
        file.write(bytes([old ^ (1 << bit)]))


def answer(path: Path) -> object:
    """All rows, or the error that says why not."""
    try:
        catalog = Catalog.open(sqlite_url(path))
        try:
            return catalog.read_now(all_rows)
        finally:
            catalog.close()
    except ForebayError as error:
        return error


def test_a_flipped_bit_is_found_or_changes_nothing(pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    shutil.copy(pristine, path)
    right = answer(path)
    assert isinstance(right, dict)
    num_bytes = pristine.stat().st_size
    num_found = 0
    for number in range(NUM_FLIPS):
        position = number * num_bytes // NUM_FLIPS + number % 7
        for left in tmp_path.iterdir():
            left.unlink()
        shutil.copy(pristine, path)
        flip(path, position, number % 8)
        found = answer(path)
        assert isinstance(found, ForebayError) or found == right, f"byte {position}"
        num_found += isinstance(found, ForebayError)
    # The others lie in space that no row uses.
    assert num_found > NUM_FLIPS / 5
