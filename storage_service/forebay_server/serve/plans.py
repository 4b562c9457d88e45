"""The plans of all loaders: who reads what, where they stand, and how long they wait."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_objects import wanted_manifest
from forebay_server.catalog.queries_origins import find_origins
from forebay_server.model.loader_times import LoaderTimes, LoaderTotals
from forebay_server.model.lookahead import OrderView, RangesView
from forebay_server.model.tracks import tracks_of
from forebay_server.model.uses import ReadOrder
from forebay_server.serve.foresight import Foresight
from forebay_wire.blocks import BlockParameters
from forebay_wire.errors import InvalidRequest, LimitExceeded, NotFound
from forebay_wire.ids import check_id, check_random_name
from forebay_wire.manifest import DatasetManifest, SelectionManifest, parse
from forebay_wire.order import check_last_batch, check_shuffle
from forebay_wire.selection import counts_of, rule_of

logger = logging.getLogger(__name__)

LEASE_SECONDS: Final = 30.0
"""A plan whose loader says nothing for this long is of a dead loader."""

LOOK_SECONDS: Final = 2.0

MAX_PLANS: Final = 4096

MAX_LOADER_CHARACTERS: Final = 200

MAX_RANGE_SAMPLES: Final = 1 << 40
"""That one range of a foreign reader is read for."""

MAX_LEARNED: Final = 1 << 14
"""First reads that a plan which is being made may have missed."""

MAX_RECENT: Final = 16
"""Waits of a plan that are remembered one by one."""


@dataclass(frozen=True)
class OrderParameters:
    """What a loader says about its order; the field names are those of the message."""

    manifest: str
    selection: str = ""
    shuffle: str = "none"
    seed: int = 0
    global_batch_size: int = 1
    last_batch: str = "keep"
    rank: int = 0
    num_ranks: int = 1
    num_epochs: int = 0
    window_blocks: int = 0
    """Of a block shuffle, like the next; 0 for the other kinds."""
    block_rows: int = 0
    lanes: int = 0
    columns: str = ""
    """Names of those that are read, as a JSON list; empty: all."""

    @property
    def column_names(self) -> list[str]:
        """InvalidRequest for what is no list of names."""
        try:
            found = json.loads(self.columns or "[]")
        except ValueError as error:
            raise InvalidRequest(f"a plan's columns are no JSON: {error}") from error
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise InvalidRequest("a plan's columns are a list of names")
        return found

    @property
    def blocks(self) -> BlockParameters | None:
        """What a block shuffle is; InvalidRequest if that is none."""
        if self.shuffle != "block" and not (self.window_blocks or self.block_rows or self.lanes):
            return None
        return BlockParameters(self.window_blocks, self.block_rows, self.lanes)


@dataclass
class Waits:
    """How long readers of a plan waited for bytes, and why, in seconds."""

    num_waits: int = 0
    tier_seconds: float = 0.0
    queue_seconds: float = 0.0
    throttle_seconds: float = 0.0
    origin_seconds: float = 0.0
    longest_seconds: float = 0.0

    def add(self, parts: Mapping[str, float]) -> None:
        """One more wait, made up of *parts*: reason ("tier", "queue", "throttle", "origin") to
        seconds."""
        self.num_waits += 1
        self.longest_seconds = max(self.longest_seconds, sum(parts.values()))
        for reason, seconds in parts.items():
            name = f"{reason}_seconds"
            setattr(self, name, getattr(self, name) + seconds)


@dataclass(frozen=True)
class Waited:
    """One wait."""

    until: float
    """When it ended, by the clock of :class:`~forebay_server.serve.foresight.Foresight`."""
    parts: Mapping[str, float]
    """Reason to seconds."""


@dataclass
class Plan:
    """One loader's plan."""

    name: str
    loader: str
    dataset: str
    """``NAME@VERSION``; empty for explicit ranges of nobody knows what."""
    uid: int
    owner: str
    """The connection whose end is the plan's; empty: it ends by its lease only."""
    num_samples: int
    """Of an epoch; 0 for explicit ranges."""
    view: OrderView | RangesView
    expires: float
    unread: set[str] = field(default_factory=set)
    """The origins among the shards whose bytes nobody knows yet."""
    epoch: int = 0
    position: int = 0
    waits: Waits = field(default_factory=Waits)
    recent: deque[Waited] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))
    rate: float = 0.0
    """Samples a second, lately."""
    advanced_at: float = 0.0
    num_bytes: int = 0
    """Of the shards that it reads in an epoch; 0 for explicit ranges of nobody knows what."""
    shards: Sequence[str] = ()
    """Of the version that explicit ranges are of, by number."""
    times: LoaderTimes | None = None
    """What its loader last told of its time."""
    times_at: float = 0.0

    def time(self, epoch: int, position: int) -> int:
        """A place in the row of epochs, or of ranges, as one number."""
        return epoch * self.num_samples + position


class Plans:
    """Belongs to the event loop. Plans live in memory: a loader registers again if need be."""

    def __init__(
        self,
        catalog: Catalog,
        foresight: Foresight,
        *,
        changed: Callable[[], object] = lambda: None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """*changed* is called whenever something else may be needed next."""
        self._catalog = catalog
        self._foresight = foresight
        self._changed = changed
        self._lease_seconds = lease_seconds
        self._plans: dict[str, Plan] = {}
        self._learned: OrderedDict[str, str] = OrderedDict()
        """Origins whose bytes were read lately, and the blobs that they make."""
        self.totals = LoaderTotals()

    def learned(self, origin: str, blob: str) -> None:
        """The bytes of *origin* were read for the first time and make *blob*: under this name they
        are stored, kept and served from now on."""
        self._learned[origin] = blob
        if len(self._learned) > MAX_LEARNED:
            self._learned.popitem(last=False)
        for plan in self._plans.values():
            _rename(plan, {origin: blob})

    def is_unread(self, shard: str) -> bool:
        """Whether some plan reads the origin *shard*, of which nobody knows the bytes."""
        return any(shard in plan.unread for plan in self._plans.values())

    @property
    def lease_seconds(self) -> float:
        return self._lease_seconds

    def clock(self) -> float:
        """The time that plans' times are of, in seconds."""
        return self._foresight.clock()

    @property
    def all(self) -> Sequence[Plan]:
        return tuple(self._plans.values())

    async def run(self) -> None:
        """Expire the plans of dead loaders, until cancelled."""
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, self._lease_seconds / 4))
            self.expire()

    # ------------------------------------------------------------------------------- requests

    async def register(
        self,
        plan: str,
        loader: str,
        order: OrderParameters | None,
        epoch: int,
        position: int,
        *,
        uid: int = 0,
        owner: str = "",
        manifest: str = "",
        plan_bytes: int = 0,
    ) -> Plan:
        """Register a plan in the place of the one of that name, if there is one; without an
        *order* one of explicit ranges, which are of the dataset version *manifest* if that is
        given, and of *plan_bytes* of it in an epoch, if that is known.

        :class:`NotFound` for a version or split that is deleted or never was,
        :class:`InvalidRequest` for parameters that make no order.
        """
        check_random_name("plan", plan)
        self._check_number("epoch", epoch)
        self._check_number("position", position)
        self._check_owner(plan, uid)
        if order is None:
            if epoch:
                raise InvalidRequest("a plan of explicit ranges has no epochs")
            made = Plan(plan, loader, "", uid, owner, 0, RangesView(position), 0.0)
            if manifest:
                self._check_number("plan_bytes", plan_bytes)
                made.num_bytes = plan_bytes
                await self._name_ranges(made, manifest)
        elif manifest:
            raise InvalidRequest("an order names its manifest itself")
        else:
            made = await self._make(plan, loader, order, epoch, position, uid, owner)
        self._check_owner(plan, uid)
        if plan not in self._plans and len(self._plans) >= MAX_PLANS:
            raise LimitExceeded(f"{MAX_PLANS} plans are registered already: end some loaders")
        before = self._plans.pop(plan, None)
        if before is not None:
            self._foresight.remove_plan(plan)
            made.waits, made.recent = before.waits, before.recent
            made.times, made.times_at = before.times, before.times_at
        made.loader = loader[:MAX_LOADER_CHARACTERS]
        made.epoch, made.position = epoch, position
        made.advanced_at = self._foresight.clock()
        self._renew(made)
        self._plans[plan] = made
        self._foresight.add_plan(plan, made.view, made.time(epoch, position))
        self._changed()
        return made

    def add_ranges(
        self,
        plan: str,
        page: int,
        turns: Sequence[tuple[int, Sequence[str]]],
        *,
        uid: int = 0,
    ) -> Plan:
        """Append a page of a plan of explicit ranges: samples, and all blobs that are read for
        them."""
        found, view = self._ranges(plan, uid)
        for count, blobs in turns:
            _check_count(count)
            for blob in blobs:
                check_id("blob", blob)
        view.add_turns(page, turns)
        self._renew(found)
        self._changed()
        return found

    def add_turns(
        self, plan: str, page: int, turns: Sequence[tuple[int, Sequence[int]]], *, uid: int = 0
    ) -> Plan:
        """Append a page of a plan of explicit ranges of a version: samples, and the numbers of all
        shards that are read for them."""
        found, view = self._ranges(plan, uid)
        named: list[tuple[int, list[str]]] = []
        for count, numbers in turns:
            _check_count(count)
            if any(not 0 <= number < len(found.shards) for number in numbers):
                raise InvalidRequest(
                    f"the plan's version has {len(found.shards)} shards, and not all of {numbers}"
                )
            named.append((count, [found.shards[number] for number in numbers]))
        view.add_turns(page, named)
        self._renew(found)
        self._changed()
        return found

    def _ranges(self, plan: str, uid: int) -> tuple[Plan, RangesView]:
        found = self._find(plan, uid)
        if not isinstance(found.view, RangesView):
            raise InvalidRequest(f"plan {plan} has an order: it takes no ranges")
        return found, found.view

    def advance(self, plan: str, epoch: int, position: int, *, uid: int = 0) -> Plan:
        """The loader has read everything before *position* of *epoch*.

        :class:`NotFound`: register again. :class:`InvalidRequest` for a position before the last
        one, which stays.
        """
        found = self._find(plan, uid)
        self._check_number("epoch", epoch)
        self._check_number("position", position)
        before, after = found.time(found.epoch, found.position), found.time(epoch, position)
        if after < before or epoch < found.epoch:
            raise InvalidRequest(
                f"plan {plan} stands at position {found.position} of epoch {found.epoch} and "
                f"cannot go back to position {position} of epoch {epoch}: to read from there, "
                "register the plan again"
            )
        self._renew(found)
        if after == before:  # the end of an epoch is the start of the next
            found.epoch, found.position = epoch, position
            return found
        now = self._foresight.clock()
        took = now - found.advanced_at
        if took > 0:
            speed = (after - before) / took
            found.rate = speed if not found.rate else 0.7 * found.rate + 0.3 * speed
        found.advanced_at = now
        found.epoch, found.position = epoch, position
        self._foresight.advance(plan, after)
        self._changed()
        return found

    def told(self, plan: str, times: LoaderTimes, *, uid: int = 0) -> None:
        """The loader of *plan* tells its sums; of an unknown plan they count in the totals."""
        self._check_owner(plan, uid)
        self.totals.add(times)
        found = self._plans.get(plan)
        if found is not None:
            found.times, found.times_at = times, self._foresight.clock()

    def capacities(self) -> dict[str, int]:
        """Local tier to bytes that it may hold, the fastest first."""
        return self._foresight.capacities()

    def end(self, plan: str, *, uid: int = 0) -> bool:
        """End a plan; whether there was one."""
        found = self._plans.get(plan)
        if found is None:
            return False
        self._check_owner(plan, uid)
        self._drop(found)
        return True

    def end_owner(self, owner: str) -> None:
        """The connection *owner* closed: its loaders are gone."""
        for plan in [plan for plan in self._plans.values() if owner and plan.owner == owner]:
            self._drop(plan)

    def waited(self, plan: str, parts: Mapping[str, float]) -> None:
        """A reader of *plan* waited; unknown plans are left out."""
        found = self._plans.get(plan)
        if found is not None:
            found.waits.add(parts)
            found.recent.append(Waited(self._foresight.clock(), parts))

    def expire(self) -> None:
        """End the plans whose lease ran out."""
        now = self._foresight.clock()
        for plan in [plan for plan in self._plans.values() if plan.expires <= now]:
            logger.info("plan %s of %s has expired", plan.name, plan.loader)
            self._drop(plan)

    # ---------------------------------------------------------------------------------- parts

    async def _make(
        self,
        plan: str,
        loader: str,
        order: OrderParameters,
        epoch: int,
        position: int,
        uid: int,
        owner: str,
    ) -> Plan:
        version = await self._read_version(order.manifest)
        rule, num_samples, counts = None, version.num_rows, None
        if order.selection:
            selection = await self._read(order.selection, "split")
            if not isinstance(selection, SelectionManifest):
                raise InvalidRequest(f"manifest {order.selection} is not that of a split")
            if selection.dataset_manifest != order.manifest:
                raise InvalidRequest(
                    f"split {selection.name!r} is one of {selection.dataset} version "
                    f"{selection.version}, not of {version.dataset} version {version.version}"
                )
            rule = rule_of(selection)
            counts = counts_of(rule)
            num_samples = selection.num_rows
        if position > num_samples:
            raise InvalidRequest(
                f"position {position} is outside an epoch of {num_samples} samples"
            )
        reading = ReadOrder(
            manifest=order.manifest,
            identity=f"{order.manifest}/{order.selection}",
            num_samples=num_samples,
            num_version_rows=version.num_rows,
            selection=rule,
            shuffle=check_shuffle(order.shuffle),
            seed=order.seed,
            global_batch_size=order.global_batch_size,
            last_batch=check_last_batch(order.last_batch),
            rank=order.rank,
            num_ranks=order.num_ranks,
            num_epochs=order.num_epochs,
            blocks=order.blocks,
        )
        shards = list(version.every_shard())
        tracks = tracks_of(version, order.column_names)
        view = OrderView(
            reading,
            [shard.blob for shard in shards],
            [shard.num_rows for shard in version.shards],
            reading.time(epoch, position),
            tracks,
        )
        made = Plan(plan, loader, "", uid, owner, num_samples, view, 0.0)
        read = tracks.shards(len(version.shards), counts)
        made.num_bytes = sum(shards[number].num_bytes for number in read)
        await self._name(made, version)
        return made

    async def _name_ranges(self, made: Plan, manifest: str) -> None:
        version = await self._read_version(manifest)
        made.shards = [shard.blob for shard in version.every_shard()]
        await self._name(made, version)

    async def _name(self, made: Plan, version: DatasetManifest) -> None:
        """Say that *made* reads *version*, whose origins it knows by their blobs, if there are."""
        made.num_bytes = made.num_bytes or version.num_bytes
        made.dataset = f"{version.dataset}@{version.version}"
        origins = [shard.blob for shard in version.shards if shard.origin is not None]
        known = await self._catalog.read(lambda one: find_origins(one, origins)) if origins else {}
        made.unread = set(origins)
        blobs = {origin: row.blob for origin, row in known.items() if row.blob}
        _rename(
            made, {**blobs, **{one: self._learned[one] for one in origins if one in self._learned}}
        )

    async def _read_version(self, manifest: str) -> DatasetManifest:
        version = await self._read(manifest, "dataset version")
        if not isinstance(version, DatasetManifest):
            raise InvalidRequest(f"manifest {manifest} is not that of a dataset version")
        return version

    async def _read(self, manifest: str, what: str) -> object:
        check_id("manifest", manifest)
        record = await self._catalog.read(lambda connection: wanted_manifest(connection, manifest))
        if record is None:
            raise NotFound(
                f"there is no {what} with manifest {manifest}: it was deleted, or never "
                "committed; open the dataset again"
            )
        return await asyncio.to_thread(parse, record.data, f"{what} of a plan", manifest)

    def _find(self, plan: str, uid: int) -> Plan:
        found = self._plans.get(plan)
        if found is None:
            raise NotFound(
                f"plan {plan} is not known (any more): its lease ran out, it was ended, or the "
                "daemon was restarted; register it again"
            )
        self._check_owner(plan, uid)
        return found

    def _check_owner(self, plan: str, uid: int) -> None:
        found = self._plans.get(plan)
        if found is not None and found.uid != uid and uid != 0:
            raise InvalidRequest(f"plan {plan} is another user's: choose another random name")

    @staticmethod
    def _check_number(name: str, value: int) -> None:
        if type(value) is not int or not 0 <= value < 1 << 62:
            raise InvalidRequest(f"{name} {value!r} is no number from 0 to 2^62")

    def _renew(self, plan: Plan) -> None:
        plan.expires = self._foresight.clock() + self._lease_seconds

    def _drop(self, plan: Plan) -> None:
        del self._plans[plan.name]
        self._foresight.remove_plan(plan.name)
        self._changed()


def _check_count(count: int) -> None:
    if not 0 < count <= MAX_RANGE_SAMPLES:
        raise InvalidRequest(f"a range is read for 1 to 2^40 samples, not for {count}")


def _rename(plan: Plan, blobs: Mapping[str, str]) -> None:
    """Have *plan* know its origins by the blobs that their bytes make."""
    for origin, blob in blobs.items():
        if origin in plan.unread:
            plan.unread.discard(origin)
            plan.view.rename(origin, blob)
