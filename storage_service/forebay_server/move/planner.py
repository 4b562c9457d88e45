"""The planning job: now and then, have what policies and grace periods ask for done.

Decisions are those of ``model/placement.py``; this turns them into copy and migrate jobs, so many
at a time that one look never floods the queue, and lets go what is past its time.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_history import prune
from forebay_server.catalog.queries_jobs import COPY, MIGRATE, enqueue
from forebay_server.catalog.queries_pins import drop_ended
from forebay_server.catalog.queries_policies import (
    PlacedBlob,
    blobs_of_owner,
    count_moves,
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
from forebay_server.move.copy import ENCODING, copy_target
from forebay_server.move.jobs import Progress
from forebay_server.move.migrate import migrate_target
from forebay_server.move.policies import PolicyBook
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import ForebayError

logger = logging.getLogger(__name__)

EVERYTHING: Final = "everything"
"""The target of the planning job."""
REPEAT_SECONDS: Final = 30.0
SOONEST_SECONDS: Final = 0.2
MAX_MOVES: Final = 256
"""Moves that wait at a time because a policy wants them."""
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
        clock: Callable[[], float] = time.time,
        repeat_seconds: float = REPEAT_SECONDS,
    ) -> None:
        """*seconds_until_use*: when a plan reads a blob; *take_uses* answers, and forgets, which
        blobs were opened when since the last time; *wake* is called when jobs were queued."""
        self._catalog = catalog
        self._tiers = tiers
        self._book = book
        self._is_open = is_open
        self._seconds_until_use = seconds_until_use
        self._take_uses = take_uses
        self._wake = wake
        self._clock = clock
        self._repeat_seconds = repeat_seconds

    async def __call__(self, progress: Progress) -> None:
        progress.repeat_after(await self._next_seconds())
        await self._catalog.write(lambda connection: _let_go(connection, progress))
        await self._book.load()
        uses = self._take_uses()
        if uses:
            await self._catalog.write(lambda connection: store_uses(connection, uses))
        for assignment in self._book.assignments():
            await self._plan(assignment.owner, progress)
        progress.repeat_after(await self._next_seconds())
        self._wake()

    async def _next_seconds(self) -> float:
        left = await self._catalog.read(seconds_until_expiry)
        soonest = self._repeat_seconds if left is None else min(left, self._repeat_seconds)
        return max(soonest, SOONEST_SECONDS)

    async def _plan(self, owner: str, progress: Progress) -> None:
        after = ""
        while True:
            room = MAX_MOVES - await self._catalog.read(count_moves)
            page = await self._catalog.read(
                functools.partial(blobs_of_owner, owner=owner, after=after, limit=PAGE)
            )
            if not page or room <= 0:
                return
            rooms = self._rooms()
            wanted = [(one, action) for one in page for action in self._decide(one, rooms)]
            await self._queue(wanted[:room], progress)
            progress.advance(0)
            after = page[-1].blob

    def _rooms(self) -> list[TierRoom]:
        rooms = []
        for tier in self._tiers.landing:
            try:
                rooms.append(TierRoom(tier.name, tier.kind, tier.space().free_bytes))
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
            num_bytes=placed.num_bytes,
            replicas=tuple(
                ReplicaFacts(tier, self._kind(tier), opened)
                for tier in placed.tiers
                if tier in known
            ),
            pinned_tiers=placed.pinned_tiers,
            planned_next_use=None if soon is None else now + soon,
        )

    def _kind(self, tier: str) -> str:
        return self._tiers.get(tier).kind

    async def _queue(self, wanted: list[tuple[PlacedBlob, Action]], progress: Progress) -> None:
        if not wanted:
            return
        now = self._clock()

        def queue(connection: Connection) -> None:
            progress.guard(connection)
            for placed, action in wanted:
                if isinstance(action, Copy):
                    priority = OVERDUE_PRIORITY if action.due <= now else 0
                    said = {ENCODING: action.encoding} if action.encoding != RAW else {}
                    target = copy_target(placed.blob, action.to)
                    enqueue(
                        connection,
                        COPY,
                        target,
                        total_bytes=placed.num_bytes,
                        priority=priority,
                        journal=json.dumps(said),
                    )
                elif (stays := _staying(placed, action)) is not None:
                    target = migrate_target(placed.blob, action.tier, stays)
                    enqueue(connection, MIGRATE, target, total_bytes=0)

        await self._catalog.write(queue)


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
