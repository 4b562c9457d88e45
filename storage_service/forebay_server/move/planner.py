"""The planning job: now and then, have what policies and grace periods ask for done.

Decisions are those of ``model/placement.py``; this turns them into copy and migrate jobs, so many
at a time that one look never floods the queue, and lets go what is past its time.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_history import prune
from forebay_server.catalog.queries_jobs import COPY, MIGRATE, enqueue
from forebay_server.catalog.queries_pins import drop_ended
from forebay_server.catalog.queries_policies import (
    Move,
    PlacedBlob,
    blobs_of_owner,
    live_moves,
    store_uses,
)
from forebay_server.catalog.queries_trash import EXPIRED, empty_trash, seconds_until_expiry
from forebay_server.model.encodings import RAW
from forebay_server.model.placement import (
    Action,
    BlobFacts,
    Copy,
    Drop,
    ReplicaFacts,
    TierRoom,
    decide,
)
from forebay_server.move.copy import ENCODING, MAKES_ROOM, copy_target
from forebay_server.move.jobs import Progress
from forebay_server.move.migrate import migrate_target
from forebay_server.move.policies import PolicyBook
from forebay_server.move.room import kind_of
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import HEALTHY, Tier
from forebay_wire.errors import ForebayError

logger = logging.getLogger(__name__)

EVERYTHING: Final = "everything"
"""The target of the planning job."""
REPEAT_SECONDS: Final = 30.0
SOONEST_SECONDS: Final = 0.2
MAX_MOVES: Final = 256
"""Copies into one tier, and removals, that wait at a time because a policy wants them."""
PAGE: Final = 200
OVERDUE_PRIORITY: Final = 5


class Planner:
    """Handles jobs of the kind ``plan``. Idempotent; belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        book: PolicyBook,
        *,
        is_open: Callable[[str], bool] = lambda blob: False,
        seconds_until_use: Callable[[str], float | None] = lambda blob: None,
        take_uses: Callable[[], Mapping[str, float]] = dict,
        wake: Callable[[], object] = lambda: None,
        room_in: Callable[[Tier], int] = lambda tier: tier.space().free_bytes,
        clock: Callable[[], float] = time.time,
        repeat_seconds: float = REPEAT_SECONDS,
    ) -> None:
        """*room_in*: bytes that may be added in a tier without taking others'; *seconds_until_use*:
        when a plan reads a blob; *take_uses* answers, and forgets, which blobs were opened when
        since the last time; *wake* is called when jobs were queued."""
        self._catalog = catalog
        self._tiers = tiers
        self._book = book
        self._is_open = is_open
        self._seconds_until_use = seconds_until_use
        self._take_uses = take_uses
        self._wake = wake
        self._room_in = room_in
        self._clock = clock
        self._repeat_seconds = repeat_seconds

    async def __call__(self, progress: Progress) -> None:
        progress.repeat_after(await self._next_seconds())
        await self._catalog.write(lambda connection: _let_go(connection, progress))
        await self._book.load()
        uses = self._take_uses()
        if uses:
            await self._catalog.write(lambda connection: store_uses(connection, uses))
        kinds = {room.kind for room in self._rooms()}
        for owner in await self._book.owners(kinds):
            await self._plan(owner, progress)
        progress.repeat_after(await self._next_seconds())
        self._wake()

    async def _next_seconds(self) -> float:
        left = await self._catalog.read(seconds_until_expiry)
        soonest = self._repeat_seconds if left is None else min(left, self._repeat_seconds)
        return max(soonest, SOONEST_SECONDS)

    async def _plan(self, owner: str, progress: Progress) -> None:
        after = ""
        while True:
            turns = _Turns(await self._catalog.read(live_moves))
            page = await self._catalog.read(
                functools.partial(blobs_of_owner, owner=owner, after=after, limit=PAGE)
            )
            rooms = self._rooms()
            if not page or turns.are_over(rooms):
                return
            wanted: list[tuple[PlacedBlob, Action]] = []
            for placed in page:
                left = [turns.left_of(room) for room in rooms]
                wanted += [
                    (placed, action)
                    for action in self._decide(placed, left)
                    if turns.take(action, placed.file_bytes)
                ]
            await self._queue(wanted, progress)
            progress.advance(0)
            after = page[-1].blob

    def _rooms(self) -> list[TierRoom]:
        rooms = []
        caches = [tier for tier in self._tiers.all if tier.caches_only]
        for tier in [*self._tiers.landing, *caches]:
            if tier.health != HEALTHY:
                continue
            try:
                rooms.append(TierRoom(tier.name, self._kind(tier.name), self._room_in(tier)))
            except ForebayError as error:  # out of service: it takes no part
                logger.info("tier %s takes no part in planning: %s", tier.name, error)
        return rooms

    def _decide(self, placed: PlacedBlob, rooms: list[TierRoom]) -> list[Action]:
        """What all policies of a blob agree on: every copy that one wants, the drops that all
        want."""
        if placed.has_job:
            return []
        facts = self._facts(placed)
        policies = {one.name: one for one in map(self._book.of, placed.owners)}
        per_policy = [decide(policy, facts, rooms) for policy in policies.values()]
        copies = {
            action.to: action
            for actions in per_policy
            for action in actions
            if isinstance(action, Copy) and action.to in {room.tier for room in rooms}
        }
        drops = [
            action
            for action in (per_policy[0] if per_policy else [])
            if isinstance(action, Drop) and all(_drops(other, action) for other in per_policy)
        ]
        kept = {kind for policy in policies.values() for kind in policy.copies}
        return [*copies.values(), *(one for one in drops if self._kind(one.tier) not in kept)]

    def _facts(self, placed: PlacedBlob) -> BlobFacts:
        now, opened = self._clock(), self._is_open(placed.blob)
        soon = self._seconds_until_use(placed.blob)
        known = {tier.name for tier in self._tiers.all}
        return BlobFacts(
            now=now,
            created=placed.created_unix,
            last_used=now if opened else placed.used_unix,
            num_bytes=placed.file_bytes,
            replicas=tuple(
                ReplicaFacts(tier, self._kind(tier), opened)
                for tier in placed.tiers
                if tier in known
            ),
            pinned_tiers=placed.pinned_tiers,
            planned_next_use=None if soon is None else now + soon,
        )

    def _kind(self, tier: str) -> str:
        return kind_of(self._tiers.get(tier))

    async def _queue(self, wanted: list[tuple[PlacedBlob, Action]], progress: Progress) -> None:
        if not wanted:
            return
        now = self._clock()

        def queue(connection: Connection) -> None:
            progress.guard(connection)
            for placed, action in wanted:
                if isinstance(action, Copy):
                    priority = OVERDUE_PRIORITY if action.due <= now else 0
                    said: dict[str, Any] = {}
                    if action.encoding != RAW:
                        said[ENCODING] = action.encoding
                    if action.makes_room:
                        said[MAKES_ROOM] = True
                    target = copy_target(placed.blob, action.to)
                    enqueue(
                        connection,
                        COPY,
                        target,
                        total_bytes=placed.file_bytes,
                        priority=priority,
                        journal=json.dumps(said),
                    )
                elif (stays := _staying(placed, action)) is not None:
                    target = migrate_target(placed.blob, action.tier, stays)
                    enqueue(connection, MIGRATE, target, total_bytes=0)

        await self._catalog.write(queue)


class _Turns:
    """What may be queued in one look: so many moves at a time, into room that none of them has."""

    def __init__(self, moves: Sequence[Move]) -> None:
        """*moves* have been queued before."""
        self._numbers = Counter(_lane(move.kind, move.tier) for move in moves)
        self._promised: Counter[str] = Counter()
        for move in moves:
            self._promised[move.tier] += move.num_bytes

    def left_of(self, room: TierRoom) -> TierRoom:
        """*room* without what those that are queued will take."""
        return replace(room, free_bytes=max(0, room.free_bytes - self._promised[room.tier]))

    def take(self, action: Action, num_bytes: int) -> bool:
        """Whether *action* may be queued; it counts then."""
        lane = _lane(COPY, action.to) if isinstance(action, Copy) else _lane(MIGRATE, "")
        if self._numbers[lane] >= MAX_MOVES:
            return False
        self._numbers[lane] += 1
        if isinstance(action, Copy) and not action.makes_room:
            self._promised[action.to] += num_bytes
        return True

    def are_over(self, rooms: Sequence[TierRoom]) -> bool:
        """Whether nothing more may be queued at all."""
        lanes = [_lane(MIGRATE, ""), *(_lane(COPY, room.tier) for room in rooms)]
        return all(self._numbers[lane] >= MAX_MOVES for lane in lanes)


def _lane(kind: str, tier: str) -> tuple[str, str]:
    """Copies that wait for room in one tier hold up neither those into others nor what gives room
    back."""
    return (kind, tier if kind == COPY else "")


def _drops(actions: list[Action], drop: Drop) -> bool:
    return any(isinstance(one, Drop) and one.tier == drop.tier for one in actions)


def _staying(placed: PlacedBlob, drop: Drop) -> str | None:
    """The tier that keeps the blob: the one furthest down."""
    order = ("object", "hdd", "ssd")
    others = [tier for tier in placed.tiers if tier != drop.tier]
    return min(others, key=lambda tier: order.index(tier) if tier in order else 9, default=None)


def _let_go(connection: Connection, progress: Progress) -> None:
    progress.guard(connection)
    empty_trash(connection, reason=EXPIRED)
    drop_ended(connection)
    prune(connection)
