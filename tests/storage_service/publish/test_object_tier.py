"""Into the object tier, out of it, and back from it alone."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    DELETE,
    FLUSH,
    GARBAGE,
    enqueue,
    job_of,
    list_jobs,
)
from forebay_server.config import load_config
from forebay_server.model.extents import ObjectBlob
from forebay_server.publish.dataset import Datasets, ShardCommit, VersionCommit
from forebay_server.publish.recovery import Recovered, recover
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.storage import UID
from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    IntegrityError,
    NotFound,
    StorageError,
)
from forebay_wire.failpoints import REMOTE_FLUSH
from forebay_wire.ids import GenerationId, new_random_name
from forebay_wire.limits import KIB, MIB
from forebay_wire.manifest import KIND_GENERATION, DatasetManifest, encode


def objects(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / "object" / kind).glob("*"))


def damage(file: Path, offset: int = 100) -> None:
    with file.open("r+b") as stored:
        stored.seek(offset)
        byte = stored.read(1)
        stored.seek(offset)
        stored.write(bytes([byte[0] ^ 0x10]))


async def save_remote(node: CheckpointNode, step: int, *packs: bytes, attempt: int = 1) -> None:
    saved = await node.save(step, list(packs), attempt=attempt)
    assert (await node.wait(saved, "remote")).durability == "remote"


async def rebuild(folder: Path, target: Path) -> Recovered:
    """Lose everything but the object tier, and recover into *target*."""
    return await recover(f"file://{folder / 'object'}", target)


# ----------------------------------------------------------------------------------- publication


async def test_a_remote_generation_is_complete_without_the_catalog(tmp_path: Path) -> None:
    packs = [os.urandom(3 * MIB), os.urandom(5)]
    async with open_checkpoints(tmp_path) as node:
        await node.begin(num_ranks=2)
        await save_remote(node, 1, *packs)
        manifest = await node.manifest(GenerationId(RUN, 1, 1))
    (published,) = objects(tmp_path, "manifests")
    assert published.name == manifest.encode()[0]
    for pack, data in zip(manifest.packs, packs, strict=True):
        found = ObjectBlob.decode(
            (tmp_path / "object" / "blobs" / pack.blob).read_bytes(), "here", pack.blob
        )
        (extent,) = found.extents
        stored = (tmp_path / "object" / "data" / extent.file).read_bytes()
        assert len(stored) == extent.file_bytes
        assert stored[: extent.num_bytes] == data


async def test_blobs_that_generations_share_are_stored_once(tmp_path: Path) -> None:
    frozen = os.urandom(MIB)
    async with open_checkpoints(tmp_path) as node:
        await node.begin(num_ranks=2)
        for step in (1, 2, 3):
            await save_remote(node, step, frozen, os.urandom(100))
    assert len(objects(tmp_path, "data")) == len(objects(tmp_path, "blobs")) == 4
    assert len(objects(tmp_path, "manifests")) == 3


async def test_what_an_earlier_catalog_published_is_verified_and_taken_over(
    tmp_path: Path,
) -> None:
    data = os.urandom(MIB)
    async with open_checkpoints(tmp_path / "first") as node:
        await node.begin()
        await save_remote(node, 1, data)
    shutil.move(tmp_path / "first" / "object", tmp_path / "second" / "object")
    async with open_checkpoints(tmp_path / "second") as node:
        await node.begin()
        await save_remote(node, 7, data)
    assert len(objects(tmp_path / "second", "data")) == 1
    assert len(objects(tmp_path / "second", "manifests")) == 2


@pytest.mark.parametrize("what", ["list damaged", "file damaged", "file gone"])
async def test_what_an_earlier_catalog_left_damaged_is_published_again(
    tmp_path: Path, what: str
) -> None:
    data = os.urandom(MIB)
    async with open_checkpoints(tmp_path / "first") as node:
        await node.begin()
        await save_remote(node, 1, data)
    (stored,) = objects(tmp_path / "first", "data")
    (listed,) = objects(tmp_path / "first", "blobs")
    if what == "list damaged":
        damage(listed, 50)
    elif what == "file damaged":
        damage(stored, 1000)
    else:
        stored.unlink()
    shutil.move(tmp_path / "first" / "object", tmp_path / "second" / "object")
    async with open_checkpoints(tmp_path / "second") as node:
        await node.begin()
        await save_remote(node, 7, data)
    found = await rebuild(tmp_path / "second", tmp_path / "third")
    assert (found.num_generations, found.left_out) == (2, [])


async def test_a_damaged_local_copy_is_never_published(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, run_jobs=False) as node:
        await node.begin()
        saved = await node.save(1, [os.urandom(MIB)])
        await node.wait(saved)
    (file,) = (tmp_path / "ssd" / "files").glob("*/*")
    damage(file)
    async with open_checkpoints(tmp_path) as node:
        with pytest.raises(IntegrityError, match="no good copy"):
            await node.wait(saved, "remote")
    assert objects(tmp_path, "manifests") == objects(tmp_path, "blobs") == []
    assert objects(tmp_path, "data") == []


async def test_a_copy_that_went_bad_in_the_object_tier_is_published_again(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(MIB))
        (pack,) = (await node.manifest(GenerationId(RUN, 1, 1))).packs
        located = (await node.storage.catalog.locate([pack.blob]))[pack.blob]
        (bad,) = (one for one in located.live() if one.tier == "object")
        await node.storage.catalog.write(lambda c: quarantine(c, bad.replica_id, "damaged"))
    (stored,) = objects(tmp_path, "data")
    damage(stored, 1000)
    async with open_checkpoints(tmp_path) as node:
        await node.wait(GenerationId(RUN, 1, 1), "remote")
    (listed,) = objects(tmp_path, "blobs")
    (extent,) = ObjectBlob.decode(listed.read_bytes(), "here", pack.blob).extents
    assert extent.file != stored.name


async def test_a_generation_is_remote_no_more_once_its_copy_there_is_bad(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(MIB))
        (pack,) = (await node.manifest(GenerationId(RUN, 1, 1))).packs
        located = (await node.storage.catalog.locate([pack.blob]))[pack.blob]
        (bad,) = (one for one in located.live() if one.tier == "object")
        (stored,) = objects(tmp_path, "data")
        damage(stored, 1000)
        await node.storage.catalog.write(lambda c: quarantine(c, bad.replica_id, "damaged"))
        info = await node.checkpoints.generations.look(GenerationId(RUN, 1, 1))
        assert info.durability == "local"
        node.jobs.wake()
        await node.wait(GenerationId(RUN, 1, 1), "remote")
    assert len(objects(tmp_path, "data")) == 2


async def test_a_deletion_waits_for_a_dropped_object_tier(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(MIB))
    async with open_checkpoints(tmp_path, with_object=False) as node:
        await node.checkpoints.delete_run(RUN)
        await node.settle(DELETE)
    assert len(objects(tmp_path, "manifests")) == 1
    async with open_checkpoints(tmp_path) as node:
        await node.settle(DELETE, COLLECT)
    assert objects(tmp_path, "manifests") == objects(tmp_path, "data") == []


async def test_an_object_tier_that_is_away_is_tried_again(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        place, away = tmp_path / "object", tmp_path / "away"
        place.rename(away)
        place.write_bytes(b"not a folder")
        saved = await node.save(1, [os.urandom(KIB)])
        waiting = asyncio.create_task(node.wait(saved, "remote"))
        info = await node.wait(saved)
        assert info.manifest is not None
        name = info.manifest

        def failed_try(connection: Connection) -> bool | None:
            job = job_of(connection, FLUSH, name)
            return True if job is not None and job.error else None

        assert await node.storage.catalog.wait_until(failed_try, 20)
        place.unlink()
        away.rename(place)
        assert (await waiting).durability == "remote"


KILLED = """
import asyncio, os, sys
from pathlib import Path
from forebay_server.testing.checkpoints import open_checkpoints

async def main(folder):
    async with open_checkpoints(folder) as node:
        await node.begin(num_ranks=2)
        saved = await node.save(1, [bytes([7]) * 300_000, bytes([8]) * 200_000])
        await node.wait(saved, "remote", 60)

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("failpoint", [*REMOTE_FLUSH, "flush.after_blob:2"])
async def test_a_flush_goes_on_after_a_kill_at_every_failpoint(
    tmp_path: Path, failpoint: str
) -> None:
    """Two blobs: at the second passing the first one is published already."""
    environment = {**os.environ, "FOREBAY_FAILPOINTS": failpoint}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    saved = GenerationId(RUN, 1, 1)
    async with open_checkpoints(tmp_path, grace_seconds=-1) as node:
        assert (await node.wait(saved, "remote")).durability == "remote"
        assert await node.restore(saved) == [bytes([7]) * 300_000, bytes([8]) * 200_000]
        await node.settle(COLLECT)
    assert len(objects(tmp_path, "blobs")) == len(objects(tmp_path, "data")) == 2
    found = await rebuild(tmp_path, tmp_path / "recovered")
    assert (found.num_generations, found.left_out) == (1, [])


@pytest.mark.parametrize(
    "failpoint",
    [
        "pack.before_seal",
        "pack.after_seal:2",
        "upload.before_publish:2",
        "upload.after_publish:2",
        "generation.before_commit",
        "generation.inside_commit",
        "generation.after_commit",
    ],
)
async def test_a_save_that_is_killed_leaves_a_whole_generation_or_none(
    tmp_path: Path, failpoint: str
) -> None:
    environment = {**os.environ, "FOREBAY_FAILPOINTS": failpoint}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    async with open_checkpoints(tmp_path) as node:
        await node.settle(COLLECT)
        if failpoint == "generation.after_commit":
            assert await node.latest() == "1/1"
            assert len(await node.restore(GenerationId(RUN, 1, 1))) == 2
        else:
            with pytest.raises(NotFound):
                await node.latest()
            assert node.storage.files() == []
        await node.begin(num_ranks=2)
        await node.wait(await node.save(1, [b"a", b"b"], attempt=2), "remote")


# -------------------------------------------------------------------------------------- deleting


async def test_a_deleted_generation_leaves_every_place_but_what_others_share(
    tmp_path: Path,
) -> None:
    frozen = os.urandom(MIB)
    async with open_checkpoints(tmp_path) as node:
        await node.begin(num_ranks=2)
        own = [os.urandom(1000) for _ in range(2)]
        await save_remote(node, 1, frozen, own[0])
        await save_remote(node, 2, frozen, own[1])
        assert await node.checkpoints.delete_generation(GenerationId(RUN, 1, 1)) == 1
        assert await node.checkpoints.delete_generation(GenerationId(RUN, 1, 1)) == 0
        await node.settle(DELETE, COLLECT)
        assert await node.restore(GenerationId(RUN, 1, 2)) == [frozen, own[1]]
        assert len(node.storage.files()) == 2
    assert len(objects(tmp_path, "manifests")) == 1
    assert len(objects(tmp_path, "blobs")) == len(objects(tmp_path, "data")) == 2
    found = await rebuild(tmp_path, tmp_path / "recovered")
    assert (found.num_generations, found.left_out) == (1, [])


async def test_the_newest_can_be_deleted_and_latest_is_the_one_before(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        for step in (1, 2, 3):
            await node.wait(await node.save(step, [os.urandom(100)]))
        await node.checkpoints.delete_generation(GenerationId(RUN, 1, 3))
        assert await node.latest() == "1/2"
        await node.begin((1, 2))
        with pytest.raises(Conflict, match="is what attempt 2 restored"):
            await node.checkpoints.delete_generation(GenerationId(RUN, 1, 2))
        await node.wait(await node.save(3, [os.urandom(100)], attempt=2))
        await node.checkpoints.delete_generation(GenerationId(RUN, 1, 2))
        assert await node.latest() == "2/3"
        assert await node.latest(skip=("2/3",)) == "1/1"


async def test_a_deleted_run_is_gone_with_everything(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(100))
        await node.wait(await node.save(2, [os.urandom(100)]))
        half = await node.plan(GenerationId(RUN, 1, 3), 100)
        assert await node.checkpoints.delete_run(RUN) == 3
        with pytest.raises(NotFound):
            await node.latest()
        with pytest.raises(NotFound):
            await node.seal(half, bytes(100))
        await node.settle(DELETE, COLLECT)
        assert node.storage.files() == objects(tmp_path, "data") == []
        assert objects(tmp_path, "manifests") == objects(tmp_path, "blobs") == []
        assert (await node.begin()).attempt == 1
        await save_remote(node, 1, os.urandom(100))


async def test_a_blob_that_a_client_has_open_stays_until_it_is_released(tmp_path: Path) -> None:
    is_open = True
    async with open_checkpoints(tmp_path, is_open=lambda blob: is_open) as node:
        await node.begin()
        await node.wait(await node.save(1, [os.urandom(100)]))
        await node.checkpoints.delete_run(RUN)
        refused = await node.storage.catalog.wait_until(_refused_collection, 20)
        assert refused is not None
        assert "1 deleted blobs are still open" in refused
        assert len(node.storage.files()) == 1
        is_open = False
        await node.settle(COLLECT)
        assert node.storage.files() == []


def _refused_collection(connection: Connection) -> str | None:
    return next((job.error for job in list_jobs(connection, 10) if job.error), None)


async def test_stray_files_go_after_the_grace_period_and_not_before(tmp_path: Path) -> None:
    names = ["0" * 32, "1" * 32]

    async def scatter(node: CheckpointNode) -> None:
        node.storage.tiers.landing[0].put(names[0], b"stray")
        assert node.storage.tiers.object is not None
        node.storage.tiers.object.put(f"data/{names[1]}", b"stray")

    async with open_checkpoints(tmp_path) as node:
        await node.settle(COLLECT)
        await scatter(node)
        await node.storage.catalog.write(lambda c: enqueue(c, COLLECT, GARBAGE))
        node.jobs.wake()
        await node.settle(COLLECT)
        assert node.storage.files() == names[:1]
        assert len(objects(tmp_path, "data")) == 1
    async with open_checkpoints(tmp_path, grace_seconds=-1) as node:
        await node.settle(COLLECT)
        assert node.storage.files() == []
    assert objects(tmp_path, "data") == []


async def test_what_becomes_garbage_after_the_start_goes_without_another_one(
    tmp_path: Path,
) -> None:
    async with open_checkpoints(tmp_path, grace_seconds=-1, repeat_seconds=0.2) as node:
        await node.settle(COLLECT)
        assert node.storage.tiers.object is not None
        node.storage.tiers.object.put(f"data/{'1' * 32}", b"what a killed flush left")
        stray = tmp_path / "object" / "data" / ("1" * 32)
        async with asyncio.timeout(20):
            while stray.exists():  # noqa: ASYNC110 - the search runs by a clock
                await asyncio.sleep(0.02)


async def test_a_scheduled_search_is_no_work_to_wait_for_and_can_be_asked_for(
    tmp_path: Path,
) -> None:
    async with open_checkpoints(tmp_path, grace_seconds=-1) as node:
        await node.settle(COLLECT)
        catalog = node.storage.catalog
        assert await catalog.read(lambda connection: list_jobs(connection, 10)) == []
        node.storage.tiers.landing[0].put("0" * 32, b"stray")
        await catalog.write(lambda c: enqueue(c, COLLECT, GARBAGE))
        node.jobs.wake()
        await node.settle(COLLECT)
        assert node.storage.files() == []


async def test_another_daemons_objects_are_not_stray(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path / "first") as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(MIB))
    shutil.move(tmp_path / "first" / "object", tmp_path / "second" / "object")
    async with open_checkpoints(tmp_path / "second", grace_seconds=-1) as node:
        await node.settle(COLLECT)
    assert len(objects(tmp_path / "second", "data")) == 1


# -------------------------------------------------------------------------------------- recovery


async def test_everything_remote_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved: dict[GenerationId, list[bytes]] = {}
    async with open_checkpoints(tmp_path) as node:
        await node.begin(num_ranks=2)
        for step in (10, 20, 30):
            packs = [os.urandom(300 * KIB), os.urandom(step)]
            saved[GenerationId(RUN, 1, step)] = packs
            made = await node.save(
                step,
                packs,
                metrics_json=json.dumps({"loss": 1 / step}),
                dataset_json=json.dumps({"dataset": "d", "position": {"batch": step}}),
            )
            await node.wait(made, "remote")
        await node.begin((1, 10), num_ranks=1)
        await save_remote(node, 20, b"again", attempt=2)
        saved[GenerationId(RUN, 2, 20)] = [b"again"]
        before = [await node.checkpoints.generations.look(one) for one in saved]
        manifests = [await node.manifest(one) for one in saved]
    found = await rebuild(tmp_path, tmp_path / "new")
    assert (found.num_runs, found.num_generations, found.left_out) == (1, 4, [])
    assert (tmp_path / "new" / "forebay.toml").is_file()
    told = load_config({"data": tmp_path / "new"}, {}).config
    assert told.object_location == f"file://{tmp_path / 'object'}"
    shutil.move(tmp_path / "object", tmp_path / "new" / "object")
    async with open_checkpoints(tmp_path / "new") as node:
        after = [await node.checkpoints.generations.look(one) for one in saved]
        assert after == before
        assert [await node.manifest(one) for one in saved] == manifests
        assert [await node.restore(one) for one in saved] == list(saved.values())
        assert await node.latest() == "2/20"
        assert await node.latest(skip=("2/20",)) == "1/10"
        assert (await node.begin((2, 20))).attempt == 3
        await save_remote(node, 30, b"more", attempt=3)


async def test_datasets_come_back_with_versions_and_selections(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        storage = node.storage
        datasets = Datasets(storage.catalog, storage.uploads, node.jobs)
        for base in (0, 1):
            landed = await storage.upload(os.urandom(100 * KIB))
            shard = ShardCommit(landed.session, landed.blob, 100 * KIB, 10, (10,))
            commit = VersionCommit("d", base, b"schema", (shard,), new_random_name())
            await datasets.commit_version(commit, UID)
            await datasets.define_splits("d", base + 1, {"train": 0.8, "test": 0.2}, 0)
        await node.settle(FLUSH)
        before = await datasets.get("d")
        manifest = await node.parse_manifest(before.versions[1].manifest)
        assert isinstance(manifest, DatasetManifest)
        parts = {blob: await node.read_blob(blob) for blob in manifest.blobs()}
    found = await rebuild(tmp_path, tmp_path / "new")
    assert (found.num_datasets, found.num_versions, found.num_selections) == (1, 2, 4)
    assert found.left_out == []
    shutil.move(tmp_path / "object", tmp_path / "new" / "object")
    async with open_checkpoints(tmp_path / "new") as node:
        after = await Datasets(node.storage.catalog, node.storage.uploads, node.jobs).get("d")
        assert [one.manifest for one in after.versions] == [one.manifest for one in before.versions]
        assert {one.durability for one in after.versions} == {"remote"}
        assert after.selections == before.selections
        assert [await node.read_blob(blob) for blob in parts] == list(parts.values())


async def test_a_selection_without_its_version_is_left_out(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        storage = node.storage
        datasets = Datasets(storage.catalog, storage.uploads, node.jobs)
        landed = await storage.upload(os.urandom(KIB))
        shard = ShardCommit(landed.session, landed.blob, KIB, 10, (10,))
        made = await datasets.commit_version(
            VersionCommit("d", 0, b"schema", (shard,), new_random_name()), UID
        )
        await datasets.define_splits("d", 1, {"train": 0.5}, 0)
        await node.settle(FLUSH)
    (tmp_path / "object" / "manifests" / made.manifest).unlink()
    found = await rebuild(tmp_path, tmp_path / "new")
    assert (found.num_datasets, found.num_selections) == (0, 0)
    assert [one.what for one in found.left_out] == ["selection train of version 1 of dataset d"]


async def test_what_is_not_remote_is_not_recovered(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, b"one")
    async with open_checkpoints(tmp_path, run_jobs=False) as node:
        await node.wait(await node.save(2, [b"two"]))
    found = await rebuild(tmp_path, tmp_path / "new")
    assert found.num_generations == 1


async def test_a_folder_with_a_catalog_is_refused(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, b"one")
    with pytest.raises(AlreadyExists, match="empty folder"):
        await rebuild(tmp_path, tmp_path)


async def test_an_object_tier_without_manifests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "object").mkdir()
    with pytest.raises(NotFound, match="is the URL right"):
        await rebuild(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new" / "catalog.sqlite").exists()
    assert not (tmp_path / "new" / "forebay.toml").exists()


async def test_a_recovery_that_was_interrupted_is_begun_again(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, b"one")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "catalog-recovering.sqlite").write_bytes(b"half")
    found = await rebuild(tmp_path, tmp_path / "new")
    assert found.num_generations == 1


@pytest.mark.parametrize(
    ("kind", "hurt"),
    [
        ("manifests", "flip"),
        ("manifests", "cut"),
        ("blobs", "flip"),
        ("blobs", "cut"),
        ("blobs", "remove"),
        ("data", "cut"),
        ("data", "remove"),
        ("data", "flip table"),
    ],
)
async def test_a_damaged_piece_is_reported_and_what_it_belongs_to_left_out(
    tmp_path: Path, kind: str, hurt: str
) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, os.urandom(10 * KIB))
        whole = {
            path for kind in ("manifests", "blobs", "data") for path in objects(tmp_path, kind)
        }
        await save_remote(node, 2, os.urandom(10 * KIB))
    (victim,) = set(objects(tmp_path, kind)) - whole
    if hurt == "flip":
        damage(victim)
    elif hurt == "flip table":
        damage(victim, 10 * KIB + 40)
    elif hurt == "cut":
        os.truncate(victim, victim.stat().st_size - 1)
    else:
        victim.unlink()
    found = await rebuild(tmp_path, tmp_path / "new")
    assert found.num_generations == 1
    (left,) = found.left_out
    assert left.what.startswith("manifest " if kind == "manifests" else "generation run@1/2")
    assert found.as_json()["left_out"] == [{"what": left.what, "reason": left.reason}]
    shutil.move(tmp_path / "object", tmp_path / "new" / "object")
    async with open_checkpoints(tmp_path / "new") as node:
        assert await node.latest() == "1/1"


async def test_something_else_among_the_manifests_is_reported(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        await save_remote(node, 1, b"one")
    identity, data = encode(KIND_GENERATION, {"run": "x"})
    (tmp_path / "object" / "manifests" / identity).write_bytes(data)
    (tmp_path / "object" / "manifests" / "notes.txt").write_bytes(b"hello")
    found = await rebuild(tmp_path, tmp_path / "new")
    assert found.num_generations == 1
    assert len(found.left_out) == 2


async def test_an_unreachable_url_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "object").write_bytes(b"a file")
    with pytest.raises(StorageError):
        await rebuild(tmp_path, tmp_path / "new")
