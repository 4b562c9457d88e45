"""Packs of all ranks become one committed generation, or nothing."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import Connection

from forebay_server.catalog.queries_checkpoints import PackPlan, find_pack, seal_pack
from forebay_server.catalog.queries_status import count_all
from forebay_server.model.states import PackState
from forebay_server.publish.lease import Grant
from forebay_server.publish.seal import PackSeal
from forebay_server.publish.session import Piece
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.storage import UID
from forebay_server.tier.memory import Slot
from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    IntegrityError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    ResourceExhausted,
    StorageError,
)
from forebay_wire.ids import GenerationId
from forebay_wire.limits import KIB, MAX_DESCRIPTION_BYTES, MAX_RANKS, MIB


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CheckpointNode]:
    async with open_checkpoints(tmp_path, with_object=False) as opened:
        yield opened


@pytest.fixture
async def node_on_each(tmp_path: Path, catalog_url: str) -> AsyncIterator[CheckpointNode]:
    """:func:`node`, on each engine of the catalog."""
    async with open_checkpoints(tmp_path, with_object=False, catalog_url=catalog_url) as opened:
        yield opened


def random_packs(num_ranks: int, num_bytes: int = 200 * KIB) -> list[bytes]:
    return [os.urandom(num_bytes + rank) for rank in range(num_ranks)]


async def test_a_generation_of_several_ranks_is_committed_with_everything(
    node_on_each: CheckpointNode,
) -> None:
    node = node_on_each
    await node.begin(num_ranks=3)
    packs = random_packs(3)
    saved = await node.save(
        5, packs, metrics_json='{"loss": 0.5}', dataset_json='{"dataset": "d", "version": 1}'
    )
    info = await node.wait(saved)
    assert (info.state, info.durability, info.num_ranks) == ("committed", "local", 3)
    assert info.num_bytes == sum(map(len, packs))
    manifest = await node.manifest(saved)
    assert [pack.rank for pack in manifest.packs] == [0, 1, 2]
    assert [pack.description for pack in manifest.packs] == [{"rank": rank} for rank in range(3)]
    assert manifest.metrics == {"loss": 0.5}
    assert manifest.dataset == {"dataset": "d", "version": 1}
    assert manifest.parent is None
    assert await node.restore(saved) == packs


async def test_empty_packs_are_packs(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    saved = await node.save(1, [b"", os.urandom(10)])
    await node.wait(saved)
    assert [len(pack) for pack in await node.restore(saved)] == [0, 10]


async def test_the_first_seal_is_not_enough_and_the_last_makes_it_ram(
    node: CheckpointNode,
) -> None:
    await node.begin(num_ranks=2)
    generation = GenerationId(RUN, 1, 1)
    first = await node.plan(generation, 10, rank=0, num_ranks=2)
    second = await node.plan(generation, 10, rank=1, num_ranks=2)
    assert not await node.seal(first, bytes(10))
    with pytest.raises(DeadlineExceeded, match="1 of 2 ranks have sealed"):
        await node.wait(generation, "ram", timeout=0.05)
    assert await node.seal(second, bytes(10))
    assert (await node.wait(generation, "ram")).durability in ("ram", "local")
    assert (await node.wait(generation)).durability == "local"


@pytest.mark.parametrize("num_ranks", [2, 8])
async def test_of_concurrent_last_ranks_exactly_one_commits(
    node_on_each: CheckpointNode, num_ranks: int
) -> None:
    node = node_on_each
    await node.begin(num_ranks=num_ranks)
    for step in range(5):
        saved = await node.save(step, random_packs(num_ranks, 3 * KIB))
        await node.wait(saved)
    infos = (await node.checkpoints.generations.list_generations(RUN, "", 0))[1]
    assert [info.state for info in infos] == ["committed"] * 5
    assert len({info.manifest for info in infos}) == 5


async def test_packs_with_equal_bytes_share_a_blob(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    data = os.urandom(300 * KIB)
    saved = await node.save(1, [data, data])
    await node.wait(saved)
    again = await node.save(2, [data, data])
    await node.wait(again)
    assert await node.restore(again) == [data, data]
    assert len(node.storage.files()) == 1


async def test_a_sealed_pack_lands_whatever_its_client_does(node: CheckpointNode) -> None:
    await node.begin()
    generation = GenerationId(RUN, 1, 1)
    data = os.urandom(5 * MIB)
    grant = await node.plan(generation, len(data))
    await node.seal(grant, data)
    with suppress(Conflict):  # refused while it lands, without effect afterwards
        await node.storage.uploads.abort(grant.session, UID)
    await node.wait(generation)
    assert await node.restore(generation) == [data]


async def test_sealing_again_is_answered_the_same(node: CheckpointNode) -> None:
    await node.begin()
    grant = await node.plan(GenerationId(RUN, 1, 1), 100)
    assert await node.seal(grant, bytes(100))
    seal = PackSeal(grant.session, 0, 100, (100,), 15, "", "")
    assert await node.checkpoints.seal_pack(UID, seal)
    await node.wait(GenerationId(RUN, 1, 1))
    assert await node.checkpoints.seal_pack(UID, seal)


async def test_a_pack_larger_than_its_slot_is_appended_piece_by_piece(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, with_object=False, ram_bytes=6 * MIB) as node:
        await node.begin()
        generation = GenerationId(RUN, 1, 1)
        data = os.urandom(20 * MIB)
        plan = PackPlan(generation, 0, 1, len(data))
        grant = await node.checkpoints.begin_pack(UID, plan, len(data))
        assert 4 * MIB <= grant.slot_bytes < len(data)
        slot = node.storage.uploads.slot(grant.session, UID)
        for sequence in range(5):
            slot.view[: 4 * MIB] = data[sequence * 4 * MIB : (sequence + 1) * 4 * MIB]
            await node.storage.uploads.append(
                grant.session, UID, Piece(sequence, 4 * MIB, tuple([1 * MIB] * 4))
            )
        slot.view[:2] = b"{}"
        assert await node.checkpoints.seal_pack(UID, PackSeal(grant.session, 5, 0, (), 2, "", ""))
        info = await node.wait(generation)
        assert info.num_bytes == len(data)
        assert await node.restore(generation) == [data]


# ---------------------------------------------------------------------------------------- refusals


async def test_a_second_save_of_a_step_is_refused(node: CheckpointNode) -> None:
    await node.begin()
    saved = await node.save(7, random_packs(1))
    await node.wait(saved)
    with pytest.raises(AlreadyExists, match="step 7 was already saved in attempt 1 of run run"):
        await node.plan(saved, 10)
    await node.begin((1, 7))
    await node.wait(await node.save(7, random_packs(1), attempt=2))


async def test_a_rank_may_begin_its_unsealed_pack_again(node: CheckpointNode) -> None:
    await node.begin()
    generation = GenerationId(RUN, 1, 1)
    lost = await node.plan(generation, 10)
    grant = await node.plan(generation, 20)
    with pytest.raises(NotFound):
        await node.seal(lost, bytes(10))
    await node.seal(grant, bytes(20))
    await node.wait(generation)


async def test_ranks_have_to_agree_on_their_number(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    generation = GenerationId(RUN, 1, 1)
    await node.plan(generation, 10, rank=0, num_ranks=2)
    with pytest.raises(Conflict, match="begun with 2 ranks, rank 1 says 3"):
        await node.plan(generation, 10, rank=1, num_ranks=3)


@pytest.mark.parametrize(
    ("rank", "num_ranks", "error"),
    [
        (1, 1, InvalidRequest),
        (-1, 1, InvalidRequest),
        (0, 0, InvalidRequest),
        (0, MAX_RANKS + 1, LimitExceeded),
    ],
)
async def test_ranks_out_of_range(
    node: CheckpointNode, rank: int, num_ranks: int, error: type[Exception]
) -> None:
    await node.begin()
    with pytest.raises(error):
        await node.plan(GenerationId(RUN, 1, 1), 10, rank=rank, num_ranks=num_ranks)


async def test_saving_without_an_attempt(node: CheckpointNode) -> None:
    with pytest.raises(NotFound, match="begin one before saving"):
        await node.plan(GenerationId(RUN, 1, 1), 10)
    await node.begin()
    with pytest.raises(NotFound, match="has no attempt 2"):
        await node.plan(GenerationId(RUN, 2, 1), 10)


@pytest.mark.parametrize(
    ("text", "message"), [(b"{", "no JSON"), (b"[]", "no JSON object"), (b"", "no JSON")]
)
async def test_a_bad_description_is_refused_and_the_pack_stays_open(
    node: CheckpointNode, text: bytes, message: str
) -> None:
    await node.begin()
    generation = GenerationId(RUN, 1, 1)
    grant = await node.plan(generation, 10)
    node.storage.uploads.slot(grant.session, UID).view[10 : 10 + len(text)] = text
    with pytest.raises(InvalidRequest, match=message):
        await node.checkpoints.seal_pack(
            UID, PackSeal(grant.session, 0, 10, (10,), len(text), "", "")
        )
    await node.seal(grant, bytes(10))
    await node.wait(generation)


@pytest.mark.parametrize(
    ("metrics", "dataset"),
    [("{", ""), ("[]", ""), ('{"a": "b"}', ""), ('{"a": NaN}', ""), ("", "[1]"), ("", "{")],
)
async def test_bad_metrics_and_positions_are_refused(
    node: CheckpointNode, metrics: str, dataset: str
) -> None:
    await node.begin()
    grant = await node.plan(GenerationId(RUN, 1, 1), 10)
    with pytest.raises(InvalidRequest):
        await node.seal(grant, bytes(10), metrics_json=metrics, dataset_json=dataset)


async def test_a_description_above_the_limit(node: CheckpointNode) -> None:
    await node.begin()
    grant = await node.plan(GenerationId(RUN, 1, 1), 10)
    seal = PackSeal(grant.session, 0, 10, (10,), MAX_DESCRIPTION_BYTES + 1, "", "")
    with pytest.raises(LimitExceeded):
        await node.checkpoints.seal_pack(UID, seal)


# ---------------------------------------------------------------------------------- full, failing


async def test_a_full_tier_refuses_early_and_leaves_what_is_committed(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, with_object=False, limit_bytes=4 * MIB) as node:
        await node.begin(num_ranks=2)
        kept = random_packs(2, MIB)
        saved = await node.save(1, kept)
        await node.wait(saved)
        generation = GenerationId(RUN, 1, 2)
        other = await node.plan(generation, 10, rank=1, num_ranks=2)
        waiting = asyncio.create_task(node.wait(generation))
        with pytest.raises(ResourceExhausted, match=r"\d+ bytes needed, \d+ free"):
            await node.plan(generation, 30 * MIB, rank=0, num_ranks=2)
        with pytest.raises(Conflict, match=r"rank 0: .*no room"):
            await waiting
        assert await node.latest() == "1/1"
        assert await node.restore(saved) == kept
        # With less to save the same step goes through.
        await node.seal(other, bytes(10))
        await node.seal(await node.plan(generation, 20, rank=0, num_ranks=2), bytes(20))
        await node.wait(generation)
        assert await node.latest() == "1/2"


async def test_a_landing_that_fails_fails_the_generation_and_tells_at_once(
    node: CheckpointNode,
) -> None:
    await node.begin(num_ranks=2)
    generation = GenerationId(RUN, 1, 1)
    first = await node.plan(generation, 10, rank=0, num_ranks=2)
    second = await node.plan(generation, 10, rank=1, num_ranks=2)
    # The final names cannot be made any more: publishing fails after sealing.
    for tier in node.storage.tiers.landing:
        files = Path(tier.location) / "files"
        files.rename(files.with_name("gone"))
        files.write_bytes(b"no folder")
    waiting = asyncio.create_task(node.wait(generation))
    await node.seal(first, bytes(10))
    with pytest.raises(StorageError, match=r"generation run@1/1 failed: rank 0"):
        await waiting
    with pytest.raises((Conflict, NotFound)):
        await node.seal(second, bytes(10))
    with pytest.raises(Conflict, match="is failed"):
        await node.plan(generation, 10, rank=0, num_ranks=2)
    with pytest.raises(NotFound):
        await node.latest()


async def test_a_landing_whose_tier_fails_goes_to_the_next_tier(node: CheckpointNode) -> None:
    await node.begin()
    generation = GenerationId(RUN, 1, 1)
    data = os.urandom(6 * MIB)
    grant = await node.plan(generation, len(data))
    files = Path(node.storage.tiers.landing[0].location) / "files"
    files.rename(files.with_name("gone"))
    files.write_bytes(b"no folder")
    await node.seal(grant, data)
    await node.wait(generation)
    (pack,) = (await node.manifest(generation)).packs
    location = (await node.storage.catalog.locate([pack.blob]))[pack.blob]
    assert [replica.tier for replica in location.replicas] == ["hdd"]
    assert await node.restore(generation) == [data]


async def test_an_upload_that_ends_before_its_seal_is_told_to_the_others(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin(num_ranks=2)
        generation = GenerationId(RUN, 1, 1)
        first = await node.plan(generation, 10, rank=0, num_ranks=2)
        second = await node.plan(generation, 10, rank=1, num_ranks=2)
        await node.seal(first, bytes(10))
        waiting = asyncio.create_task(node.wait(generation))
        await node.storage.uploads.abort(second.session, UID)
        with pytest.raises(Conflict, match="rank 1: its upload ended"):
            await waiting


# -------------------------------------------------------------------------------------------- slots


async def until_landed(node: CheckpointNode, session: str) -> None:
    def look(connection: Connection) -> bool | None:
        pack = find_pack(connection, session)
        return True if pack is not None and pack.state is PackState.LANDED else None

    assert await node.storage.catalog.wait_until(look, 10.0)


async def seal_and_keep_slot(
    node: CheckpointNode, step: int, rank: int, data: bytes
) -> tuple[Grant, Slot, bytes]:
    """Seal one of two ranks' pack: its session, its slot, and all that the slot holds."""
    grant = await node.plan(GenerationId(RUN, 1, step), len(data), rank=rank, num_ranks=2)
    slot = node.storage.uploads.slot(grant.session, UID)
    await node.seal(grant, data)
    return grant, slot, bytes(slot.view)


async def test_a_landed_packs_slot_is_lent_until_its_generation_is_committed(
    node: CheckpointNode,
) -> None:
    await node.begin(num_ranks=2)
    (first, other) = random_packs(2)
    grant, held, content = await seal_and_keep_slot(node, 1, 0, first)
    await until_landed(node, grant.session)
    # The client could still have to offer step 1 again: step 2 goes elsewhere.
    _, second, _ = await seal_and_keep_slot(node, 2, 0, random_packs(1)[0])
    assert second is not held
    assert bytes(held.view) == content
    await seal_and_keep_slot(node, 1, 1, other)
    await node.wait(GenerationId(RUN, 1, 1))

    async def is_reused() -> bool:
        plan = await node.plan(GenerationId(RUN, 1, 3), len(first), num_ranks=2)
        slot = node.storage.uploads.slot(plan.session, UID)
        await node.storage.uploads.abort(plan.session, UID)
        return slot is held

    assert await is_reused()


async def test_the_slots_of_a_generation_that_is_given_up_are_closed(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    grant, landed, _ = await seal_and_keep_slot(node, 1, 0, b"landed")
    await until_landed(node, grant.session)
    unsealed = await node.plan(GenerationId(RUN, 1, 1), 10, rank=1, num_ranks=2)
    opened = node.storage.uploads.slot(unsealed.session, UID)
    await node.begin(num_ranks=2)
    for slot in (landed, opened):
        with pytest.raises(NotFound, match="closed"):
            slot.duplicate()
    assert node.storage.tiers.slots.space().used_bytes == 0


async def test_sealed_packs_of_a_generation_that_is_given_up_are_not_dirty(
    tmp_path: Path,
) -> None:
    async def dirty(node: CheckpointNode) -> int:
        counts = await node.storage.catalog.read(lambda c: count_all(c, "object"))
        return counts.dirty_bytes["ram"]

    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin(num_ranks=2)
        grant = await node.plan(GenerationId(RUN, 1, 1), 10, num_ranks=2)

        def seal(connection: Connection) -> None:
            seal_pack(connection, grant.session, 10, b"{}", {})

        await node.storage.catalog.write(seal)  # it never lands
        assert await dirty(node) == 10
        await node.begin(num_ranks=2)
        assert await dirty(node) == 0


async def test_held_slots_give_way_before_a_save_is_refused(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, with_object=False, ram_bytes=8 * MIB) as node:
        await node.begin(num_ranks=2)
        data = bytes(7 * MIB)
        for step in range(1, 4):  # the other rank never saves
            grant, _, _ = await seal_and_keep_slot(node, step, 0, data)
            await until_landed(node, grant.session)


async def test_flipped_bytes_of_a_landed_pack_are_noticed(node: CheckpointNode) -> None:
    await node.begin()
    saved = await node.save(1, random_packs(1))
    await node.wait(saved)
    (file,) = (Path(node.storage.tiers.landing[0].location) / "files").glob("*/*")
    with file.open("r+b") as stored:
        stored.seek(1000)
        byte = stored.read(1)
        stored.seek(1000)
        stored.write(bytes([byte[0] ^ 1]))
    with pytest.raises(IntegrityError, match=r"segment 0 of blob .*tier ssd"):
        await node.restore(saved)
