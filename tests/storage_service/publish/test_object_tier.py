"""Into the object tier, and kills on the way there."""

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_jobs import (
    COLLECT,
    DELETE,
    FLUSH,
    job_of,
)
from forebay_server.model.extents import ObjectBlob
from forebay_server.publish.recovery import Recovered, recover
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.warm import WarmPython
from forebay_wire.errors import (
    IntegrityError,
    NotFound,
)
from forebay_wire.failpoints import REMOTE_FLUSH
from forebay_wire.ids import GenerationId
from forebay_wire.limits import KIB, MIB


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
        await node.begin(run="another")
        await node.wait(await node.save(7, [data], run="another"), "remote")
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
    tmp_path: Path, failpoint: str, warm_server: WarmPython
) -> None:
    """Two blobs: at the second passing the first one is published already."""
    command = ["-c", KILLED, tmp_path]
    done = await asyncio.to_thread(warm_server.run, command, {"FOREBAY_FAILPOINTS": failpoint})
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = GenerationId(RUN, 1, 1)
    async with open_checkpoints(tmp_path) as node:
        assert (await node.wait(saved, "remote")).durability == "remote"
    async with open_checkpoints(tmp_path, grace_seconds=-1) as node:
        await node.settle(COLLECT)
        assert await node.restore(saved) == [bytes([7]) * 300_000, bytes([8]) * 200_000]
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
    tmp_path: Path, failpoint: str, warm_server: WarmPython
) -> None:
    command = ["-c", KILLED, tmp_path]
    done = await asyncio.to_thread(warm_server.run, command, {"FOREBAY_FAILPOINTS": failpoint})
    assert done.returncode == -signal.SIGKILL, done.stderr
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
