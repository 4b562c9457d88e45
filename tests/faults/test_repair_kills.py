"""A repair that is killed at every named step: the good copy stays, and the next try finishes."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from forebay_server.catalog.queries_jobs import COPY, FLUSH, REPAIR
from forebay_server.move.copy import copy_target
from forebay_server.move.jobs import take_over_jobs
from forebay_server.publish.reconcile import reconcile
from forebay_server.testing.integrity import flip, open_integrity
from forebay_server.testing.warm import WarmPython
from forebay_wire.failpoints import REPAIR as REPAIR_POINTS
from forebay_wire.failpoints import VARIABLE

REPAIRER = Path(__file__).with_name("repair_blob.py")
CASES = [
    *[(tier, point) for tier in ("hdd", "object") for point in REPAIR_POINTS],
    *[("hdd", point) for point in ("copy.before_file", "copy.after_file", "copy.after_row")],
    *[("object", point) for point in ("flush.after_blob", "flush.after_extents")],
]


@pytest.mark.parametrize(("bad", "point"), CASES)
async def test_a_repair_killed_anywhere_is_followed_by_one_that_finishes(
    bad: str, point: str, tmp_path: Path, warm_server: WarmPython
) -> None:
    async with open_integrity(tmp_path) as node:
        await reconcile(node.node.catalog, node.node.tiers)
        _, (blob,) = await node.add_dataset([os.urandom(60_000)])
        await node.run_queued(FLUSH)
        await node.run(COPY, copy_target(blob, "hdd"))
        flip(await node.node.path_of(blob, bad), 7)
        assert (await node.scrub(bad)).num_damaged == 1
    done = await asyncio.to_thread(warm_server.run, [REPAIRER, tmp_path], {VARIABLE: point})
    assert done.returncode == -signal.SIGKILL, "the failpoint was not passed"
    async with open_integrity(tmp_path) as node:
        await node.check_copies(blob)
        assert ("ssd", "live") in await node.states(blob)
        # As a start of the daemon does it.
        await reconcile(node.node.catalog, node.node.tiers)
        assert await take_over_jobs(node.node.catalog) == 1
        assert not any(error for _, error in await node.run_queued(REPAIR, FLUSH))
        assert await node.states(blob) == [(tier, "live") for tier in ("hdd", "object", "ssd")]
        await node.check_copies(blob)
        for name in ("hdd", "ssd"):
            (replica,) = [r for r in (await node.node.locate(blob)).live() if r.tier == name]
            assert node.files(name) == [replica.extents[0].file]
        assert (await node.integrity.fsck(repair=False)).found == []
