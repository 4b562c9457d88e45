"""Back from the object tier alone."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from forebay_server.catalog.queries_jobs import (
    FLUSH,
)
from forebay_server.config import load_config
from forebay_server.publish.dataset import Datasets, VersionCommit
from forebay_server.publish.recovery import Recovered, recover
from forebay_server.publish.shards import ShardCommit
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.storage import UID
from forebay_wire.errors import (
    AlreadyExists,
    NotFound,
    StorageError,
)
from forebay_wire.ids import GenerationId, new_random_name
from forebay_wire.limits import KIB
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
        times = {"ram_unix": 0.0, "local_unix": 0.0, "remote_unix": 0.0}
        assert [replace(one, **times) for one in after] == [replace(one, **times) for one in before]
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
            await datasets.define_folds("d", base + 1, 2, 0, "inner", "train")
        await node.settle(FLUSH)
        before = await datasets.get("d")
        manifest = await node.parse_manifest(before.versions[1].manifest)
        assert isinstance(manifest, DatasetManifest)
        parts = {blob: await node.read_blob(blob) for blob in manifest.blobs()}
    found = await rebuild(tmp_path, tmp_path / "new")
    assert (found.num_datasets, found.num_versions, found.num_selections) == (1, 2, 12)
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
