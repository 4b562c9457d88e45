"""Retention on a node: after each commit, at the start, and never what somebody needs."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_jobs import COLLECT, DELETE, RETAIN
from forebay_server.catalog.queries_lineage import ancestors
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_wire.errors import AlreadyExists, Conflict, InvalidRequest, NotFound
from forebay_wire.ids import GenerationId
from forebay_wire.keep import Keep
from forebay_wire.limits import KIB


@pytest.fixture
async def node(tmp_path: Path, catalog_url: str) -> AsyncIterator[CheckpointNode]:
    async with open_checkpoints(tmp_path, with_object=False, catalog_url=catalog_url) as opened:
        yield opened


async def save(node: CheckpointNode, *steps: int, attempt: int = 1, run: str = RUN, **told: Any):
    """Save and wait until each is local and retention has looked at it."""
    for step in steps:
        packs = [os.urandom(64 * KIB)]
        await node.wait(await node.save(step, packs, attempt=attempt, run=run, **told))
        await settled(node)
    return GenerationId(run, attempt, steps[-1])


async def settled(node: CheckpointNode) -> None:
    await node.settle(RETAIN)
    await node.settle(DELETE)
    await node.settle(COLLECT)


async def steps_of(node: CheckpointNode, run: str = RUN) -> list[str]:
    _, found, _ = await node.checkpoints.generations.list_generations(run, "", 0)
    return [f"{one.id.attempt}/{one.id.step}" for one in found if one.state == "committed"]


async def until(node: CheckpointNode, points: list[str]) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    while (found := await steps_of(node)) != points:
        assert asyncio.get_running_loop().time() < deadline, found
        await asyncio.sleep(0.05)


async def damage(node: CheckpointNode, generation: GenerationId) -> None:
    """Take every copy of its bytes out of service."""
    for pack in (await node.manifest(generation)).packs:
        for replica in (await node.storage.catalog.locate([pack.blob]))[pack.blob].live():
            name = replica.replica_id
            await node.storage.catalog.write(lambda c, name=name: quarantine(c, name, "a test"))


async def test_each_commit_has_the_policy_applied(node: CheckpointNode) -> None:
    await node.begin(keep=Keep(last=2, every_steps=40))
    await save(node, 10, 20, 30, 40, 50, 60)
    assert await steps_of(node) == ["1/60", "1/50", "1/40"]
    assert len(node.storage.files()) == 3


async def test_without_a_policy_everything_stays(node: CheckpointNode) -> None:
    await node.begin()
    await save(node, 1, 2, 3)
    assert await steps_of(node) == ["1/3", "1/2", "1/1"]
    with pytest.raises(InvalidRequest, match="no policy"):
        await node.retention.prune(RUN, "", is_dry=True)
    with pytest.raises(NotFound, match="no run other"):
        await node.retention.prune("other", Keep(last=1).to_json(), is_dry=True)


async def test_a_new_policy_is_applied_at_once(node: CheckpointNode) -> None:
    await node.begin()
    await save(node, 1, 2, 3)
    await node.checkpoints.managing.set_keep(RUN, Keep(last=1).to_json())
    await settled(node)
    assert await steps_of(node) == ["1/3"]


async def test_the_next_start_applies_the_policy(tmp_path: Path) -> None:
    options: dict[str, Any] = {"with_object": False}
    async with open_checkpoints(tmp_path, run_jobs=False, **options) as node:
        await node.begin(keep=Keep(last=1))
        for step in (1, 2, 3):
            await node.wait(await node.save(step, [os.urandom(KIB)]))
        assert len(await steps_of(node)) == 3
    for _ in range(2):
        async with open_checkpoints(tmp_path, **options) as node:
            await settled(node)
            assert await steps_of(node) == ["1/3"]


async def test_a_metric_that_no_generation_has_deletes_nothing(
    node: CheckpointNode, caplog: pytest.LogCaptureFixture
) -> None:
    await node.begin(keep=Keep(last=1, best="typo"))
    await save(node, 1, 2, metrics_json='{"loss": 1}')
    assert await steps_of(node) == ["1/2", "1/1"]
    assert [one for one in caplog.messages if "'typo'" in one and "loss" in one] != []
    for refused in (
        node.retention.prune(RUN, Keep(best="other").to_json(), is_dry=False),
        node.checkpoints.managing.set_keep(RUN, Keep(best="other").to_json()),
    ):
        with pytest.raises(InvalidRequest, match=r"'other'.*they have loss"):
            await refused
    await save(node, 3, metrics_json='{"typo": 1}')
    assert await steps_of(node) == ["1/3"]


async def test_a_restore_that_was_forgotten_costs_nothing(node: CheckpointNode) -> None:
    await node.begin(keep=Keep(last=2))
    await save(node, 10, 20, 30)
    await node.begin()
    await save(node, 1, attempt=2)
    assert await steps_of(node) == ["2/1", "1/30", "1/20"]


async def test_a_step_is_used_once_also_when_it_was_deleted(node: CheckpointNode) -> None:
    await node.begin(keep=Keep(last=1))
    await save(node, 1, 2, 10)
    for step in (1, 2, 10):
        with pytest.raises(AlreadyExists, match=f"step {step} was already saved"):
            await node.plan(GenerationId(RUN, 1, step), 10)
    with pytest.raises(InvalidRequest, match=r"step 5 comes after step 10 .*steps of one"):
        await node.plan(GenerationId(RUN, 1, 5), 10)
    await node.checkpoints.delete_generation_now(GenerationId(RUN, 1, 10))
    with pytest.raises(AlreadyExists, match="step 10 was already saved"):
        await node.plan(GenerationId(RUN, 1, 10), 10)
    await save(node, 11)


async def test_what_retention_took_was_local(node: CheckpointNode) -> None:
    await node.begin(keep=Keep(last=1))
    await save(node, 1, 2)
    first = GenerationId(RUN, 1, 1)
    assert (await node.wait(first)).durability == "local"
    with pytest.raises(NotFound, match=r"was local, and was deleted .*Keep\(last=1\)"):
        await node.wait(first, "remote")
    with pytest.raises(NotFound, match="no rank has begun"):
        await node.wait(GenerationId(RUN, 1, 3), timeout=0.0)


async def test_dry_run_says_what_would_go_and_why(node: CheckpointNode) -> None:
    await node.begin()
    await save(node, 1, 2, 3, metrics_json='{"m": 1}')
    await save(node, 4, metrics_json='{"m": 0.5}', tags=("good",))
    await save(node, 5)
    found = await node.retention.prune(RUN, Keep(last=1, best="m").to_json(), is_dry=True)
    said = {one.point.step: (one.is_kept, one.reasons) for one in found.verdicts}
    assert said == {
        5: (True, ("last=1", "the newest good one")),
        4: (True, ("tag good",)),
        3: (True, ("best 1 of 1 by max m",)),
        2: (False, ("no rule keeps it",)),
        1: (False, ("no rule keeps it",)),
    }
    assert found.num_deleted == 0
    assert len(await steps_of(node)) == 5
    assert (await node.retention.prune(RUN, Keep(last=1).to_json(), is_dry=False)).num_deleted == 3
    assert await steps_of(node) == ["1/5", "1/4"]


async def test_failed_and_damaged_saves_never_push_the_last_good_one_out(
    node: CheckpointNode,
) -> None:
    await node.begin(num_ranks=2, keep=Keep(last=1))
    good = await node.save(1, [os.urandom(KIB), os.urandom(KIB)])
    await node.wait(good)
    for step in (2, 3):  # one of two ranks saves, the other one never does
        grant = await node.plan(GenerationId(RUN, 1, step), 10, rank=0, num_ranks=2)
        await node.seal(grant, bytes(10))
    await node.begin((1, 1), num_ranks=1)  # aborts those
    damaged = await save(node, 5, attempt=2)
    # It was pushed out by a good one; the next is good, then damaged before the one after it.
    assert await steps_of(node) == ["2/5"]
    await damage(node, damaged)
    pruned = await node.retention.prune(RUN, Keep(last=1).to_json(), is_dry=False)
    assert pruned.num_deleted == 0
    await node.begin((2, 5))
    await save(node, 6, attempt=3)
    await damage(node, GenerationId(RUN, 3, 6))
    await save(node, 7, attempt=3)
    assert await steps_of(node) == ["3/7"]


async def test_a_damaged_newest_one_keeps_the_good_one_before_it(node: CheckpointNode) -> None:
    await node.begin()
    for step in (1, 2, 3):
        await save(node, step)
    await damage(node, GenerationId(RUN, 1, 3))
    await node.checkpoints.managing.set_keep(RUN, Keep(last=1).to_json())
    await settled(node)
    assert await steps_of(node) == ["1/3", "1/2"]


async def test_tags_and_pins_keep_until_they_are_taken_away(node: CheckpointNode) -> None:
    await node.begin(keep=Keep(last=1))
    first = await save(node, 1, tags=("good",), note_json='{"why": "it is"}')
    info = await node.checkpoints.generations.look(first)
    assert (info.tags, info.note_json) == (("good",), '{"why": "it is"}')
    second = await save(node, 2)
    await node.checkpoints.managing.pin(second, "for the paper", 0)
    await save(node, 3, 4)
    assert await steps_of(node) == ["1/4", "1/2", "1/1"]
    assert (await node.checkpoints.generations.resolve(RUN, "good", "", [], 1)).id == first
    with pytest.raises(Conflict, match=r"pinned .for the paper."):
        await node.checkpoints.delete_generation(second)
    await node.checkpoints.managing.unpin(second)
    await node.checkpoints.managing.tag(GenerationId(RUN, 1, 4), "good")
    await settled(node)
    # The generation was resolved a moment ago: its reader is left alone.
    assert await steps_of(node) == ["1/4", "1/1"]
    assert (await node.checkpoints.generations.resolve(RUN, "good", "", [], 1)).id.step == 4
    with pytest.raises(NotFound, match="no tag 'other', it has good"):
        await node.checkpoints.generations.resolve(RUN, "other", "", [], 1)


async def test_a_tag_of_a_save_that_fails_stays_where_it_was(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    await node.wait(await node.save(1, [bytes(9), bytes(9)], tags=("good",)))
    grant = await node.plan(GenerationId(RUN, 1, 2), 10, rank=0, num_ranks=2)
    await node.seal(grant, bytes(10), tags=("good",))
    await node.begin((1, 1))
    detail = await node.checkpoints.managing.detail(RUN)
    assert [(one.tag, one.step) for one in detail.tags] == [("good", 1)]


async def test_a_pin_for_a_while_ends_by_itself(node: CheckpointNode) -> None:
    await node.begin(keep=Keep(last=1))
    first = await save(node, 1)
    await node.checkpoints.managing.pin(first, "", 3600.0)
    await save(node, 2)
    assert await steps_of(node) == ["1/2", "1/1"]
    await node.checkpoints.managing.pin(first, "", 0.1)
    await until(node, ["1/2"])


async def test_a_generation_goes_when_its_time_has_come(node: CheckpointNode) -> None:
    await node.begin(keep=Keep(last=1, ttl=1.0))
    await save(node, 1, 2, 3)
    await until(node, ["1/3"])


async def test_best_needs_a_policy_that_says_what_that_is(node: CheckpointNode) -> None:
    await node.begin()
    await save(node, 1, metrics_json='{"loss": 1}')
    await save(node, 2, metrics_json='{"loss": 2}')
    await save(node, 3)
    resolve = node.checkpoints.generations.resolve
    with pytest.raises(InvalidRequest, match=r"keep=forebay\.Keep"):
        await resolve(RUN, "best", "", [], 1.0)
    keep = Keep(last=9, best="loss", mode="min").to_json()
    await node.checkpoints.managing.set_keep(RUN, keep)
    assert (await resolve(RUN, "best", "", [], 1.0)).id.step == 1


# ------------------------------------------------------------------------------------------- forks


async def test_a_fork_stands_on_its_parent_until_it_has_its_own(node: CheckpointNode) -> None:
    await node.begin(run="base", keep=Keep(last=1))
    parent = await save(node, 1, run="base")
    attempt = await node.begin(fork=parent)
    assert (attempt.parent, attempt.fork) == (None, parent)
    await save(node, 2, 3, run="base")
    assert await steps_of(node, "base") == ["1/3", "1/1"]
    resolve = node.checkpoints.generations.resolve
    assert (await resolve(RUN, "latest", "", [], 1.0)).id == parent
    for doomed in (
        node.checkpoints.delete_generation(parent),
        node.checkpoints.delete_run("base"),
        node.checkpoints.delete_run_now("base"),
    ):
        with pytest.raises(Conflict, match=r"base@1/1 is what run run was forked from"):
            await doomed
    await node.begin(fork=parent)  # it died before its first save, and restored the same again
    mine = await save(node, 5, attempt=2)
    assert (await resolve(RUN, "latest", "", [], 1.0)).id == mine
    node.checkpoints.readers._until.clear()
    await node.checkpoints.managing.set_keep("base", Keep(last=1).to_json())
    await settled(node)
    assert await steps_of(node, "base") == ["1/3"]
    assert await node.checkpoints.delete_run("base") == 1


async def test_what_a_run_stands_on_goes_on_in_its_parents(node: CheckpointNode) -> None:
    await node.begin(run="a")
    await save(node, 1, 2, 3, run="a")
    await node.begin(run="b", fork=GenerationId("a", 1, 2))
    await save(node, 7, run="b")
    await node.begin(run="c", fork=GenerationId("b", 1, 7))

    async def found(run: str, limit: int = 16) -> list[str]:
        rows = await node.storage.catalog.read(lambda c: ancestors(c, run, limit))
        assert all(len(one.manifest) == 64 for one in rows)
        return [f"{one.run}@{one.attempt}/{one.step}" for one in rows]

    assert await found("c") == ["b@1/7", "a@1/2", "a@1/1"]
    assert await found("c", 2) == ["b@1/7", "a@1/2"]
    assert await found("a") == ["a@1/3", "a@1/2", "a@1/1"]
    assert await found("nothing") == []


async def test_what_cannot_be_forked(node: CheckpointNode) -> None:
    await node.begin()
    await save(node, 1)
    with pytest.raises(InvalidRequest, match="cannot fork itself"):
        await node.begin(fork=GenerationId(RUN, 1, 1))
    with pytest.raises(NotFound, match="no committed generation other@1/1"):
        await node.begin(fork=GenerationId("other", 1, 1))
    await node.begin(run="other")
    await save(node, 1, run="other")
    with pytest.raises(Conflict, match="was not forked"):
        await node.begin(fork=GenerationId("other", 1, 1))
