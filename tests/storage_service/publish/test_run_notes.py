"""Tags, pins, notes, policies and forks come back from the object tier and from the trash."""

import json
import os
from pathlib import Path

from forebay_server.catalog.queries_jobs import DELETE, NOTES, RETAIN, TOMBSTONE
from forebay_server.publish.managing import RunDetail
from forebay_server.publish.recovery import Recovered, recover
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_wire.ids import GenerationId
from forebay_wire.keep import Keep
from forebay_wire.limits import KIB

FIRST, SECOND = GenerationId(RUN, 1, 1), GenerationId(RUN, 1, 2)
KEEP = Keep(last=3)


async def rebuild(folder: Path, target: Path) -> Recovered:
    return await recover(f"file://{folder / 'object'}", target)


async def fill(node: CheckpointNode) -> None:
    """A run that was forked, with everything that people can say about it."""
    await node.begin(run="base")
    base = await node.save(5, [os.urandom(KIB)], run="base")
    await node.wait(base, "remote")
    await node.begin(fork=base, keep=KEEP)
    for step, told in ((1, {"tags": ("good",), "note_json": json.dumps({"a": 1})}), (2, {})):
        await node.wait(await node.save(step, [os.urandom(KIB)], **told), "remote")
    await node.checkpoints.managing.tag(SECOND, "newer")
    await node.checkpoints.managing.pin(FIRST, "for the paper", 0)
    await node.settle(NOTES)


async def check(node: CheckpointNode) -> None:
    detail: RunDetail = await node.checkpoints.managing.detail(RUN)
    assert [(one.tag, one.step) for one in detail.tags] == [("good", 1), ("newer", 2)]
    assert detail.keep_json == KEEP.to_json()
    assert detail.fork == GenerationId("base", 1, 5)
    info = await node.checkpoints.generations.look(FIRST)
    assert (info.pin, info.note_json, info.tags) == ("for the paper", '{"a": 1}', ("good",))
    assert info.local_unix > 0


async def test_what_was_said_is_recovered(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await fill(node)
    assert (await rebuild(tmp_path, tmp_path / "again")).left_out == []
    (tmp_path / "again" / "object").symlink_to(tmp_path / "object")
    async with open_checkpoints(tmp_path / "again") as node:
        await check(node)
        await node.checkpoints.managing.untag(RUN, "newer")
        await node.settle(NOTES)
        assert len(list((tmp_path / "object" / "runs" / RUN).iterdir())) == 1


async def test_damaged_notes_are_left_out_and_an_older_whole_one_counts(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await fill(node)
    [file] = (tmp_path / "object" / "runs" / RUN).iterdir()
    newer = file.with_name("9" * 20)
    newer.write_bytes(file.read_bytes()[:-1])
    assert (await rebuild(tmp_path, tmp_path / "older")).left_out == []
    (tmp_path / "older" / "object").symlink_to(tmp_path / "object")
    async with open_checkpoints(tmp_path / "older") as node:
        await check(node)
    for each in (tmp_path / "object" / "runs" / RUN).iterdir():
        each.write_bytes(b"nothing")
    found = await rebuild(tmp_path, tmp_path / "none")
    assert [one.what for one in found.left_out] == [f"what was said about run {RUN}"]
    assert found.num_generations == 3


async def test_notes_of_another_run_of_that_name_do_not_count(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await fill(node)
        [file] = (tmp_path / "object" / "runs" / RUN).iterdir()
        said = file.read_bytes()
        await node.checkpoints.delete_run_now(RUN)
        await node.settle(NOTES)
        assert not file.exists()
        await node.begin()
        await node.wait(await node.save(1, [os.urandom(KIB)], attempt=2), "remote")
    file.write_bytes(said)
    await rebuild(tmp_path, tmp_path / "again")
    (tmp_path / "again" / "object").symlink_to(tmp_path / "object")
    async with open_checkpoints(tmp_path / "again") as node:
        detail = await node.checkpoints.managing.detail(RUN)
        assert (detail.tags, detail.keep_json, detail.fork) == ((), "", None)


async def test_what_was_said_comes_back_from_the_trash(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path, trash_seconds=60.0) as node:
        await fill(node)
        await node.checkpoints.delete_run(RUN)
        await node.trash.restore(f"run {RUN}")
        await node.settle(TOMBSTONE)
        await node.settle(NOTES)
        await check(node)
        assert len(list((tmp_path / "object" / "runs" / RUN).iterdir())) == 1


async def test_what_is_pruned_leaves_the_object_tier_too(tmp_path: Path) -> None:
    async with open_checkpoints(tmp_path) as node:
        await node.begin(keep=Keep(last=1))
        for step in (1, 2):
            await node.wait(await node.save(step, [os.urandom(KIB)]), "remote")
        for kind in (RETAIN, DELETE):
            await node.settle(kind)
        assert len(list((tmp_path / "object" / "manifests").iterdir())) == 1
