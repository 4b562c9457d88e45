"""Brings the database to this build's schema, or refuses one that a newer build wrote."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, inspect, select, update
from sqlalchemy import insert as insert_into

from forebay_server.catalog.database import Database
from forebay_server.catalog.migrations import MIGRATIONS, Migration
from forebay_server.catalog.tables import SCHEMA_VERSION, metadata, settings
from forebay_wire.errors import IntegrityError, VersionMismatch

VERSION_KEY = "schema_version"


def stored_version(connection: Connection) -> int:
    """The schema's number in the database; 0 where nothing has been created."""
    if not inspect(connection).has_table(settings.name):
        return 0
    found = connection.scalar(select(settings.c.value).where(settings.c.key == VERSION_KEY))
    if found is None or not found.isdigit():
        raise IntegrityError(
            f"the catalog has no readable {VERSION_KEY} in its settings: it is not Forebay's, or "
            "damaged; restore a backup of it"
        )
    return int(found)


def prepare(
    connection: Connection,
    database: Database,
    *,
    target: int = SCHEMA_VERSION,
    migrations: Sequence[Migration] = MIGRATIONS,
) -> None:
    """Create the schema, or migrate it to *target* after a backup.

    All steps and the new number are one transaction: a failing step leaves the old schema. Raises
    :class:`VersionMismatch` for a newer schema. *connection* has no transaction open.
    """
    with connection.begin():
        database.enter(connection)
        found = stored_version(connection)
        if found == 0:
            metadata.create_all(connection)
            connection.execute(insert_into(settings).values(key=VERSION_KEY, value=str(target)))
            database.finish_schema(connection)
            return
    steps = _steps(found, target, migrations)
    if not steps:
        return
    database.back_up(connection, found)
    with connection.begin():
        database.enter(connection)
        if stored_version(connection) != found:
            return  # another process has migrated it meanwhile
        for step in steps:
            step.apply(connection)
        connection.execute(
            update(settings).where(settings.c.key == VERSION_KEY).values(value=str(target))
        )
        database.finish_schema(connection)


def _steps(found: int, target: int, migrations: Sequence[Migration]) -> list[Migration]:
    """What brings schema *found* to *target*; :class:`VersionMismatch` if nothing can."""
    if found > target:
        raise VersionMismatch(
            f"the catalog has schema {found}, this daemon knows up to {target}: a newer Forebay "
            "wrote it; upgrade this one (pip install -U 'forebay[server]') or restore the backup "
            f"of schema {target} that the newer one made"
        )
    steps = [step for step in migrations if found < step.number <= target]
    if [step.number for step in steps] != list(range(found + 1, target + 1)):
        raise VersionMismatch(
            f"the catalog has schema {found} and this daemon cannot bring it to {target}: start an "
            "older Forebay on it once, which migrates it part of the way"
        )
    return steps
