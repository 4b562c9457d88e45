"""Puts together what moves bytes: copies, moves, pins, the trash, policies and their planning."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from forebay_server.catalog.engine import Catalog
from forebay_server.catalog.queries_jobs import COPY, MIGRATE, PIN, PLAN, TOMBSTONE, enqueue
from forebay_server.locks import NamedLocks
from forebay_server.model.placement import Policy
from forebay_server.move.budget import Budget
from forebay_server.move.copy import Copier
from forebay_server.move.jobs import Handler, Jobs
from forebay_server.move.migrate import Migrator
from forebay_server.move.pins import Pins
from forebay_server.move.planner import EVERYTHING, Planner
from forebay_server.move.policies import Assignment, PolicyBook
from forebay_server.move.room import MakeRoom, RoomMaker
from forebay_server.move.trash import Tombstones, Trash
from forebay_server.move.why import Story
from forebay_server.serve.open import Opener
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import Tier


class Movement:
    """Belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        opener: Opener,
        locks: NamedLocks,
        budget: Budget,
        policies: Mapping[str, Policy],
        default_policy: str,
        *,
        make_room: MakeRoom,
        room_in: Callable[[Tier], int],
        seconds_until_use: Callable[[str], float | None],
        wake: Callable[[], object],
        left: Callable[[str, str], object] = lambda tier, blob: None,
    ) -> None:
        """*locks* are shared with whoever publishes and collects; *make_room* evicts; *room_in*:
        bytes that may be added in a tier without taking others'; *wake* is
        called when jobs were queued; *left* is told tier and id of a blob that moved away."""

        def moved(tier: str, blob: str) -> None:
            opener.forget(blob)
            left(tier, blob)

        self._catalog = catalog
        self.book = PolicyBook(catalog, policies, default_policy)
        self.story = Story(catalog, tiers, self.book.find, seconds_until_use)
        room = RoomMaker(tiers, make_room, room_in)
        copier = Copier(opener.bringer, budget, locks, room.ensure)
        self.pins = Pins(catalog, tiers, opener.bringer, copier, make_room=make_room)
        planner = Planner(
            catalog,
            tiers,
            self.book,
            is_open=opener.is_open,
            seconds_until_use=seconds_until_use,
            take_uses=opener.take_uses,
            wake=wake,
            room_in=room.left_in,
        )
        self.handlers: dict[str, Handler] = {
            COPY: copier,
            MIGRATE: Migrator(catalog, tiers, copier, locks, is_open=opener.is_open, moved=moved),
            PIN: self.pins.fetch,
            PLAN: planner,
            TOMBSTONE: Tombstones(catalog, tiers, locks),
        }

    async def start(self, jobs: Jobs) -> None:
        """Read what is assigned, and begin to plan."""
        self.jobs = jobs
        self.trash = Trash(self._catalog, jobs)
        await self.book.load()
        await self._look()

    async def assign(self, owner: str, policy: str) -> Assignment:
        """:meth:`PolicyBook.assign`, and have what that asks for done."""
        made = await self.book.assign(owner, policy)
        await self._look()
        return made

    async def _look(self) -> None:
        """Plan now."""
        await self._catalog.write(lambda connection: enqueue(connection, PLAN, EVERYTHING))
        self.jobs.wake()

    def landing_order(self, owner: str) -> tuple[str, ...]:
        """The kinds of tiers where the bytes of *owner* (``dataset NAME``, ``run NAME …``) land,
        best first."""
        return self.book.of(owner).land
