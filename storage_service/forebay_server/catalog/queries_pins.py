"""Pins: blobs that stay in a tier, until somebody unpins them or the hold ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from forebay_server.catalog.clock import now
from forebay_server.catalog.queries_history import list_events, record
from forebay_server.catalog.tables import blobs, extents, files, pin_blobs, pins, replicas
from forebay_wire.errors import NotFound

DELETED: Final = "it was deleted"

KEEP_ENDED_SECONDS: Final = 7 * 86400.0
"""How long one can ask why a pin ended."""


@dataclass(frozen=True)
class Pin:
    """One row of the table."""

    pin: str
    target: str
    tier: str
    expires_unix: float
    """0: until it is unpinned."""
    created_unix: float
    has_ended: bool


@dataclass(frozen=True)
class PinnedBlob:
    """A blob of a pin, and whether it is where it is to be."""

    blob: str
    num_bytes: int
    num_segments: int
    is_there: bool


def insert_pin(
    connection: Connection, pin: str, target: str, tier: str, pinned: Sequence[str]
) -> None:
    """Keep *pinned* in *tier*, from here on, those that are there; without an end at first."""
    connection.execute(insert(pins).values(pin=pin, target=target, tier=tier))
    if pinned:
        connection.execute(insert(pin_blobs), [{"pin": pin, "blob": blob} for blob in pinned])
    record(connection, target, "pinned", f"{tier}: pin {pin}")


def delete_pin(connection: Connection, pin: str) -> None:
    """Forget a pin that never was: its room could not be had."""
    connection.execute(delete(pin_blobs).where(pin_blobs.c.pin == pin))
    connection.execute(delete(pins).where(pins.c.pin == pin))


def find_pin(connection: Connection, pin: str) -> Pin | None:
    row = connection.execute(_rows().where(pins.c.pin == pin)).one_or_none()
    return None if row is None else _pin(row)


def list_pins(connection: Connection, target: str = "") -> list[Pin]:
    """All pins, or those of *target*, oldest first; also those that ended lately."""
    statement = _rows().order_by(pins.c.created, pins.c.pin)
    if target:
        statement = statement.where(pins.c.target == target)
    return [_pin(row) for row in connection.execute(statement)]


def pins_of_blob(connection: Connection, blob: str) -> list[Pin]:
    """The pins that hold *blob* now."""
    held = exists().where(pin_blobs.c.pin == pins.c.pin, pin_blobs.c.blob == blob)
    return [_pin(row) for row in connection.execute(_rows().where(held, _is_live()))]


def pinned_blobs(connection: Connection, found: Pin) -> list[PinnedBlob]:
    """The blobs of a pin that still exist, in order."""
    there = exists().where(
        replicas.c.blob == blobs.c.blob,
        replicas.c.tier == found.tier,
        replicas.c.state == "live",
    )
    rows = connection.execute(
        select(blobs, there.label("is_there"))
        .join(pin_blobs, pin_blobs.c.blob == blobs.c.blob)
        .where(pin_blobs.c.pin == found.pin)
        .order_by(blobs.c.blob)
    )
    return [
        PinnedBlob(row.blob, row.num_bytes, row.num_segments, bool(row.is_there)) for row in rows
    ]


def count_pinned(connection: Connection, pin: str) -> int:
    """How many blobs it was made for."""
    statement = select(func.count()).select_from(pin_blobs).where(pin_blobs.c.pin == pin)
    return connection.scalar(statement) or 0


def set_expiry(connection: Connection, pin: str, seconds: float) -> None:
    """Let a pin end so long from now."""
    connection.execute(update(pins).where(pins.c.pin == pin).values(expires=now() + seconds))


def end_pins(connection: Connection, which: str, reason: str) -> int:
    """End the pin *which*, or those of the target *which*; how many went on until now."""
    mine = or_(pins.c.pin == which, pins.c.target == which)
    rows = connection.execute(_rows().where(mine, _is_live())).all()
    for row in rows:
        record(connection, row.target, "unpinned", f"{row.tier}: pin {row.pin}: {reason}")
    connection.execute(update(pins).where(mine, _is_live()).values(expires=now()))
    if not rows and connection.scalar(select(pins.c.pin).where(mine).limit(1)) is None:
        raise NotFound(f"there is no pin {which!r}: `forebay pins` names them")
    return len(rows)


def end_pins_of(connection: Connection, subject: str) -> int:
    """End the pins of *subject*, which is being deleted, and of all its versions; how many."""
    mine = or_(pins.c.target == subject, pins.c.target.startswith(f"{subject}@", autoescape=True))
    rows = connection.execute(_rows().where(mine, _is_live())).all()
    for row in rows:
        record(connection, row.target, "unpinned", f"{row.tier}: pin {row.pin}: {DELETED}")
    connection.execute(update(pins).where(mine, _is_live()).values(expires=now()))
    return len(rows)


def why_ended(connection: Connection, found: Pin) -> str:
    """Why a pin ended, other than by its hold: empty if by that."""
    for event in list_events(connection, [found.target], 20):
        start = f"{found.tier}: pin {found.pin}: "
        if event.event == "unpinned" and event.detail.startswith(start):
            return event.detail.removeprefix(start)
    return ""


def why_not_there(connection: Connection, blob: str, tier: str) -> str:
    """Why *blob*, which was pinned in *tier*, is not there: a sentence."""
    row = connection.execute(
        select(replicas.c.reason)
        .where(replicas.c.blob == blob, replicas.c.tier == tier, replicas.c.state == "quarantined")
        .limit(1)
    ).one_or_none()
    if row is not None:
        return f"blob {blob} in {tier} is quarantined: {row.reason}"
    for event in list_events(connection, [f"blob {blob}"], 20):
        if event.detail.startswith(tier) and event.event != "copied":
            return f"blob {blob} was {event.event} ({event.detail})"
    return f"blob {blob} is not in {tier}"


def drop_ended(connection: Connection, older_than_seconds: float = KEEP_ENDED_SECONDS) -> int:
    """Forget the pins that ended longer ago than this; how many."""
    old = select(pins.c.pin).where(pins.c.expires < now() - older_than_seconds)
    gone = list(connection.scalars(old))
    for pin in gone:
        delete_pin(connection, pin)
    return len(gone)


def held_bytes(connection: Connection, tier: str) -> tuple[int, int]:
    """``(pinned, dirty)`` bytes of *tier*: what cannot give way."""
    kept = exists().where(
        pin_blobs.c.blob == replicas.c.blob,
        pin_blobs.c.pin == pins.c.pin,
        pins.c.tier == tier,
        _is_live(),
    )
    other = replicas.alias("other")
    covered = exists().where(
        other.c.blob == replicas.c.blob,
        other.c.replica != replicas.c.replica,
        other.c.state == "live",
    )
    named = (
        select(extents.c.file)
        .select_from(replicas.join(extents))
        .where(replicas.c.tier == tier, replicas.c.state == "live")
    )
    total = select(func.coalesce(func.sum(files.c.num_bytes), 0))  # a shared file counts once
    pinned = connection.scalar(total.where(files.c.file.in_(named.where(kept)))) or 0
    dirty = connection.scalar(total.where(files.c.file.in_(named.where(~covered)))) or 0
    return int(pinned), int(dirty)


def _is_live() -> ColumnElement[bool]:
    return or_(pins.c.expires.is_(None), pins.c.expires > now())


def _rows() -> Any:
    return select(pins, _is_live().label("is_live"))


def _pin(row: Row[Any]) -> Pin:
    return Pin(row.pin, row.target, row.tier, row.expires or 0.0, row.created, not row.is_live)
