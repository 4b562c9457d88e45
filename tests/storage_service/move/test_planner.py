"""Policies become copies and moves; what is past its time goes."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from forebay_server.catalog.queries_jobs import COPY, MIGRATE, PLAN, enqueue
from forebay_server.catalog.queries_policies import store_uses
from forebay_server.model.placement import Policy
from forebay_server.move.planner import EVERYTHING, Planner
from forebay_server.move.policies import PolicyBook
from forebay_server.policy_file import all_policies, parse_policies
from forebay_server.testing.moving import MovingNode, open_moving
from forebay_wire.errors import InvalidRequest

DAY = 86400.0


class Planning:
    """A moving node whose planner runs when it is asked to, by a clock of its own."""

    def __init__(self, moving: MovingNode, book: PolicyBook) -> None:
        self.moving = moving
        self.book = book

    async def plan(self) -> None:
        """Plan once, and do all that came of it."""
        await self.moving.queue(PLAN, EVERYTHING)
        await self.moving.settle(PLAN, COPY, MIGRATE)


@asynccontextmanager
async def open_planning(
    tmp_path: Path,
    *,
    days_ahead: float = 0.0,
    own: dict[str, Policy] | None = None,
    is_open: Callable[[str], bool] = lambda blob: False,
    seconds_until_use: Callable[[str], float | None] = lambda blob: None,
) -> AsyncIterator[Planning]:
    books: list[PolicyBook] = []
    woken: list[Callable[[], object]] = []

    def more(node: Any) -> dict[str, Any]:
        books.append(PolicyBook(node.catalog, all_policies(own or {}), "default"))
        planner = Planner(
            node.catalog,
            node.tiers,
            books[0],
            is_open=is_open,
            seconds_until_use=seconds_until_use,
            wake=lambda: woken[0](),
            clock=lambda: time.time() + days_ahead * DAY,
            repeat_seconds=3600.0,
        )
        return {PLAN: planner}

    async with open_moving(tmp_path, more=more, is_open=is_open) as moving:
        woken.append(moving.jobs.wake)
        yield Planning(moving, books[0])


async def test_a_hot_dataset_comes_to_ssd_and_stays(tmp_path: Path) -> None:
    async with open_planning(tmp_path, days_ahead=1000) as planning:
        (blob,) = await planning.moving.add_dataset("d", 1000)
        await planning.plan()
        assert await planning.moving.tiers_of(blob) == ["object"]
        await planning.book.assign("dataset d", "hot")
        await planning.plan()
        await planning.plan()
        assert await planning.moving.tiers_of(blob) == ["object", "ssd"]


@pytest.mark.parametrize(("days", "tiers"), [(6.0, ["object", "ssd"]), (8.0, ["object"])])
async def test_a_warm_dataset_leaves_ssd_after_seven_unused_days(
    tmp_path: Path, days: float, tiers: list[str]
) -> None:
    async with open_planning(tmp_path, days_ahead=days) as planning:
        (blob,) = await planning.moving.add_dataset("d", 1000, tiers=("ssd", "object"))
        await planning.book.assign("d", "warm")
        await planning.plan()
        assert await planning.moving.tiers_of(blob) == tiers


async def test_a_use_starts_the_time_anew(tmp_path: Path) -> None:
    async with open_planning(tmp_path, days_ahead=8) as planning:
        used, unused = await planning.moving.add_dataset("d", 1000, 1001, tiers=("ssd", "object"))
        at = time.time() + 5 * DAY
        await planning.moving.node.catalog.write(lambda c: store_uses(c, {used: at}))
        await planning.book.assign("d", "warm")
        await planning.plan()
        assert await planning.moving.tiers_of(used) == ["object", "ssd"]
        assert await planning.moving.tiers_of(unused) == ["object"]


async def test_a_dirty_blob_goes_down_only_once_it_is_somewhere_else(tmp_path: Path) -> None:
    own = {"down": Policy("down", demote_after_seconds={"ssd": 0.0})}
    async with open_planning(tmp_path, days_ahead=1, own=own) as planning:
        (blob,) = await planning.moving.add_dataset("d", 1000, tiers=("ssd",))
        await planning.book.assign("d", "down")
        await planning.plan()
        assert await planning.moving.tiers_of(blob) == ["hdd", "ssd"]
        await planning.plan()
        assert await planning.moving.tiers_of(blob) == ["hdd"]


async def test_a_policy_says_how_a_copy_lies(tmp_path: Path) -> None:
    own = {"packed": Policy("packed", copies={"hdd": 0.0}, encoding={"hdd": "lz4"})}
    async with open_planning(tmp_path, own=own) as planning:
        node = planning.moving.node
        blob = (await node.add_blob([bytes(100_000)], "ssd")).blob_id
        await planning.moving.name_blobs("d", [(blob, 100_000)])
        await planning.book.assign("d", "packed")
        await planning.plan()
        encodings = {one.tier: one.encoding for one in (await node.locate(blob)).live()}
        assert encodings == {"ssd": "raw", "hdd": "lz4"}


async def test_what_is_open_planned_pinned_or_wanted_by_another_owner_stays(
    tmp_path: Path,
) -> None:
    open_one: list[str] = []
    planned: list[str] = []
    async with open_planning(
        tmp_path,
        days_ahead=100,
        is_open=lambda blob: blob in open_one,
        seconds_until_use=lambda blob: 5.0 if blob in planned else None,
    ) as planning:
        moving = planning.moving
        blobs = await moving.add_dataset("d", 1000, 1001, 1002, tiers=("ssd", "object"))
        (pinned,) = await moving.add_dataset("p", 1003, tiers=("ssd", "object"))
        open_one.append(blobs[0])
        planned.append(blobs[1])
        state = await moving.pins.pin("p", "ssd", 0.0, moving.jobs)
        assert state.pin
        for name in ("d", "p"):
            await planning.book.assign(name, "warm")
        await planning.plan()
        assert [len(await moving.tiers_of(blob)) for blob in blobs] == [2, 2, 1]
        assert await moving.tiers_of(pinned) == ["object", "ssd"]


async def test_an_assignment_can_be_taken_back_and_a_policy_that_is_gone_is_the_default(
    tmp_path: Path,
) -> None:
    own = {"mine": Policy("mine", land=("hdd",))}
    async with open_planning(tmp_path, own=own) as planning:
        await planning.book.assign("run r", "mine")
        assert planning.book.of("run r attempt 1 rank 0").land == ("hdd",)
        assert planning.book.of("run other attempt 1 rank 0").name == "default"
        await planning.book.assign("run r", "")
        assert planning.book.assignments() == []
        await planning.book.assign("run r", "mine")
        later = PolicyBook(planning.moving.node.catalog, all_policies({}), "default")
        await later.load()
        assert later.of("run r").name == "default"


@pytest.mark.parametrize(
    ("owner", "policy", "text"),
    [
        ("dataset d", "lukewarm", "there is no policy 'lukewarm'; the daemon has cold"),
        ("d@1", "hot", "not to dataset d@1"),
        ("r@1/2", "hot", "whole dataset or run"),
        ("a b c", "hot", "names nothing"),
    ],
)
async def test_bad_assignments_are_refused(
    tmp_path: Path, owner: str, policy: str, text: str
) -> None:
    async with open_planning(tmp_path) as planning:
        with pytest.raises(InvalidRequest, match=text):
            await planning.book.assign(owner, policy)
        assert planning.book.assignments() == []


async def test_planning_goes_on_by_itself(tmp_path: Path) -> None:
    async with open_planning(tmp_path) as planning:
        await planning.plan()
        job = await planning.moving.look(PLAN, EVERYTHING)
        assert job.state in ("done", "queued")
        await planning.moving.node.catalog.write(lambda c: enqueue(c, PLAN, EVERYTHING))


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"x": 1}, "is no table"),
        ({"x": {"lands": ["ssd"]}}, "unknown key 'lands': did you mean 'land'"),
        ({"x": {"land": "ssd"}}, "land is no list of tiers"),
        ({"x": {"land": ["ssd", "ssd"]}}, "land names a tier twice"),
        ({"x": {"land": ["tape"]}}, "no tier kind 'tape'"),
        ({"x": {"copies": {"ssd": "soon"}}}, "no number of seconds"),
        ({"x": {"demote-after-seconds": {"ssd": -1}}}, "no number of seconds"),
        ({"x": {"copies": ["ssd"]}}, "copies is no table"),
        ({"x": {"encoding": {"hdd": "zip"}}}, "no encoding 'zip'"),
        ({"x y": {}}, "policy name 'x y' is not allowed"),
        ([], "write .policies.NAME"),
    ],
)
def test_a_wrong_policy_table_is_one_clear_error(table: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        parse_policies(table, "forebay.toml")


def test_a_policy_table_is_read() -> None:
    table = {
        "mine": {
            "land": ["hdd"],
            "copies": {"ssd": 60, "object": "idle"},
            "demote_after_seconds": {"hdd": 3600},
        }
    }
    assert parse_policies(table, "forebay.toml") == {
        "mine": Policy(
            "mine",
            land=("hdd",),
            copies={"ssd": 60.0, "object": None},
            demote_after_seconds={"hdd": 3600.0},
        )
    }
