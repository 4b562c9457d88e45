"""What the catalog remembers about itself and its node."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from forebay_server.catalog.tables import settings


def get_setting(connection: Connection, key: str) -> str | None:
    """The value of *key*, None if it was never put."""
    value: str | None = connection.scalar(select(settings.c.value).where(settings.c.key == key))
    return value


def put_setting(connection: Connection, key: str, value: str) -> None:
    """Set *key*, whether or not it exists."""
    changed = connection.execute(update(settings).where(settings.c.key == key).values(value=value))
    if not changed.rowcount:
        connection.execute(insert(settings).values(key=key, value=value))
