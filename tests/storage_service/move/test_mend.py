"""Damaged files are put together anew from good segments, wherever those lie."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from forebay_server.catalog.queries_blobs import known_files, remove_replica
from forebay_server.catalog.queries_jobs import COPY, FLUSH, REPAIR
from forebay_server.move.copy import copy_target
from forebay_server.testing.checkpoints import CUT_BYTES, RUN, open_checkpoints
from forebay_server.testing.integrity import IntegrityNode, flip, open_integrity
from forebay_server.tier.encode import open_plain
from forebay_server.tier.verify import verify_file
from forebay_wire.ids import GenerationId

SEGMENTS = 4
BASE = os.urandom(SEGMENTS * CUT_BYTES)


@dataclass(frozen=True)
class Saved:
    """Packs by name, and their bytes."""

    blobs: dict[str, str]
    data: dict[str, bytes]


async def save(
    folder: Path, packs: dict[str, Sequence[bytes]], durability: str = "local", **options: object
) -> Saved:
    """Run to the pack of each of its steps, from 1."""
    found = Saved({}, {})
    async with open_checkpoints(folder, with_object=durability == "remote", **options) as node:
        for run, steps in packs.items():
            await node.begin(run=run)
            for step, data in enumerate(steps, 1):
                saved = await node.save(step, [data], run=run)
                await node.wait(saved, durability)
                name = f"{run}/{step}"
                found.blobs[name] = (await node.manifest(GenerationId(run, 1, step))).packs[0].blob
                found.data[name] = data
    return found


async def extents(node: IntegrityNode, blob: str, tier: str = "ssd") -> list[tuple[str, int, int]]:
    """File, offset and length of the pieces of *blob* in *tier*."""
    (copy,) = [one for one in (await node.node.locate(blob)).replicas if one.tier == tier]
    return [(one.file, one.file_offset, one.num_bytes) for one in copy.extents if one.num_bytes]


def path_of(folder: Path, file: str, tier: str = "ssd") -> Path:
    (path,) = [path for path in (folder / tier).rglob(file) if path.is_file()]
    return path


async def check(node: IntegrityNode, folder: Path, saved: Saved, names: Sequence[str]) -> None:
    """All of *names* are what was saved, in one copy in service, and nothing else lies there."""
    for name in names:
        blob = saved.blobs[name]
        live = [one for one in (await node.node.locate(blob)).live() if one.tier == "ssd"]
        assert [name for _ in live] == [name]
        tier, file = node.node.tiers.get("ssd"), live[0].extents[0].file
        with open_plain(tier, file, live[0].encoding, blob) as reader:
            data = bytearray(verify_file(reader, blob).total_bytes)
            reader.read_into(0, data)
        assert bytes(data) == saved.data[name]
    files = await node.node.catalog.read(lambda c: known_files(c, "ssd"))
    assert node.files("ssd") == sorted(files)
    for name, size in files.items():
        assert path_of(folder, name).stat().st_size == size


def steps(number: int) -> list[bytes]:
    return [BASE + os.urandom(CUT_BYTES) for _ in range(number)]


async def test_a_base_that_eight_share_is_written_once_more(tmp_path: Path) -> None:
    saved = await save(tmp_path, {"other": [BASE + b"other"], RUN: steps(8)})
    async with open_integrity(tmp_path) as node:
        first = saved.blobs[f"{RUN}/1"]
        ((file, _, _),) = await extents(node, first)
        assert (await extents(node, saved.blobs[f"{RUN}/8"]))[0][0] == file
        flip(path_of(tmp_path, file), CUT_BYTES + 5)
        before = set(node.files("ssd"))
        assert (await node.scrub()).num_damaged == 8
        assert [error for _, error in await node.run_queued(REPAIR)] == [""] * 8
        await check(node, tmp_path, saved, list(saved.blobs))
        new = set(node.files("ssd")) - before
        sizes = sorted(path_of(tmp_path, name).stat().st_size for name in new)
        assert len(sizes) == 8, "one file, and a list for each that shares it"
        assert sizes[-1] < len(saved.data[f"{RUN}/1"]) + 4096
        assert sum(sizes[:-1]) < 7 * 4096
        assert file not in node.files("ssd")
        assert (await node.scrub()).num_damaged == 0
        assert (await node.integrity.fsck(repair=False)).found == []


async def test_two_copies_each_of_which_has_what_the_other_lacks(tmp_path: Path) -> None:
    saved = await save(tmp_path, {RUN: steps(2)}, "remote")
    async with open_integrity(tmp_path) as node:
        first = saved.blobs[f"{RUN}/1"]
        flip(path_of(tmp_path, (await extents(node, first))[0][0]), 5)
        flip(
            path_of(tmp_path, (await extents(node, first, "object"))[0][0], "object"), 3 * CUT_BYTES
        )
        assert (await node.scrub()).num_damaged == 4
        assert not any(error for _, error in await node.run_queued(REPAIR, FLUSH))
        await check(node, tmp_path, saved, list(saved.blobs))
        for blob in saved.blobs.values():
            assert await node.states(blob) == [("object", "live"), ("ssd", "live")]
            await node.check_copies(blob)
        assert (await node.scrub()).num_damaged == 0
        assert (await node.integrity.fsck(repair=False)).found == []


async def test_what_is_good_nowhere_stays_and_is_named(tmp_path: Path) -> None:
    """And what else shared its file, and does not need that segment, is mended."""
    packs = steps(2)
    saved = await save(tmp_path, {"other": [BASE + b"other"], RUN: packs})
    async with open_integrity(tmp_path) as node:
        first, second = (saved.blobs[f"{RUN}/{step}"] for step in (1, 2))
        ((file, _, _),) = await extents(node, first)
        path = path_of(tmp_path, file)
        flip(path, 5)  # the other run has it
        flip(path, SEGMENTS * CUT_BYTES + 5)  # what only the first step had
        before = path.read_bytes()
        assert (await node.scrub()).num_damaged == 2
        errors = {job.target: error for job, error in await node.run_queued(REPAIR)}
        assert errors.pop(f"{second} ssd") == ""
        (error,) = errors.values()
        for word in (first, "tier ssd", file, f"segments {SEGMENTS} are bad", f"why {first}"):
            assert word in error
        assert await node.states(first) == [("ssd", "quarantined")]
        assert path.read_bytes() == before
        await check(node, tmp_path, saved, [f"{RUN}/2", "other/1"])
        assert file not in {piece[0] for piece in await extents(node, second)}
    # It comes back with the next pack that has it.
    await save(tmp_path, {"late": [packs[0][-CUT_BYTES:]]})
    async with open_integrity(tmp_path) as node:
        assert (await node.scrub()).num_damaged == 0
        assert not any(error for _, error in await node.run_queued(REPAIR))
        await check(node, tmp_path, saved, list(saved.blobs))
        assert not path.exists()


async def test_a_table_or_a_list_that_is_lost_is_made_from_what_others_say(tmp_path: Path) -> None:
    """The table behind a file from the lists of those that share it, a list from the tables."""
    saved = await save(tmp_path, {RUN: [BASE, BASE + b"new", BASE + b"newer"]})
    async with open_integrity(tmp_path) as node:
        first, second = (saved.blobs[f"{RUN}/{step}"] for step in (1, 2))
        ((file, _, num_bytes),) = await extents(node, first)
        (copy,) = (await node.node.locate(second)).replicas
        flip(path_of(tmp_path, copy.extents[0].file), 60)
        flip(path_of(tmp_path, file), num_bytes + 60)
        assert (await node.scrub()).num_damaged == 2
        assert not any(error for _, error in await node.run_queued(REPAIR))
        await check(node, tmp_path, saved, list(saved.blobs))
        assert (await node.scrub()).num_damaged == 0


async def test_what_shares_a_lost_segment_goes_out_of_service_at_once(tmp_path: Path) -> None:
    """It is not waited for until somebody reads it: retention counts what is good."""
    saved = await save(tmp_path, {RUN: steps(3)})
    async with open_integrity(tmp_path) as node:
        first, *others = saved.blobs.values()
        ((file, _, _),) = await extents(node, first)
        flip(path_of(tmp_path, file), 5)
        assert not await node.node.opener.report(first, "ssd", 0, "XXH3 differs")
        errors = {job.target: error for job, error in await node.run_queued(REPAIR)}
        for blob in (first, *others):
            assert f"blob {blob} has no good copy left" in errors[f"{blob} ssd"]
            assert await node.states(blob) == [("ssd", "quarantined")]


async def test_a_copy_that_lies_encoded_and_a_plain_one_mend_each_other(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        node.node.tiers.get("hdd").encoding = "lz4"
        pieces = [bytes([number]) * 60_000 for number in range(4)]
        _, (blob,) = await node.add_dataset(pieces)
        await node.run(COPY, copy_target(blob, "hdd"))
        flip(await node.node.path_of(blob, "ssd"), 5)
        flip(await node.node.path_of(blob, "hdd"), 400)
        assert (await node.scrub()).num_damaged == 2
        assert not any(error for _, error in await node.run_queued(REPAIR))
        assert await node.states(blob) == [("hdd", "live"), ("ssd", "live")]
        await node.check_copies(blob)
        assert {one.encoding for one in (await node.node.locate(blob)).live()} == {"raw", "lz4"}


async def test_one_of_two_equal_segments_of_a_file(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset([b"twin" * 20_000] * 2)
        flip(await node.node.path_of(blob, "ssd"), 80_000 + 5)
        assert (await node.scrub()).num_damaged == 1
        assert not any(error for _, error in await node.run_queued(REPAIR))
        await node.check_copies(blob)
        assert await node.states(blob) == [("ssd", "live")]


@pytest.mark.parametrize("damage", [pytest.param("gone", marks=pytest.mark.slow), "cut short"])
async def test_a_file_that_is_gone_or_short_is_mended_for_all(damage: str, tmp_path: Path) -> None:
    saved = await save(tmp_path, {"other": [BASE + b"other"], RUN: [BASE, BASE + b"new"]})
    async with open_integrity(tmp_path) as node:
        ((file, _, _),) = await extents(node, saved.blobs[f"{RUN}/1"])
        path = path_of(tmp_path, file)
        path.chmod(0o600)
        path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-100_000])
        await node.scrub()
        assert not any(error for _, error in await node.run_queued(REPAIR))
        await check(node, tmp_path, saved, list(saved.blobs))


async def test_a_last_copy_in_the_object_tier_comes_back_by_way_of_a_local_one(
    tmp_path: Path,
) -> None:
    saved = await save(tmp_path, {RUN: steps(1), "other": [BASE + b"other"]}, "remote")
    async with open_integrity(tmp_path) as node:
        blob = saved.blobs[f"{RUN}/1"]
        flip(path_of(tmp_path, (await extents(node, blob, "object"))[0][0], "object"), 5)
        (local,) = [one for one in (await node.node.locate(blob)).live() if one.tier == "ssd"]
        gone = await node.node.catalog.write(lambda c: remove_replica(c, local.replica_id))
        for ref in gone:
            path_of(tmp_path, ref.file).unlink()
        assert (await node.scrub()).num_damaged == 1
        assert not any(error for _, error in await node.run_queued(REPAIR, FLUSH))
        assert await node.states(blob) == [("object", "live"), ("ssd", "live")]
        await node.check_copies(blob)
