"""Attempts, lineage and what a restart leaves of them."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_server.catalog.queries_jobs import COLLECT
from forebay_server.model.lineage import Point
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_wire.errors import (
    Conflict,
    Fenced,
    InvalidRequest,
    NotFound,
)
from forebay_wire.ids import GenerationId
from forebay_wire.limits import KIB, MIB


@pytest.fixture
async def node(tmp_path: Path, catalog_url: str) -> AsyncIterator[CheckpointNode]:
    async with open_checkpoints(tmp_path, with_object=False, catalog_url=catalog_url) as opened:
        yield opened


def random_packs(num_ranks: int, num_bytes: int = 200 * KIB) -> list[bytes]:
    return [os.urandom(num_bytes + rank) for rank in range(num_ranks)]


async def test_attempts_count_and_a_request_opens_one(node: CheckpointNode) -> None:
    first = await node.checkpoints.begin_attempt(RUN, None, 1, "a")
    again = await node.checkpoints.begin_attempt(RUN, None, 1, "a")
    second = await node.checkpoints.begin_attempt(RUN, None, 1, "b")
    assert first == again
    assert (first.attempt, second.attempt) == (1, 2)
    with pytest.raises(Conflict):
        await node.checkpoints.begin_attempt("other", None, 1, "a")


async def test_a_parent_has_to_be_committed(node: CheckpointNode) -> None:
    with pytest.raises(NotFound):
        await node.begin((1, 5))
    await node.begin()
    await node.plan(GenerationId(RUN, 1, 5), 10)
    with pytest.raises(NotFound, match="no committed generation 1/5"):
        await node.begin((1, 5))


async def test_a_new_attempt_fences_the_old_one_off(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    await node.wait(await node.save(1, random_packs(2)))
    generation = GenerationId(RUN, 1, 2)
    first = await node.plan(generation, 10, rank=0, num_ranks=2)
    second = await node.plan(generation, 10, rank=1, num_ranks=2)
    await node.seal(first, bytes(10))
    waiting = asyncio.create_task(node.wait(generation))
    await asyncio.sleep(0)
    opened = await node.begin((1, 1), num_ranks=2)
    assert (opened.attempt, opened.parent) == (2, Point(1, 1))
    with pytest.raises(Fenced, match="attempt 2 of the run began"):
        await waiting
    with pytest.raises((Fenced, NotFound)):
        await node.seal(second, bytes(10))
    with pytest.raises(Fenced, match="attempt 2 began after it"):
        await node.plan(GenerationId(RUN, 1, 3), 10, num_ranks=2)
    async with asyncio.timeout(10):  # the sealed pack may land, and is collected then
        while len(node.storage.files()) != 2:  # the committed generation's
            await node.settle(COLLECT)
            await asyncio.sleep(0.01)


async def test_what_all_ranks_sealed_lands_in_spite_of_a_new_attempt(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    packs = random_packs(2, 8 * MIB)
    sealed = await node.save(1, packs)
    await node.begin(num_ranks=2)
    await node.wait(sealed)
    assert await node.restore(sealed) == packs


# ------------------------------------------------------------------------------------------- latest


async def test_latest_follows_the_newest_attempt(node: CheckpointNode) -> None:
    await node.begin()
    for step in (10, 20, 30):
        await node.wait(await node.save(step, random_packs(1)))
    assert await node.latest() == "1/30"
    await node.begin((1, 10))
    assert await node.latest() == "1/10"
    await node.wait(await node.save(20, random_packs(1), attempt=2))
    assert await node.latest() == "2/20"
    assert await node.latest(skip=("2/20",)) == "1/10"
    resolve = node.checkpoints.generations.resolve
    assert (await resolve(RUN, "20", "", [], 1.0)).id == GenerationId(RUN, 2, 20)
    assert (await resolve(RUN, "1/30", "", [], 1.0)).id == GenerationId(RUN, 1, 30)
    with pytest.raises(NotFound, match="1/30"):
        await resolve(RUN, "30", "", [], 1.0)
    with pytest.raises(NotFound, match="2 were skipped"):
        await node.latest(skip=("2/20", "1/10"))
    with pytest.raises(NotFound, match=r"no tag 'newest'.*ATTEMPT/STEP"):
        await resolve(RUN, "newest", "", [], 1.0)
    with pytest.raises(InvalidRequest, match="ATTEMPT/STEP"):
        await resolve(RUN, "2:20", "", [], 1.0)


async def test_latest_waits_for_what_is_sealed_and_landing(node: CheckpointNode) -> None:
    await node.begin()
    await node.wait(await node.save(1, random_packs(1)))
    await node.save(2, [os.urandom(30 * MIB)])
    assert await node.latest() == "1/2"


async def test_latest_of_nothing(node: CheckpointNode) -> None:
    with pytest.raises(NotFound, match="there is no run run"):
        await node.latest()
    await node.begin()
    with pytest.raises(NotFound, match="no committed generation"):
        await node.latest()
    await node.wait(await node.save(1, random_packs(1)))
    await node.begin()  # without a parent: a fresh start
    with pytest.raises(NotFound, match="1/1"):
        await node.latest()
    with pytest.raises(NotFound, match="remote"):
        await node.latest(durability="remote")
    with pytest.raises(NotFound, match="1/1"):
        await node.latest(durability="ram")


async def test_waiting_for_what_does_not_exist(node: CheckpointNode) -> None:
    with pytest.raises(NotFound, match="no rank has begun to save it"):
        await node.wait(GenerationId(RUN, 1, 1))
    with pytest.raises(InvalidRequest, match="unknown"):
        await node.wait(GenerationId(RUN, 1, 1), "eternal")
    for asked in (
        node.wait(GenerationId(RUN, 1, 1), "replicated"),
        node.latest(durability="replicated"),
    ):
        with pytest.raises(InvalidRequest, match="not configured: it needs a second node"):
            await asked


# ------------------------------------------------------------------------------- restart, listing


async def test_a_restart_aborts_what_had_not_landed_and_keeps_the_rest(tmp_path: Path) -> None:
    packs = random_packs(2)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin(num_ranks=2)
        saved = await node.save(1, packs)
        await node.wait(saved)
        half = GenerationId(RUN, 1, 2)
        grant = await node.plan(half, 10, rank=0, num_ranks=2)
        await node.seal(grant, os.urandom(10))
    async with open_checkpoints(tmp_path, with_object=False) as node:
        assert await node.latest() == "1/1"
        assert await node.restore(saved) == packs
        with pytest.raises(Conflict, match="the daemon ended before it was local"):
            await node.wait(half)
        await node.settle(COLLECT)
        assert len(node.storage.files()) == 2
        await node.begin((1, 1), num_ranks=2)
        again = await node.save(2, packs, attempt=2)
        await node.wait(again)
        assert await node.latest() == "2/2"


async def test_any_rank_reopens_what_the_daemons_end_aborted_and_each_brings_its_pack_anew(
    tmp_path: Path,
) -> None:
    packs = random_packs(2)
    half = GenerationId(RUN, 1, 1)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin(num_ranks=2)
        await node.seal(await node.plan(half, 10, rank=0, num_ranks=2), os.urandom(10))
    async with open_checkpoints(tmp_path, with_object=False) as node:
        with pytest.raises(Conflict, match="was begun with 2 ranks"):
            await node.plan(half, 10, rank=1, num_ranks=3)
        for rank in (1, 0):
            grant = await node.plan(half, len(packs[rank]), rank=rank, num_ranks=2)
            await node.seal(grant, packs[rank])
        await node.wait(half)
        assert await node.restore(half) == packs


async def test_what_a_newer_attempt_aborted_stays_aborted(tmp_path: Path) -> None:
    half = GenerationId(RUN, 1, 1)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin(num_ranks=2)
        await node.plan(half, 10, rank=0, num_ranks=2)
        await node.begin(num_ranks=2)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        with pytest.raises(Fenced):
            await node.plan(half, 10, rank=0, num_ranks=2)
        assert (await node.checkpoints.generations.look(half)).state == "aborted"


async def test_runs_and_generations_are_listed_in_pages(node: CheckpointNode) -> None:
    for run in ("a", "b", "c"):
        await node.begin(run=run)
        for step in (1, 2, 3):
            await node.wait(await node.save(step, random_packs(1, 100), run=run))
    generations = node.checkpoints.generations
    first, after = await generations.list_runs("", 2)
    second, end = await generations.list_runs(after, 2)
    assert [run.run for run in [*first, *second]] == ["a", "b", "c"]
    assert end == ""
    assert first[0].num_generations == 3
    assert first[0].num_bytes == 300
    assert first[0].latest is not None
    assert first[0].latest.id == GenerationId("a", 1, 3)
    _, page, after = await generations.list_generations("a", "", 2)
    _, rest, end = await generations.list_generations("a", after, 2)
    assert [info.id.step for info in [*page, *rest]] == [3, 2, 1]
    assert end == ""
    with pytest.raises(NotFound):
        await generations.list_generations("unknown", "", 0)
