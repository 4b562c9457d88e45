"""Every row of an SQLite catalog carries a digest of its values, which triggers keep up to date.

SQLite notices a damaged page only where its structure breaks; a flipped bit inside a value it
answers as if it were true. :func:`find_damage` compares every row with its digest. The column and
the triggers exist in SQLite only: PostgreSQL's pages have checksums of their own.
"""

# ruff: noqa: S608 - the names of tables and columns are the schema's own

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final

import xxhash

COLUMN: Final = "row_digest"
FUNCTION: Final = "forebay_row"
_TRIGGERS: Final = {"insert": "INSERT", "update": "UPDATE OF {columns}"}

Value = int | float | str | bytes | None


def row_digest(table: str, *values: Value) -> int:
    """Signed 64 bits of XXH3 over a row's values, with their types and borders."""
    hasher = xxhash.xxh3_64(table.encode())
    for value in values:
        raw = value if isinstance(value, bytes) else repr(value).encode()
        hasher.update(b"%s %d:" % (type(value).__name__.encode(), len(raw)))
        hasher.update(raw)
    return hasher.intdigest() - (1 << 63)


def register(connection: sqlite3.Connection) -> None:
    """Make the function known that the triggers call; for every connection that writes."""
    connection.create_function(FUNCTION, -1, row_digest, deterministic=True)


def install(connection: sqlite3.Connection) -> None:
    """Give every table the column and its triggers, and every row its digest.

    Inside the transaction that made or changed the tables; what the rows hold is taken as right.
    """
    for table, columns in _tables(connection):
        if COLUMN not in columns:
            connection.execute(f'ALTER TABLE "{table}" ADD COLUMN {COLUMN} INTEGER')
        own = [column for column in columns if column != COLUMN]
        # The event's name comes last: no table's name can make two triggers one.
        for event, clause in _TRIGGERS.items():
            name = f'"{table}_digest_{event}"'
            listed = ", ".join(f'"{column}"' for column in own)
            connection.execute(f"DROP TRIGGER IF EXISTS {name}")
            connection.execute(
                f"CREATE TRIGGER {name} AFTER {clause.format(columns=listed)} ON"
                f' "{table}" BEGIN UPDATE "{table}" SET {COLUMN} = {_call(table, own, "NEW.")}'
                " WHERE rowid = NEW.rowid; END"
            )
        connection.execute(f'UPDATE "{table}" SET {COLUMN} = {_call(table, own)}')


def find_damage(connection: sqlite3.Connection) -> str | None:
    """The first table with a row that does not match its digest, in words; None if all do."""
    for table, columns in _tables(connection):
        if COLUMN not in columns:
            continue  # schema 1 had none; the migration that follows gives it
        own = [column for column in columns if column != COLUMN]
        try:
            (bad,) = connection.execute(
                f'SELECT count(*) FROM "{table}" WHERE {COLUMN} IS NOT {_call(table, own)}'
            ).fetchone()
        except sqlite3.OperationalError as error:
            return f"table {table}: {error}"  # a value that is no text any more
        if bad:
            return f"table {table}: {bad} rows do not match their digests"
    return None


def schema_text(connection: sqlite3.Connection) -> str:
    """Every table, index and trigger as it was declared, in order: what a flip could change."""
    rows = connection.execute(
        "SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema"
        " WHERE name NOT LIKE 'sqlite_stat%' ORDER BY type, name"
    )
    return "\n".join(" ".join(row) for row in rows)


def _tables(connection: sqlite3.Connection) -> Iterator[tuple[str, list[str]]]:
    names = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        " ORDER BY name"
    ).fetchall()
    for (name,) in names:
        yield name, [row[1] for row in connection.execute(f'PRAGMA table_info("{name}")')]


def _call(table: str, columns: list[str], prefix: str = "") -> str:
    listed = "".join(f', {prefix}"{column}"' for column in columns)
    return f"{FUNCTION}('{table}'{listed})"
