"""What people said about a run, beside its manifests in the object tier: a recovery reads it there.

``runs/NAME/MOMENT`` holds a run's tags, pins, notes, policy and forks, framed and digested as
manifests are. A change is written under a new name, then the old ones go: of several the newest
that is whole counts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_managing import begun_of_run, notes_of
from forebay_server.catalog.queries_settings import next_moment
from forebay_server.locks import NamedLocks
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.manifest import KIND_RUN_NOTES, decode, encode

logger = logging.getLogger(__name__)

RUNS: Final = "runs/"


class Progress(Protocol):
    """What is needed of :class:`forebay_server.move.jobs.Progress`."""

    @property
    def target(self) -> str: ...


@dataclass(frozen=True)
class FoundNotes:
    """The notes of one run in an object tier."""

    said: Mapping[str, Any]
    begun_ns: int
    """Of the run that they are about; another one of that name began at another moment."""
    moment: int


class RunNotes:
    """Handles jobs of the kind ``notes``; the target is ``RUN NUMBER``. Idempotent."""

    def __init__(self, catalog: Catalog, tiers: Tiers, tier: Tier, locks: NamedLocks) -> None:
        """*tier* is the object tier."""
        self._catalog = catalog
        self._tiers = tiers
        self._tier = tier
        self._locks = locks

    async def __call__(self, progress: Progress) -> None:
        run = progress.target.partition(" ")[0]
        async with self._locks.hold(f"run {run}"):
            data, moment = await self._catalog.write(lambda connection: _wanted(connection, run))
            await self._tiers.run(self._tier, _store, self._tier, run, data, moment)


def _wanted(connection: Connection, run: str) -> tuple[bytes | None, int]:
    """What the object tier is to say of *run*, and the moment."""
    said, begun_ns = notes_of(connection, run), begun_of_run(connection, run)
    if said is None or begun_ns is None:  # nothing of it can be recovered
        return None, 0
    _, data = encode(KIND_RUN_NOTES, {"begun_ns": begun_ns, "said": said})
    return data, next_moment(connection)


def _store(tier: Tier, run: str, data: bytes | None, moment: int) -> None:
    old = sorted(info.name for info in tier.list(f"{RUNS}{run}/"))
    if data is not None:
        if old and _is(tier, old[-1], data):
            old.pop()
        else:
            tier.put(f"{RUNS}{run}/{moment:020d}", data)
    for name in old:
        tier.delete(name)


def _is(tier: Tier, name: str, data: bytes) -> bool:
    try:
        return tier.get(name) == data
    except NotFound:
        return False


def newest_names(names: list[str]) -> dict[str, list[str]]:
    """Run to the names of its notes, newest first."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, reverse=True):
        found.setdefault(name.removeprefix(RUNS).partition("/")[0], []).append(name)
    return found


def read_notes(tier: Tier, names: list[str]) -> FoundNotes:
    """The first of *names* (newest first) that is whole; blocks. :class:`IntegrityError` if none
    is."""
    problem: Exception | None = None
    for name in names:
        try:
            where = f"tier {tier.name}, file {name}"
            kind, payload = decode(tier.get(name), where)
            if kind != KIND_RUN_NOTES:
                raise IntegrityError(f"it is no run's notes ({where})")
            moment = int(name.rpartition("/")[2])
            return FoundNotes(payload["said"], payload["begun_ns"], moment)
        except (IntegrityError, NotFound, KeyError, ValueError) as error:
            logger.warning("notes of a run are damaged: %s", error)
            problem = error
    raise IntegrityError(f"no notes are whole: {problem}")
