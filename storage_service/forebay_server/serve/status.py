"""The status page: one consistent look at tiers, catalog and clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_status import Counts, count_all
from forebay_server.observe.metrics import Sample
from forebay_server.serve.open import Opener
from forebay_server.tier.memory import SlotPool
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import HEALTHY, Tier, TierSpace
from forebay_wire.errors import ForebayError


@dataclass(frozen=True)
class TierState:
    """One tier in numbers; the field names are those of the message ``TierStatus``."""

    name: str
    kind: str
    location: str
    limit_bytes: int
    used_bytes: int
    free_bytes: int
    dirty_bytes: int
    open_bytes: int
    reserved_bytes: int
    num_files: int
    health: str
    note: str
    plain_bytes: int


@dataclass(frozen=True)
class Status:
    """Everything on the page."""

    started_unix: float
    state: str
    """``starting``, ``serving`` or ``draining``."""
    tiers: tuple[TierState, ...]
    counts: Counts
    num_clients: int
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class DaemonState:
    """What only the daemon itself knows."""

    started_unix: float
    state: str
    num_clients: int
    addresses: tuple[str, ...]


class StatusReader:
    """Reads the status; used from the loop only."""

    def __init__(
        self,
        tiers: Tiers,
        catalog: Catalog,
        opener: Opener,
        read_daemon: Callable[[], DaemonState],
    ) -> None:
        self._tiers = tiers
        self._catalog = catalog
        self._opener = opener
        self._read_daemon = read_daemon

    async def read(self) -> Status:
        """The page now. A tier that fails is on it, with what is wrong."""
        object_name = self._tiers.object.name if self._tiers.object else "object"
        counts = await self._catalog.read(lambda connection: count_all(connection, object_name))
        opened = self._opener.open_bytes()
        slots = self._tiers.slots
        states = [_state(slots, slots.space(), counts, opened.get("ram", 0))]
        for tier in self._tiers.all:
            space, health = await self._measure(tier)
            note = self._tiers.why_not_remote if tier.caches_only else ""
            note = note and f"caches only, nothing becomes remote: {note}"
            states.append(_state(tier, space, counts, opened.get(tier.name, 0), health, note))
        return Status(tiers=tuple(states), counts=counts, **vars(self._read_daemon()))

    async def read_samples(self) -> Sequence[Sample]:
        """The page as values of the gauges in ``observe.metrics``."""
        return tuple(convert_samples(await self.read()))

    async def _measure(self, tier: Tier) -> tuple[TierSpace, str]:
        try:
            return await self._tiers.run(tier, tier.space), tier.health
        except ForebayError as error:
            return TierSpace(0, 0, 0, 0, 0), error.message


def _state(
    tier: Tier | SlotPool,
    space: TierSpace,
    counts: Counts,
    open_bytes: int,
    health: str = HEALTHY,
    note: str = "",
) -> TierState:
    return TierState(
        name=tier.name,
        kind=tier.kind,
        location=tier.location,
        limit_bytes=space.limit_bytes,
        used_bytes=space.used_bytes,
        free_bytes=space.free_bytes,
        dirty_bytes=counts.dirty_bytes.get(tier.name, 0),
        open_bytes=open_bytes,
        reserved_bytes=space.reserved_bytes,
        num_files=space.num_files,
        health=health,
        note=note,
        plain_bytes=counts.plain_bytes.get(tier.name, 0),
    )


def convert_samples(status: Status) -> Iterator[Sample]:
    """The gauges' values of one status page."""
    for tier in status.tiers:
        for kind in ("limit", "used", "free", "dirty", "open", "reserved"):
            value = getattr(tier, f"{kind}_bytes")
            yield Sample("forebay_tier_bytes", (tier.name, kind), value)
        yield Sample("forebay_tier_files", (tier.name,), tier.num_files)
        yield Sample("forebay_tier_healthy", (tier.name,), float(tier.health == HEALTHY))
        quarantined = status.counts.num_quarantined.get(tier.name, 0)
        yield Sample("forebay_quarantined_replicas", (tier.name,), quarantined)
    for (kind, state), number in status.counts.num_jobs.items():
        yield Sample("forebay_jobs", (kind, state), number)
    yield Sample("forebay_datasets", (), status.counts.num_datasets)
    yield Sample("forebay_runs", (), status.counts.num_runs)
    yield Sample("forebay_uploads", (), status.counts.num_uploads)
    yield Sample("forebay_below_local", (), status.counts.num_below_local)
    yield Sample("forebay_clients", (), status.num_clients)
    yield Sample("forebay_start_unix_seconds", (), status.started_unix)
