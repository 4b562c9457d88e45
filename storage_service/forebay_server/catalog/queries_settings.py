"""What the catalog remembers about itself and its node."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, insert, select, update

from forebay_server.catalog.clock import now
from forebay_server.catalog.tables import settings
from forebay_wire.ids import new_random_name

OWN_NAME: Final = "catalog"
LAST_MOMENT: Final = "last_moment_ns"
LAST_ATTEMPT: Final = "last_attempt/"
"""And the name of a run that was deleted."""


def get_setting(connection: Connection, key: str) -> str | None:
    """The value of *key*, None if it was never put."""
    value: str | None = connection.scalar(select(settings.c.value).where(settings.c.key == key))
    return value


def put_setting(connection: Connection, key: str, value: str) -> None:
    """Set *key*, whether or not it exists."""
    changed = connection.execute(update(settings).where(settings.c.key == key).values(value=value))
    if not changed.rowcount:
        connection.execute(insert(settings).values(key=key, value=value))


def own_name(connection: Connection) -> str:
    """The random name of this catalog, which a backup of it shares; made at the first call."""
    name = get_setting(connection, OWN_NAME)
    if name is None:
        name = new_random_name()
        put_setting(connection, OWN_NAME, name)
    return name


def next_moment(connection: Connection) -> int:
    """Unix nanoseconds by the catalog's clock, larger than any that it has given out before."""
    clock = int((connection.scalar(select(now())) or 0.0) * 1e9)
    moment = max(clock, _last_moment(connection) + 1)
    put_setting(connection, LAST_MOMENT, str(moment))
    return moment


def pass_moment(connection: Connection, moment: int) -> None:
    """Give out only moments after *moment* from here on."""
    put_setting(connection, LAST_MOMENT, str(max(moment, _last_moment(connection))))


def remember_attempt(connection: Connection, run: str, attempt: int) -> None:
    """*run* is deleted, and *attempt* was its newest."""
    last = max(attempt, last_deleted_attempt(connection, run))
    put_setting(connection, LAST_ATTEMPT + run, str(last))


def last_deleted_attempt(connection: Connection, run: str) -> int:
    """The newest attempt of *run* that was ever deleted with it; 0 if none was."""
    return int(get_setting(connection, LAST_ATTEMPT + run) or 0)


def _last_moment(connection: Connection) -> int:
    return int(get_setting(connection, LAST_MOMENT) or 0)
