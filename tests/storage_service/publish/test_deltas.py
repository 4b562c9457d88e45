"""Packs in the object tier as differences from the ones before: less is stored, nothing is lost."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_server.catalog.queries_blobs import Replica
from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_jobs import COLLECT, COMPACT, DELETE, FLUSH
from forebay_server.catalog.queries_scrub import due_copies, mark_verified
from forebay_server.catalog.queries_sharing import PackOfRun
from forebay_server.catalog.queries_status import count_all
from forebay_server.locks import NamedLocks
from forebay_server.model.deltas import MAX_LAYERS
from forebay_server.model.encodings import AUTO
from forebay_server.model.extents import ObjectBlob
from forebay_server.publish.known import KnownSegments, Shareable
from forebay_server.publish.manifests import ObjectPublisher
from forebay_server.publish.recovery import recover
from forebay_server.testing.checkpoints import CUT_BYTES, RUN, CheckpointNode, open_checkpoints
from forebay_server.tier.encode import open_plain, read_list
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import IntegrityError
from forebay_wire.failpoints import REMOTE_FLUSH, VARIABLE
from forebay_wire.ids import GenerationId

PACK_BYTES = 6 * CUT_BYTES


def at(step: int, attempt: int = 1) -> GenerationId:
    return GenerationId(RUN, attempt, step)


def weights(seed: int = 0, num_bytes: int = PACK_BYTES) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, num_bytes // 4).astype("<f4")


def learned(data: bytes, seed: int) -> bytes:
    """Weights after a small step."""
    found = np.frombuffer(data, "<f4")
    change = np.random.default_rng(seed).normal(0, 1e-5, found.size)
    return (found * (1 + change)).astype("<f4").tobytes()


def history(num_steps: int) -> list[bytes]:
    """Packs of a run that learns slowly: each is a little off the one before."""
    found = [weights().tobytes()]
    for step in range(1, num_steps):
        found.append(learned(found[-1], step))
    return found


@asynccontextmanager
async def open_node(folder: Path, **options: object) -> AsyncIterator[CheckpointNode]:
    tier = RemoteTier("object", f"file://{folder / 'object'}")
    tier.encoding = AUTO
    async with open_checkpoints(
        folder, with_object=False, object_tier=tier, grace_seconds=-1, **options
    ) as node:
        yield node


async def save_all(node: CheckpointNode, packs: list[bytes]) -> None:
    await node.begin()
    for step, data in enumerate(packs):
        await node.wait(await node.save(step, [data]), "remote")


async def remote_copy(node: CheckpointNode, step: int) -> Replica:
    blob = (await node.manifest(at(step))).packs[0].blob
    located = (await node.storage.catalog.locate([blob]))[blob]
    [found] = [one for one in located.live() if one.tier == "object"]
    return found


async def remote_list(node: CheckpointNode, step: int) -> ObjectBlob:
    blob = (await node.manifest(at(step))).packs[0].blob
    tier = node.storage.tiers.get("object")
    return read_list(tier, "", blob)


async def read_remote(node: CheckpointNode, step: int) -> bytes:
    """The first pack of a generation out of the object tier, verified."""
    blob = (await node.manifest(at(step))).packs[0].blob
    copy = await remote_copy(node, step)
    tier = node.storage.tiers.get("object")
    with open_plain(tier, copy.extents[0].file, copy.encoding, blob) as reader:
        data = bytearray(verify_file(reader, blob).total_bytes)
        reader.read_into(0, data)
    return bytes(data)


async def live_copies(node: CheckpointNode, blob: str) -> tuple[Replica, ...]:
    return (await node.storage.catalog.locate([blob]))[blob].live()


async def saved_blob(node: CheckpointNode, step: int, data: bytes) -> str:
    await node.wait(await node.save(step, [data]))
    return (await node.manifest(at(step))).packs[0].blob


class NoProgress:
    def plan(self, total_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass


def flip(path: Path, position: int = PACK_BYTES // 2) -> None:
    """Damage a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def num_layers(found: ObjectBlob) -> int:
    return 1 + max(one.layer for one in found.extents)


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "object" / "data").iterdir())


async def test_a_run_that_learns_slowly_is_stored_as_differences(tmp_path: Path) -> None:
    packs = history(2 * MAX_LAYERS)
    async with open_node(tmp_path) as node:
        await save_all(node, packs)
        lists = [await remote_list(node, step) for step in range(len(packs))]
        assert [num_layers(one) for one in lists] == [1, 2, 3, 4, 1, 2, 3, 4]
        sizes = [one.extents[0].file_bytes for one in lists]
        assert max(sizes[1:4]) < 0.75 * sizes[0]
        assert [await read_remote(node, step) for step in range(len(packs))] == packs
        plain = await node.storage.catalog.read(lambda c: count_all(c, "object").plain_bytes)
        assert plain["object"] == plain["ssd"] == len(packs) * PACK_BYTES


@pytest.mark.slow  # the history below has it, too
async def test_what_others_are_differences_from_outlives_its_generation(tmp_path: Path) -> None:
    packs = history(4)
    async with open_node(tmp_path) as node:
        await save_all(node, packs)
        for step in (0, 1, 2):
            await node.checkpoints.delete_generation_now(at(step))
        await node.settle(DELETE, COLLECT)
        assert await read_remote(node, 3) == packs[3]
        assert len({one.file for one in (await remote_list(node, 3)).extents}) == 4
        found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "recovered")
        assert (found.num_generations, found.left_out) == (1, [])
        await node.checkpoints.delete_run_now(RUN)
        await node.settle(DELETE, COLLECT)
        assert stored_bytes(tmp_path) == 0


async def test_what_is_shared_brings_its_layers_along(tmp_path: Path) -> None:
    """A segment that lies as a difference is the same in the next pack, whose base has gone."""
    first, second = history(2)
    own = os.urandom(2 * CUT_BYTES)
    packs = [first, second, second + own]
    async with open_node(tmp_path) as node:
        await save_all(node, packs)
        assert num_layers(await remote_list(node, 2)) == 2
        for step in (0, 1):
            await node.checkpoints.delete_generation_now(at(step))
        await node.settle(DELETE, COLLECT)
        assert await read_remote(node, 2) == packs[2]


async def test_a_pack_lies_on_that_of_its_own_rank_also_in_a_fork(tmp_path: Path) -> None:
    one, two = weights(1).tobytes(), weights(2).tobytes()
    async with open_node(tmp_path) as node:
        await node.begin(num_ranks=2)
        await node.wait(await node.save(0, [one, two]), "remote")
        await node.begin(run="fork", num_ranks=2, fork=at(0))
        saved = await node.save(1, [learned(one, 1), learned(two, 2)], run="fork")
        await node.wait(saved, "remote")
        files = []
        for generation in (at(0), saved):
            packs = (await node.manifest(generation)).packs
            lists = [read_list(node.storage.tiers.get("object"), "", pack.blob) for pack in packs]
            files.append([{one.file for one in found.extents} for found in lists])
        (first, second), (third, fourth) = files
        assert first < third
        assert second < fourth


async def test_without_differences_all_is_whole(tmp_path: Path) -> None:
    packs = history(2)
    async with open_node(tmp_path, run_jobs=False) as node:
        catalog, tiers = node.storage.catalog, node.storage.tiers
        tier = tiers.get("object")
        publisher = ObjectPublisher(catalog, tiers, tier, NamedLocks(), stores_deltas=False)
        await node.begin()
        for step, data in enumerate(packs):
            blob = await saved_blob(node, step, data)
            await publisher.publish_locked(blob, NoProgress())
        assert not (await remote_list(node, 1)).has_layers
        assert not any(publisher.delta_bytes.values())


@pytest.mark.parametrize("what", ["gone", "quarantined"])
async def test_a_base_that_goes_meanwhile_is_not_referred_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    packs = history(2)
    asked = KnownSegments.of_pack
    answers: list[Shareable] = []

    async def late(known: KnownSegments, pack: PackOfRun, tier: Tier) -> Shareable:
        answers.append(await asked(known, pack, tier))
        if len(answers) == 2 and what == "quarantined":
            bad = (await remote_copy(node, 0)).replica_id
            await node.storage.catalog.write(lambda c: quarantine(c, bad, "a test"))
        elif len(answers) == 2:
            await node.checkpoints.delete_generation_now(at(0))
            await node.settle(DELETE, COLLECT)
        return answers[-1]

    monkeypatch.setattr(KnownSegments, "of_pack", late)
    async with open_node(tmp_path) as node:
        await save_all(node, packs)
        assert answers[1].base is not None
        assert not (await remote_list(node, 1)).has_layers
        assert await read_remote(node, 1) == packs[1]


async def test_damage_of_a_base_is_found_in_what_lies_on_it_and_mended(tmp_path: Path) -> None:
    packs = history(3)
    async with open_node(tmp_path) as node:
        await save_all(node, packs)
        catalog = node.storage.catalog
        copies = [await remote_copy(node, step) for step in range(3)]
        flip(tmp_path / "object" / "data" / copies[0].extents[0].file)
        for step in range(3):
            with pytest.raises(IntegrityError):
                await read_remote(node, step)
        await catalog.write(lambda c: mark_verified(c, [one.replica_id for one in copies]))
        await catalog.write(lambda c: quarantine(c, copies[0].replica_id, "a test"))
        late = await catalog.read(lambda c: due_copies(c, "object", time.time() + 60, (0.0, ""), 9))
        suspects = {one.replica_id for one in late if not one.verified_unix}
        assert suspects == {one.replica_id for one in copies[1:]}
        for one in copies[1:]:
            await catalog.write(lambda c, one=one: quarantine(c, one.replica_id, "a test"))
        node.jobs.wake()
        await node.settle(FLUSH)
        assert [await read_remote(node, step) for step in range(3)] == packs


async def test_the_ends_of_what_is_put_together_are_read_before_it_is_remote(
    tmp_path: Path,
) -> None:
    packs = history(2)
    async with open_node(tmp_path) as node:
        await node.begin()
        await node.wait(await node.save(0, packs[:1]), "remote")
        flip(tmp_path / "object" / "data" / (await remote_copy(node, 0)).extents[0].file, 100)
        await node.wait(await node.save(1, packs[1:]), "remote")
        assert not (await remote_list(node, 1)).has_layers
        assert await read_remote(node, 1) == packs[1]


async def test_a_base_that_is_damaged_here_is_quarantined_and_not_used(tmp_path: Path) -> None:
    packs = history(2)
    async with open_node(tmp_path) as node:
        await node.begin()
        await node.wait(await node.save(0, packs[:1]), "remote")
        blob = (await node.manifest(at(0))).packs[0].blob
        [copy] = [one for one in await live_copies(node, blob) if one.tier == "ssd"]
        file = copy.extents[0].file
        flip(tmp_path / "ssd" / "files" / file[:2] / file)
        await node.wait(await node.save(1, packs[1:]), "remote")
        assert not (await remote_list(node, 1)).has_layers
        assert await read_remote(node, 1) == packs[1]
        assert [one.tier for one in await live_copies(node, blob)] == ["object"]


# ------------------------------------------------------------------------------------ any history

changes = st.sampled_from(["learned", "same", "other", "longer", "shorter"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.lists(changes, min_size=4, max_size=4)),
        st.tuples(st.just("delete"), st.integers(0, 9)),
    ),
    min_size=2,
    max_size=14,
)


def changed(parts: list[bytes], how: list[str], seed: int) -> list[bytes]:
    """The parts of a pack one generation later."""
    found = []
    for number, (part, what) in enumerate(zip(parts, how, strict=True)):
        mine = 100 * seed + number
        fresh = weights(mine, len(part)).tobytes()
        found.append(
            {
                "learned": lambda part=part, mine=mine: learned(part, mine),
                "same": lambda part=part: part,
                "other": lambda fresh=fresh: fresh,
                "longer": lambda part=part, fresh=fresh: part + fresh[: CUT_BYTES // 2],
                "shorter": lambda part=part: part[: -CUT_BYTES // 4] or part,
            }[what]()
        )
    return found


async def check_history(folder: Path, plan: list[tuple[str, object]]) -> None:
    """Whatever is saved and deleted: what is there can be read, also by a recovered catalog."""
    there: dict[int, bytes] = {}
    parts = [weights(number, 2 * CUT_BYTES).tobytes() for number in range(4)]
    async with open_node(folder) as node:
        await node.begin()
        for seed, (what, how) in enumerate(plan):
            if what == "save":
                parts = changed(parts, how, seed)  # type: ignore[arg-type]
                there[seed] = b"".join(parts)
                await node.wait(await node.save(seed, [there[seed]]), "remote")
                assert num_layers(await remote_list(node, seed)) <= MAX_LAYERS
            elif len(there) > 1:
                step = sorted(there)[how % (len(there) - 1)]  # type: ignore[operator]
                del there[step]
                await node.checkpoints.delete_generation_now(at(step))
                await node.settle(DELETE, COLLECT, COMPACT)
        for step, data in there.items():
            assert await read_remote(node, step) == data
    if not there:
        return
    found = await recover(f"file://{folder / 'object'}", folder / "new")
    assert (found.num_generations, found.left_out) == (len(there), [])
    os.rename(folder / "object", folder / "new" / "object")
    async with open_node(folder / "new") as node:
        for step, data in there.items():
            assert await node.restore(at(step)) == [data]
        for step in there:
            await node.checkpoints.delete_generation_now(at(step))
        await node.settle(DELETE, COLLECT, COMPACT)
        assert stored_bytes(folder / "new") == 0


def run_history(plan: list[tuple[str, object]]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        asyncio.run(check_history(Path(folder), plan))


def test_a_history_of_all_kinds_of_changes() -> None:
    """Chains of several lengths in one pack, pieces of others between, bases deleted."""
    run_history(
        [
            ("save", ["same", "same", "same", "same"]),
            ("save", ["learned", "same", "learned", "other"]),
            ("save", ["learned", "learned", "same", "learned"]),
            ("delete", 0),
            ("save", ["same", "learned", "learned", "learned"]),
            ("delete", 0),
            ("save", ["learned", "learned", "learned", "longer"]),
            ("save", ["learned", "learned", "learned", "learned"]),
            ("delete", 1),
        ]
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=20, deadline=None)
@given(plan=steps)
def test_any_history_can_be_read(plan: list[tuple[str, object]]) -> None:
    run_history(plan)


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_deltas import at, history, open_node, save_all

async def main(folder):
    async with open_node(folder) as node:
        await save_all(node, history(3))

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("failpoint", [f"{one}:3" for one in REMOTE_FLUSH])
async def test_a_flush_of_differences_that_is_killed_is_done_after_all(
    tmp_path: Path, failpoint: str
) -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)],
        env={**os.environ, VARIABLE: failpoint},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    found = await recover(f"file://{tmp_path / 'object'}", tmp_path / "recovered")
    assert found.left_out == []
    assert found.num_generations >= 2
    shutil.rmtree(tmp_path / "object" / "owner", ignore_errors=True)
    async with open_node(tmp_path) as node:
        await node.settle(FLUSH)
        for step, data in enumerate(history(3)):
            assert await read_remote(node, step) == data
        assert num_layers(await remote_list(node, 2)) == 3
