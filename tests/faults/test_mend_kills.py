"""Mending that is killed at any of its steps: nothing is lost or left, and the next one ends."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from forebay_server.catalog.queries_blobs import known_files
from forebay_server.catalog.queries_jobs import REPAIR
from forebay_server.move.jobs import take_over_jobs
from forebay_server.publish.reconcile import reconcile
from forebay_server.testing.checkpoints import CUT_BYTES, RUN, open_checkpoints
from forebay_server.testing.integrity import flip, open_integrity
from forebay_server.testing.warm import WarmPython
from forebay_wire.failpoints import MEND, VARIABLE
from forebay_wire.ids import GenerationId

REPAIRER = Path(__file__).with_name("repair_blob.py")
QUICK = ("mend.after_rows",)


@pytest.mark.parametrize(
    "point",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in MEND],
)
async def test_mending_killed_anywhere_is_followed_by_one_that_ends(
    point: str, tmp_path: Path, warm_server: WarmPython
) -> None:
    base = os.urandom(4 * CUT_BYTES)
    packs = [("other", 1, base + b"0"), *((RUN, step, base + bytes([step])) for step in (1, 2, 3))]
    blobs: dict[str, bytes] = {}
    async with open_checkpoints(tmp_path, with_object=False) as node:
        for run, step, data in packs:
            if step == 1:
                await node.begin(run=run)
            await node.wait(await node.save(step, [data], run=run))
            pack = (await node.manifest(GenerationId(run, 1, step))).packs[0].blob
            blobs[pack] = data
    async with open_integrity(tmp_path) as node:
        shared = (await node.node.locate(pack)).replicas[0].extents[1].file
        (path,) = (tmp_path / "ssd").rglob(shared)
        flip(path, 2 * CUT_BYTES)
        assert (await node.scrub()).num_damaged == 3
    done = await asyncio.to_thread(warm_server.run, [REPAIRER, tmp_path], {VARIABLE: point})
    assert done.returncode == -signal.SIGKILL, "the failpoint was not passed"
    async with open_integrity(tmp_path) as node:
        # As a start of the daemon does it.
        await reconcile(node.node.catalog, node.node.tiers)
        await take_over_jobs(node.node.catalog)
        assert not any(error for _, error in await node.run_queued(REPAIR))
        for blob in blobs:
            assert await node.states(blob) == [("ssd", "live")]
            await node.check_copies(blob)
        files = await node.node.catalog.read(lambda c: known_files(c, "ssd"))
        assert node.files("ssd") == sorted(files)
        assert shared not in files
        assert (await node.integrity.fsck(repair=False)).found == []
