"""What a run has stored already is referenced, not written again, and stays as long as needed."""

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from forebay_server.catalog import queries_compaction
from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_blobs import known_files
from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    COMPACT,
    DELETE,
    FLUSH,
    claim,
    enqueue,
    job_of,
)
from forebay_server.catalog.queries_scrub import due_copies, mark_verified
from forebay_server.catalog.tables import replicas
from forebay_server.model.encodings import PIECES, RAW
from forebay_server.model.sharing import MAX_SHARERS, Placed
from forebay_server.move import compact
from forebay_server.move.budget import Budget
from forebay_server.move.collect import EVERYTHING
from forebay_server.move.compact import Compactor
from forebay_server.move.jobs import Progress
from forebay_server.publish.recovery import recover
from forebay_server.testing.checkpoints import CUT_BYTES, RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.warm import WarmPython
from forebay_server.tier.store import Tier
from forebay_wire.failpoints import COMPACT as COMPACT_POINTS
from forebay_wire.failpoints import SHARING
from forebay_wire.ids import GenerationId
from forebay_wire.limits import MIB


def at(step: int, attempt: int = 1) -> GenerationId:
    return GenerationId(RUN, attempt, step)


def stored_bytes(folder: Path, tier: str = "ssd") -> int:
    where = folder / tier / ("files" if tier == "ssd" else "data")
    return sum(path.stat().st_size for path in where.rglob("*") if path.is_file())


async def encodings(node: CheckpointNode, generation: GenerationId) -> dict[str, str]:
    """Tier to the encoding of the first pack's live replica."""
    blob = (await node.manifest(generation)).packs[0].blob
    located = (await node.storage.catalog.locate([blob]))[blob]
    return {one.tier: one.encoding for one in located.live()}


async def test_a_second_generation_costs_what_has_changed(tmp_path: Path) -> None:
    frozen, first, second = os.urandom(8 * MIB), os.urandom(MIB), os.urandom(MIB)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin()
        await node.wait(await node.save(1, [frozen + first]))
        before = stored_bytes(tmp_path)
        await node.wait(await node.save(2, [frozen + second]))
        added = stored_bytes(tmp_path) - before
        assert MIB <= added < 1.05 * MIB
        assert (await encodings(node, at(2)))["ssd"] == PIECES
        assert await node.restore(at(1)) == [frozen + first]
        assert await node.restore(at(2)) == [frozen + second]
        assert node.storage.uploads.recorder.shared_bytes == 8 * MIB
        info = await node.checkpoints.generations.look(at(2))
        assert (info.num_bytes, info.shared_bytes) == (9 * MIB, 8 * MIB)


async def test_a_run_that_shares_goes_on_where_there_is_no_room_for_all_of_it(
    tmp_path: Path,
) -> None:
    frozen = os.urandom(64 * MIB)
    async with open_checkpoints(tmp_path, with_object=False, limit_bytes=140 * MIB) as node:
        await node.begin()
        for step in (1, 2):
            await node.wait(await node.save(step, [frozen + os.urandom(MIB)]))
        await node.storage.upload(os.urandom(30 * MIB))
        assert node.storage.tiers.get("ssd").space().free_bytes < 64 * MIB
        await node.wait(await node.save(3, [frozen + os.urandom(MIB)]))
        assert await encodings(node, at(3)) == {"ssd": PIECES}


async def test_a_run_in_two_tiers_shares_in_each(tmp_path: Path) -> None:
    """Where one tier is full the first pack in the other is whole, and the next ones are not."""
    frozen = os.urandom(16 * MIB)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        kinds = [["ssd"], ["hdd"]]
        node.storage.uploads.prefer(lambda owner: kinds[0])
        await node.begin()
        shared = []
        for step in range(1, 9):
            kinds.insert(0, kinds.pop()) if step % 4 == 1 else None
            await node.wait(await node.save(step, [frozen + os.urandom(CUT_BYTES)]))
            info = await node.checkpoints.generations.look(at(step))
            shared.append(info.shared_bytes == len(frozen))
        assert shared == [False, True, True, True] * 2
        kinds.insert(0, kinds.pop())
        await node.wait(await node.save(9, [frozen + os.urandom(CUT_BYTES)]))
        info = await node.checkpoints.generations.look(at(9))
        assert info.shared_bytes == len(frozen)


async def test_a_fork_refers_to_the_run_that_it_stands_on(tmp_path: Path) -> None:
    base, own = os.urandom(4 * MIB), os.urandom(MIB)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin()
        await node.wait(await node.save(1, [base]))
        before = stored_bytes(tmp_path)
        await node.begin(run="fork", fork=at(1))
        await node.wait(await node.save(1, [base + own], run="fork"))
        assert stored_bytes(tmp_path) - before < 1.05 * MIB
        await node.begin(run="stranger")
        await node.wait(await node.save(1, [base + own], run="stranger"))
        assert await node.restore(GenerationId("fork", 1, 1)) == [base + own]


async def test_equal_segments_of_one_pack_are_written_once(tmp_path: Path) -> None:
    twin = os.urandom(4 * MIB)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin()
        await node.wait(await node.save(1, [twin + twin]))
        assert stored_bytes(tmp_path) < 4.1 * MIB
        assert await node.restore(at(1)) == [twin + twin]


async def test_a_generation_without_anything_new_is_a_list(tmp_path: Path) -> None:
    one, two = os.urandom(MIB), os.urandom(MIB)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin()
        await node.wait(await node.save(1, [one + two]))
        before = stored_bytes(tmp_path)
        await node.wait(await node.save(2, [two + one]))
        assert stored_bytes(tmp_path) - before < 0.01 * MIB
        assert await node.restore(at(2)) == [two + one]


async def test_what_others_refer_to_outlives_its_generation_and_nothing_outlives_all(
    tmp_path: Path,
) -> None:
    frozen = os.urandom(2 * MIB)
    async with open_checkpoints(tmp_path, grace_seconds=-1) as node:
        await node.begin()
        for step in (1, 2, 3):
            saved = await node.save(step, [frozen + bytes([step]) * CUT_BYTES])
            await node.wait(saved, "remote")
        assert (await encodings(node, at(2)))["object"] == PIECES
        assert stored_bytes(tmp_path, "object") < 2.2 * MIB
        for step in (1, 2):
            await node.checkpoints.delete_generation_now(at(step))
        await node.settle(DELETE, COLLECT)
        assert await node.restore(at(3)) == [frozen + bytes([3]) * CUT_BYTES]
        found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "recovered")
        assert (found.num_generations, found.left_out) == (1, [])
        await node.checkpoints.delete_run_now(RUN)
        await node.settle(DELETE, COLLECT)
        assert stored_bytes(tmp_path) == stored_bytes(tmp_path, "object") == 0
        assert node.storage.files() == []


async def test_a_recovered_run_restores_from_shared_objects(tmp_path: Path) -> None:
    frozen = os.urandom(2 * MIB)
    packs = [frozen + os.urandom(CUT_BYTES) for _ in range(3)]
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        for step, data in enumerate(packs):
            await node.wait(await node.save(step, [data]), "remote")
    found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "new")
    assert (found.num_generations, found.left_out) == (3, [])
    os.rename(tmp_path / "object", tmp_path / "new" / "object")
    async with open_checkpoints(tmp_path / "new") as node:
        for step, data in enumerate(packs):
            assert await node.restore(at(step)) == [data]


async def test_references_that_went_meanwhile_are_written_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lay there when the landing began is gone, or quarantined, when it ends."""
    frozen = os.urandom(2 * MIB)
    async with open_checkpoints(tmp_path, with_object=False, grace_seconds=-1) as node:
        known = node.storage.uploads.known
        asked = known.of
        stale: list[Mapping[bytes, Placed]] = []

        async def old(run: str, tier: Tier) -> Mapping[bytes, Placed]:
            return stale[0] if stale else await asked(run, tier)

        monkeypatch.setattr(known, "of", old)
        await node.begin()
        await node.wait(await node.save(1, [frozen]))
        stale.append(await asked(RUN, node.storage.tiers.get("ssd")))
        assert stale[0]
        await node.wait(await node.save(2, [b"other" * 1000]))
        await node.checkpoints.delete_generation_now(at(1))
        await node.settle(DELETE, COLLECT)
        await node.wait(await node.save(3, [frozen + b"new"]))
        assert (await encodings(node, at(3)))["ssd"] == RAW
        assert await node.restore(at(3)) == [frozen + b"new"]

        stale[:] = [await asked(RUN, node.storage.tiers.get("ssd"))]
        blob = (await node.manifest(at(3))).packs[0].blob
        [replica] = (await node.storage.catalog.locate([blob]))[blob].live()
        await node.storage.catalog.write(lambda c: quarantine(c, replica.replica_id, "a test"))
        await node.wait(await node.save(4, [frozen + b"newer"]))
        assert (await encodings(node, at(4)))["ssd"] == RAW
        assert await node.restore(at(4)) == [frozen + b"newer"]


async def test_few_generations_share_one_copy_unless_another_tier_has_it(tmp_path: Path) -> None:
    frozen = os.urandom(MIB)

    async def save_many(node: CheckpointNode, folder: Path, durability: str) -> int:
        await node.begin()
        for step in range(MAX_SHARERS + 3):
            saved = await node.save(step, [frozen + os.urandom(100)])
            await node.wait(saved, durability)
        return stored_bytes(folder) // MIB

    async with open_checkpoints(tmp_path / "alone", with_object=False) as node:
        assert await save_many(node, tmp_path / "alone", "local") == 2
    async with open_checkpoints(tmp_path / "both") as node:
        assert await save_many(node, tmp_path / "both", "remote") == 1
        catalog = node.storage.catalog
        blob = (await node.manifest(at(0))).packs[0].blob
        [owner] = [one for one in (await catalog.locate([blob]))[blob].live() if one.tier == "ssd"]
        file = owner.extents[0].file
        await catalog.write(lambda c: mark_verified(c, everything(c)))
        await node.wait(await node.save(99, [frozen]))
        late = await catalog.read(lambda c: due_copies(c, "ssd", time.time() + 60, (0.0, ""), 99))
        first = next(one for one in late if not one.verified_unix)
        named = (await catalog.locate([first.blob]))[first.blob]
        assert file in {piece.file for one in named.live() for piece in one.extents}


async def test_a_damaged_shared_piece_is_found_in_all_that_refer_to_it(tmp_path: Path) -> None:
    frozen = os.urandom(MIB)
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.begin()
        for step in (1, 2):
            await node.wait(await node.save(step, [frozen + os.urandom(100)]))
        files = sorted((tmp_path / "ssd" / "files").rglob("*"), key=lambda p: p.stat().st_size)
        with files[-1].open("r+b") as file:
            file.seek(1000)
            file.write(b"damaged")
        for step in (1, 2):
            with pytest.raises(Exception, match="does not match its BLAKE3"):
                await node.restore(at(step))


async def named_files(node: CheckpointNode) -> set[str]:
    return set(await node.storage.catalog.read(lambda c: known_files(c, "ssd")))


async def test_a_mostly_dead_file_is_made_smaller(tmp_path: Path) -> None:
    frozen, big = os.urandom(MIB), os.urandom(7 * MIB)
    own = [os.urandom(CUT_BYTES) for _ in range(3)]
    async with open_checkpoints(tmp_path, with_object=False, grace_seconds=-1) as node:
        await node.begin()
        await node.wait(await node.save(1, [big + frozen]))
        for step in (2, 3):
            await node.wait(await node.save(step, [frozen + own[step - 1]]))
        assert stored_bytes(tmp_path) > 8 * MIB
        manifests = [(await node.manifest(at(step))).packs for step in (2, 3)]
        await node.checkpoints.delete_generation_now(at(1))
        await node.settle(DELETE, COLLECT, COMPACT)
        assert stored_bytes(tmp_path) < 1.2 * MIB
        for step in (2, 3):
            assert await node.restore(at(step)) == [frozen + own[step - 1]]
        assert [(await node.manifest(at(step))).packs for step in (2, 3)] == manifests
        await node.wait(await node.save(4, [frozen]))  # it refers to the new file
        assert stored_bytes(tmp_path) < 1.2 * MIB
        assert set(node.storage.files()) == await named_files(node)


async def test_a_file_that_a_client_has_open_is_left_alone(tmp_path: Path) -> None:
    frozen, big = os.urandom(MIB), os.urandom(7 * MIB)
    held: set[str] = set()
    async with open_checkpoints(tmp_path, with_object=False, is_open=held.__contains__) as node:
        await node.begin()
        for step, data in enumerate((big + frozen, frozen)):
            await node.wait(await node.save(step, [data]))
        held.add((await node.manifest(at(1))).packs[0].blob)
        await node.checkpoints.delete_generation_now(at(0))
        await node.settle(DELETE, COLLECT)

        def refused(connection: Connection) -> bool | None:
            found = job_of(connection, COMPACT, EVERYTHING)
            return (found is not None and "open in clients" in found.error) or None

        assert await node.storage.catalog.wait_until(refused, 20)
        assert stored_bytes(tmp_path) > 8 * MIB


async def test_a_compaction_that_is_cancelled_while_its_rows_come_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, big = os.urandom(MIB), os.urandom(7 * MIB)
    options = {"with_object": False, "grace_seconds": -1}
    held: set[str] = set()
    async with open_checkpoints(tmp_path, is_open=held.__contains__, **options) as node:
        await node.begin()
        for step, data in enumerate((big + frozen, frozen)):
            await node.wait(await node.save(step, [data]))
        held.add((await node.manifest(at(1))).packs[0].blob)
        await node.checkpoints.delete_generation_now(at(0))
        await node.settle(DELETE, COLLECT)
    async with open_checkpoints(tmp_path, run_jobs=False, **options) as node:
        catalog, loop = node.storage.catalog, asyncio.get_running_loop()
        await catalog.write(lambda c: enqueue(c, COMPACT, "now"))  # the other one backs off
        job = await catalog.write(lambda c: claim(c, "me", 3600, [COMPACT]))
        assert job is not None
        compactor = Compactor(catalog, node.storage.tiers, Budget({}))
        cancelled = threading.Event()

        def cancel_inside(point: str) -> None:
            if point == "compact.inside_rows":
                loop.call_soon_threadsafe(running.cancel)
                assert cancelled.wait(20)

        monkeypatch.setattr(compact, "failpoint", cancel_inside)
        running = asyncio.ensure_future(compactor(Progress(job, "me")))
        with pytest.raises(asyncio.CancelledError):
            await running
        cancelled.set()
        # Behind the write that goes on: that has ended when this one has.
        await catalog.write(lambda c: None)
        assert await node.restore(at(1)) == [frozen]
    async with open_checkpoints(tmp_path, **options) as node:
        await node.settle(DELETE, COLLECT, COMPACT)
        assert await node.restore(at(1)) == [frozen]
        assert stored_bytes(tmp_path) < 1.2 * MIB


KILLED = """
import asyncio, os, sys
from pathlib import Path
from forebay_server.catalog.queries_jobs import COLLECT, COMPACT, DELETE
from forebay_server.testing.checkpoints import RUN, open_checkpoints
from forebay_wire.ids import GenerationId

async def main(folder):
    async with open_checkpoints(folder, with_object=False, grace_seconds=-1) as node:
        await node.begin()
        frozen, big = (folder / "frozen").read_bytes(), os.urandom(7 << 20)
        await node.wait(await node.save(1, [big + frozen]))
        for step in (2, 3):
            await node.wait(await node.save(step, [frozen + bytes([step]) * 70_000]))
        await node.checkpoints.delete_generation_now(GenerationId(RUN, 1, 1))
        await node.settle(DELETE, COLLECT, COMPACT)

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("failpoint", [*COMPACT_POINTS, *SHARING])
async def test_a_pack_or_a_compaction_that_is_killed_loses_and_leaves_nothing(
    tmp_path: Path, failpoint: str, warm_server: WarmPython
) -> None:
    frozen = os.urandom(MIB)
    (tmp_path / "frozen").write_bytes(frozen)
    command = ["-c", KILLED, tmp_path]
    done = await asyncio.to_thread(warm_server.run, command, {"FOREBAY_FAILPOINTS": failpoint})
    assert done.returncode == -signal.SIGKILL, done.stderr
    async with open_checkpoints(tmp_path, with_object=False, grace_seconds=-1) as node:
        await node.settle(DELETE, COLLECT, COMPACT)
        steps = (2, 3) if failpoint in COMPACT_POINTS else ()
        for step in steps:
            assert await node.restore(at(step)) == [frozen + bytes([step]) * 70_000]
        assert set(node.storage.files()) == await named_files(node)
        assert stored_bytes(tmp_path) < (1.3 if steps else 8.1) * MIB


def everything(connection: Connection) -> list[str]:
    return list(connection.scalars(select(replicas.c.replica)))


SEGMENTS = [random.Random(number).randbytes(CUT_BYTES) for number in range(6)]


HISTORIES = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.lists(st.integers(0, 5), min_size=1, max_size=5)),
        st.tuples(st.just("delete"), st.integers(0, 8)),
        st.tuples(st.just("restart"), st.none()),
    ),
    max_size=12,
)


def check_history(tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, object]]):
    folder = tmp_path_factory.mktemp("history")
    with mock.patch.object(queries_compaction, "MIN_BYTES", 0):
        asyncio.run(play(folder, history))


@settings(max_examples=6, deadline=None)
@given(HISTORIES)
def test_any_history_keeps_what_it_should_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, object]]
) -> None:
    check_history(tmp_path_factory, history)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(HISTORIES)
def test_many_histories_keep_what_they_should_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, object]]
) -> None:
    check_history(tmp_path_factory, history)


async def play(folder: Path, history: list[tuple[str, object]]) -> None:
    wanted: dict[int, bytes] = {}
    step = 0
    waiting = [list(history)]
    has_begun = False
    while waiting:
        rest = waiting.pop()
        async with open_checkpoints(folder, grace_seconds=-1) as node:
            if not has_begun:
                await node.begin()
            has_begun = True
            while rest:
                action, detail = rest.pop(0)
                if action == "restart":
                    waiting.append(rest)
                    break
                if action == "save":
                    assert isinstance(detail, list)
                    step += 1
                    wanted[step] = b"".join(SEGMENTS[number] for number in detail)
                    await node.wait(await node.save(step, [wanted[step]]), "remote")
                elif wanted:
                    assert isinstance(detail, int)
                    old = sorted(wanted)[detail % len(wanted)]
                    await node.checkpoints.delete_generation_now(at(old))
                    del wanted[old]
            await node.settle(DELETE, COLLECT, FLUSH, COMPACT)
            for number, data in wanted.items():
                assert await node.restore(at(number)) == [data]
            needed = {i for data in wanted.values() for i in range(6) if SEGMENTS[i] in data}
            # Half of a file may be dead, and what many share is stored more than once.
            most = 2 * (1 + len(wanted) // MAX_SHARERS) * len(needed) * CUT_BYTES
            assert stored_bytes(folder) <= most + 4096 * 2 * len(wanted)
            if not wanted:
                assert stored_bytes(folder) + stored_bytes(folder, "object") == 0
            assert set(node.storage.files()) == await named_files(node)
