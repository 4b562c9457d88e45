"""Ranks that ask how to save wait for each other, and not for ever."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_server.catalog.queries_checkpoints import PackPlan
from forebay_server.model.save_rounds import Ask, Verdict
from forebay_server.publish.checkpoint import SaveAsk
from forebay_server.publish.verdicts import MAX_ATTEMPTS, SaveVerdicts
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.storage import UID
from forebay_wire.errors import AlreadyExists, Conflict, Fenced
from forebay_wire.ids import GenerationId

SECONDS = 30.0
ATTEMPT = ("run", 1)


async def all_ask(verdicts: SaveVerdicts, number: int, *asks: Ask) -> list[Verdict]:
    async with asyncio.timeout(SECONDS):
        rulings = await asyncio.gather(
            *(verdicts.ask(ATTEMPT, len(asks), rank, number, ask) for rank, ask in enumerate(asks))
        )
    return [ruling.verdict for ruling in rulings]


async def test_all_are_answered_when_the_last_one_asks() -> None:
    verdicts = SaveVerdicts(SECONDS * 10)
    assert await all_ask(verdicts, 1, Ask(1, "a"), Ask(1, "b")) == [Verdict.REPLAN] * 2
    first = asyncio.create_task(verdicts.ask(ATTEMPT, 2, 0, 2, Ask(2, "a", 1)))
    await asyncio.sleep(0)
    assert not first.done()
    last = await verdicts.ask(ATTEMPT, 2, 1, 2, Ask(2, "b", 1))
    assert (await first, last.verdict) == (last, Verdict.REUSE)


async def test_who_waits_is_told_when_another_cannot_save_or_has_gone_on() -> None:
    verdicts = SaveVerdicts(SECONDS * 10)
    assert await all_ask(verdicts, 1, Ask(1, "a"), Ask(1, ""), Ask(1, "c")) == [Verdict.STOP] * 3
    behind = asyncio.create_task(verdicts.ask(ATTEMPT, 3, 0, 2, Ask(2, "a")))
    await asyncio.sleep(0)
    ahead = asyncio.create_task(verdicts.ask(ATTEMPT, 3, 1, 3, Ask(3, "a")))
    async with asyncio.timeout(SECONDS):
        assert (await behind).verdict is Verdict.STOP
    ahead.cancel()


async def test_ranks_that_do_not_come_are_named_and_the_others_plan() -> None:
    verdicts = SaveVerdicts(0.05)
    asks = [verdicts.ask(ATTEMPT, 4, rank, 1, Ask(1, "a")) for rank in (0, 2)]
    async with asyncio.timeout(SECONDS):
        rulings = await asyncio.gather(*asks)
    assert {ruling.verdict for ruling in rulings} == {Verdict.REPLAN}
    assert rulings[0].reason == "ranks 1, 3 did not come in time"


async def test_ranks_have_to_agree_on_their_number_and_old_attempts_are_forgotten() -> None:
    verdicts = SaveVerdicts(0.05)
    await all_ask(verdicts, 1, Ask(1, "a"))
    with pytest.raises(Conflict, match="saved by 1 ranks, one says 2"):
        await verdicts.ask(ATTEMPT, 2, 0, 2, Ask(2, "a"))
    verdicts.forget("run", 2)
    await verdicts.ask(ATTEMPT, 2, 0, 2, Ask(2, "a"))
    for number in range(MAX_ATTEMPTS + 5):
        await verdicts.ask(("other", number), 1, 0, 1, Ask(1, "a"))
    assert len(verdicts._attempts) == MAX_ATTEMPTS


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CheckpointNode]:
    async with open_checkpoints(tmp_path, with_object=False) as opened:
        yield opened


async def test_a_rank_that_may_not_save_is_told_why_and_the_others_stop(
    node: CheckpointNode,
) -> None:
    await node.begin(num_ranks=2)
    await node.wait(await node.save(5, [b"a", b"b"]))

    async def ask(rank: int, step: int, attempt: int = 1) -> Verdict:
        plan = PackPlan(GenerationId(RUN, attempt, step), rank, 2, 0)
        asked = SaveAsk(step, Ask(step, "a"))
        return (await node.checkpoints.ask_to_save(UID, plan, asked)).verdict

    other = asyncio.create_task(ask(1, 5))
    for rank in (0, 1):
        with pytest.raises(AlreadyExists):
            await (ask(0, 5) if rank == 0 else other)
    plan = PackPlan(GenerationId(RUN, 1, 6), 1, 2, 0)
    waiting = asyncio.create_task(node.checkpoints.ask_to_save(UID, plan, SaveAsk(9, Ask(6, "a"))))
    await asyncio.sleep(0)
    taken = PackPlan(GenerationId(RUN, 1, 5), 0, 2, 0)
    with pytest.raises(AlreadyExists):
        await node.checkpoints.ask_to_save(UID, taken, SaveAsk(9, Ask(5, "a")))
    async with asyncio.timeout(SECONDS):
        assert (await waiting).verdict is Verdict.STOP
    await node.begin((1, 5), num_ranks=2)
    with pytest.raises(Fenced):
        await ask(0, 7)
