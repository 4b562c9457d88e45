"""Copies that policies demand in a full tier: room is made for them, or they wait and say why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from forebay_server.ahead import Ahead
from forebay_server.catalog.queries_jobs import COPY, PIN, PLAN, SLOW_KINDS
from forebay_server.locks import NamedLocks
from forebay_server.model.placement import Policy
from forebay_server.model.watermarks import Watermarks
from forebay_server.move.budget import Budget
from forebay_server.move.jobs import Jobs
from forebay_server.move.planner import EVERYTHING
from forebay_server.movement import Movement
from forebay_server.policy_file import all_policies
from forebay_server.testing.moving import MovingNode
from forebay_server.testing.node import StorageNode
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_wire.limits import KIB

BLOB_BYTES = 64 * KIB
FILE_BYTES = BLOB_BYTES + 4096
"""With its table."""
WHOLE = Watermarks(1.0, 1.0, 1.0)


@dataclass
class Placing:
    """A node with a small ssd, its planner, and what evicts."""

    moving: MovingNode
    movement: Movement
    ahead: Ahead

    async def plan(self) -> None:
        """One look of the planner; what it queued may go on."""
        await self.moving.queue(PLAN, EVERYTHING)
        await self.moving.settle(PLAN)

    async def tiers_of(self, blobs: Sequence[str]) -> list[list[str]]:
        return [await self.moving.tiers_of(blob) for blob in blobs]

    async def until(self, is_so: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(30):
            while True:
                if await is_so():
                    return
                await asyncio.sleep(0.02)

    async def why(self, subject: str) -> str:
        return "\n".join((await self.movement.story.why(subject, 1)).because)


@asynccontextmanager
async def open_placing(
    folder: Path, num_blobs: int, *, default: str = "default", own: dict[str, Policy] | None = None
) -> AsyncIterator[Placing]:
    """A node whose ssd has room for *num_blobs* blobs."""
    limit = num_blobs * FILE_BYTES
    ssd = DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=limit, reserve_bytes=0)
    tiers = (ssd, RemoteTier("object", f"file://{folder}/object"))
    async with StorageNode(folder, tiers) as node:
        ahead = Ahead(node.tiers, node.catalog, node.opener, marks=WHOLE)
        jobs: list[Jobs] = []
        movement = Movement(
            node.catalog,
            node.tiers,
            node.opener,
            NamedLocks(),
            Budget({}),
            all_policies(own or {}),
            default,
            make_room=ahead.evictor.make_room_or_leave,
            room_in=ahead.evictor.fill_room,
            seconds_until_use=lambda blob: None,
            wake=lambda: jobs[0].wake(),
        )
        ahead.evictor.claim = movement.book.claim
        jobs.append(Jobs(node.catalog, "me", movement.handlers, slow_kinds=SLOW_KINDS))
        await movement.start(jobs[0])
        working = asyncio.create_task(jobs[0].run())
        moving = MovingNode(node, jobs[0], movement.handlers[COPY], None, movement.pins)  # type: ignore[arg-type]
        try:
            await moving.settle(PLAN)
            yield Placing(moving, movement, ahead)
        finally:
            jobs[0].stop()
            await working


async def test_the_cache_goes_for_copies_that_a_policy_demands(tmp_path: Path) -> None:
    async with open_placing(tmp_path, 4) as placing:
        cached = await placing.moving.add_dataset(
            "cached", *[BLOB_BYTES] * 4, tiers=("object", "ssd")
        )
        hot = await placing.moving.add_dataset("wanted", *[BLOB_BYTES] * 3)
        await placing.movement.book.assign("dataset wanted", "hot")
        await placing.plan()
        await placing.moving.settle(COPY)
        assert await placing.tiers_of(hot) == [["object", "ssd"]] * 3
        assert sorted(await placing.tiers_of(cached)) == [["object"]] * 3 + [["object", "ssd"]]


async def test_what_is_promised_stays_and_the_rest_waits_and_says_why(tmp_path: Path) -> None:
    async with open_placing(tmp_path, 3) as placing:
        pinned = await placing.moving.add_dataset("pinned", BLOB_BYTES, tiers=("object", "ssd"))
        await placing.movement.pins.pin("dataset pinned", "ssd", 0, placing.moving.jobs)
        await placing.moving.settle(PIN)
        cached = await placing.moving.add_dataset("cached", BLOB_BYTES, tiers=("object", "ssd"))
        hot = await placing.moving.add_dataset("hot", *[BLOB_BYTES] * 4)
        await placing.movement.book.assign("dataset hot", "hot")
        await placing.plan()

        async def are_there(number: int) -> bool:
            return (await placing.tiers_of(hot)).count(["object", "ssd"]) == number

        async def are_two_there() -> bool:
            waits = "waits for room in tier ssd" in await placing.why("hot")
            return waits and await are_there(2)

        await placing.until(are_two_there)
        assert await placing.tiers_of(cached) == [["object"]]
        assert await placing.tiers_of(pinned) == [["object", "ssd"]]
        text = await placing.why("hot")
        assert "2 blobs have no copy in ssd, which policy hot wants within 0 s" in text
        assert "pinned, kept by a policy" in text
        story = await placing.movement.story.why("hot", 1)
        assert {job.kind for job in story.jobs} == {COPY}
        # What waits comes once there is room, and a policy's copy is not taken for others.
        await placing.movement.pins.unpin("dataset pinned")
        await placing.until(lambda: are_there(3))
        assert await placing.ahead.evictor.make_room(placing.moving.node.tiers.get("ssd"), 1) == 0


async def test_copies_at_leisure_take_no_room_from_others(tmp_path: Path) -> None:
    own = {"lazy": Policy("lazy", copies={"ssd": None})}
    async with open_placing(tmp_path, 1, own=own) as placing:
        cached = await placing.moving.add_dataset("cached", BLOB_BYTES, tiers=("object", "ssd"))
        lazy = await placing.moving.add_dataset("lazy", BLOB_BYTES)
        await placing.movement.book.assign("dataset lazy", "lazy")
        await placing.plan()
        await placing.moving.settle(COPY)
        assert await placing.tiers_of([*cached, *lazy]) == [["object", "ssd"], ["object"]]
        assert "they are made where there is room, and 0 bytes are free" in await placing.why(
            "lazy"
        )
        await placing.ahead.evictor.make_room(placing.moving.node.tiers.get("ssd"), 1)
        await placing.plan()
        await placing.moving.settle(COPY)
        assert await placing.tiers_of(lazy) == [["object", "ssd"]]


async def test_what_can_never_fit_takes_nothing_away(tmp_path: Path) -> None:
    async with open_placing(tmp_path, 2) as placing:
        cached = await placing.moving.add_dataset(
            "cached", *[BLOB_BYTES] * 2, tiers=("object", "ssd")
        )
        await placing.moving.add_dataset("huge", 4 * BLOB_BYTES)
        await placing.movement.book.assign("dataset huge", "hot")
        await placing.plan()

        async def waits() -> bool:
            return "waits for room" in await placing.why("huge")

        await placing.until(waits)
        assert await placing.tiers_of(cached) == [["object", "ssd"]] * 2


async def test_the_default_policy_governs_all_that_has_no_other(tmp_path: Path) -> None:
    async with open_placing(tmp_path, 8, default="hot") as placing:
        plain = await placing.moving.add_dataset("plain", BLOB_BYTES)
        warm = await placing.moving.add_dataset("warm", BLOB_BYTES)
        await placing.movement.book.assign("dataset warm", "warm")
        await placing.plan()
        await placing.moving.settle(COPY)
        assert await placing.tiers_of([*plain, *warm]) == [["object", "ssd"], ["object"]]
        await placing.moving.node.opener.open("c", warm)

        async def has_come() -> bool:  # to the ssd, behind the opening
            return await placing.tiers_of(warm) == [["object", "ssd"]]

        await placing.until(has_come)
        ssd = placing.moving.node.tiers.get("ssd")
        placing.moving.node.opener.close_client("c")
        await placing.ahead.evictor.reload()
        await placing.ahead.evictor.make_room(ssd, 8 * FILE_BYTES)
        assert await placing.tiers_of([*plain, *warm]) == [["object", "ssd"], ["object"]]
