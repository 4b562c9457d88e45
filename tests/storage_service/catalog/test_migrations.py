"""A migrated catalog is the same as a new one."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, inspect

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_settings import get_setting
from forebay_server.catalog.tables import SCHEMA_VERSION, metadata

FOLDER = Path(__file__).parent


def make_schema_1(url: str) -> None:
    """A catalog as the release of schema 1 left it, with a replica and a job."""
    is_sqlite = url.startswith("sqlite")
    ddl = (FOLDER / f"schema1_{'sqlite' if is_sqlite else 'postgresql'}.sql").read_text()
    rows = """
        INSERT INTO settings (key, value) VALUES ('schema_version', '1'), ('kept', 'yes');
        INSERT INTO blobs (blob, num_bytes, num_segments, created) VALUES ('b', 9, 1, 0);
        INSERT INTO replicas (replica, blob, tier, node, encoding, state, reason, created)
            VALUES ('r', 'b', 'ssd', '', 'raw', 'live', '', 0);
        INSERT INTO jobs (job, kind, target, state, tries, done_bytes, total_bytes, error,
            not_before, created) VALUES ('j', 'flush', 'm', 'queued', 0, 0, 0, '', 0, 0);
    """
    if is_sqlite:
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            connection.executescript("PRAGMA journal_mode=WAL;" + ddl + rows)
        connection.close()
        return
    engine = plain_engine(url)
    with engine.begin() as begun:
        begun.exec_driver_sql(ddl + rows)
    engine.dispose()


def plain_engine(url: str) -> Engine:
    return create_engine(url.replace("postgresql://", "postgresql+psycopg://"))


def described(url: str) -> dict[str, Any]:
    """Every table with its columns, keys, indexes and rules, as the database itself tells it."""
    engine = plain_engine(url)
    inspector = inspect(engine)
    found = {
        name: {
            "columns": {
                column["name"]: (
                    str(column["type"]),
                    getattr(column["type"], "collation", None),
                    column["nullable"],
                    column["default"],
                )
                for column in inspector.get_columns(name)
            },
            "primary": inspector.get_pk_constraint(name)["constrained_columns"],
            "foreign": sorted(
                (
                    key["constrained_columns"],
                    key["referred_table"],
                    key["referred_columns"],
                    sorted(key["options"].items()),
                )
                for key in inspector.get_foreign_keys(name)
            ),
            "unique": sorted(key["column_names"] for key in inspector.get_unique_constraints(name)),
            "indexes": {
                str(index["name"]): (
                    index["column_names"],
                    bool(index["unique"]),
                    {key: str(rule) for key, rule in index.get("dialect_options", {}).items()},
                )
                for index in inspector.get_indexes(name)
            },
            "rules": sorted(
                (str(rule["name"]), rule["sqltext"])
                for rule in inspector.get_check_constraints(name)
            ),
        }
        for name in inspector.get_table_names()
    }
    engine.dispose()
    return found


@pytest.fixture
def fresh_url(request: pytest.FixtureRequest, catalog_url: str, tmp_path: Path) -> str:
    """A second catalog on the same engine."""
    if catalog_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path}/fresh.sqlite"
    return str(request.getfixturevalue("postgresql").new_database())


def test_a_catalog_of_schema_1_becomes_like_a_new_one(catalog_url: str, fresh_url: str) -> None:
    make_schema_1(catalog_url)
    catalog = Catalog.open(catalog_url)
    try:
        assert catalog.read_now(lambda c: get_setting(c, "schema_version")) == str(SCHEMA_VERSION)
        assert catalog.read_now(lambda c: get_setting(c, "kept")) == "yes"
        assert catalog.read_now(rows_of("SELECT verified FROM replicas")) == [(0.0,)]
        assert catalog.read_now(rows_of("SELECT priority, journal FROM jobs")) == [(0, "")]
    finally:
        catalog.close()
    Catalog.open(fresh_url).close()
    migrated, fresh = described(catalog_url), described(fresh_url)
    assert set(fresh) == set(metadata.tables)
    assert migrated == fresh


def test_the_old_rows_are_kept_before_a_migration(catalog_url: str, tmp_path: Path) -> None:
    make_schema_1(catalog_url)
    catalog = Catalog.open(catalog_url)
    statement = "SELECT value FROM {}settings WHERE key = 'schema_version'"
    try:
        if catalog_url.startswith("postgresql"):
            kept = catalog.read_now(rows_of(statement.format("forebay_backup_v1.")))
        else:
            with sqlite3.connect(tmp_path / "catalog-backup-v1.sqlite") as connection:
                kept = connection.execute(statement.format("")).fetchall()
            connection.close()
    finally:
        catalog.close()
    assert kept == [("1",)]


def rows_of(statement: str) -> Any:
    def look(connection: Connection) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]

    return look
