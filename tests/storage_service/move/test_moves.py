"""Copying and migrating blobs between tiers: what stays, what goes, and in which order."""

import asyncio
import os
from pathlib import Path

import pytest

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_history import list_events
from forebay_server.catalog.queries_jobs import COPY, MIGRATE, claim, list_jobs
from forebay_server.catalog.queries_moves import give_up_replica
from forebay_server.move.budget import Budget
from forebay_server.move.copy import copy_target
from forebay_server.move.jobs import Progress
from forebay_server.move.migrate import migrate_target
from forebay_server.testing.moving import MovingNode, open_moving
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import Conflict
from forebay_wire.limits import KIB

PIECES = [os.urandom(64 * KIB), os.urandom(1000)]


async def read(moving: MovingNode, blob: str, tier: str) -> bytes:
    found = moving.node.tiers.get(tier)
    (replica,) = [one for one in (await moving.node.locate(blob)).live() if one.tier == tier]
    with found.read(found.blob_name(replica.extents[0].file)) as reader:
        data = bytearray(verify_file(reader, blob).total_bytes)
        reader.read_into(0, data)
    return bytes(data)


async def test_a_copy_is_there_with_the_same_bytes_and_the_source_stays(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        target = copy_target(blob, "hdd")
        await moving.queue(COPY, target)
        job = await moving.wait(COPY, target)
        assert (job.state, job.tries) == ("done", 1)
        assert await moving.tiers_of(blob) == ["hdd", "ssd"]
        assert await read(moving, blob, "hdd") == b"".join(PIECES)
        events = await moving.node.catalog.read(lambda c: list_events(c, [f"blob {blob}"], 10))
        assert [(one.event, one.detail) for one in events] == [("copied", "ssd to hdd")]


async def test_a_copy_that_is_there_already_and_one_of_an_unknown_blob_change_nothing(
    tmp_path: Path,
) -> None:
    async with open_moving(tmp_path) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd", "hdd")).blob_id
        before = moving.files("hdd")
        for target in (copy_target(blob, "hdd"), copy_target("0" * 64, "hdd")):
            await moving.queue(COPY, target)
            assert (await moving.wait(COPY, target)).state == "done"
        assert moving.files("hdd") == before


async def test_a_damaged_source_is_passed_over_and_quarantined(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd", "object")).blob_id
        path = await moving.node.path_of(blob, "ssd")
        damaged = bytearray(path.read_bytes())
        damaged[5] ^= 1
        path.chmod(0o600)
        path.write_bytes(damaged)
        target = copy_target(blob, "hdd")
        await moving.queue(COPY, target)
        assert (await moving.wait(COPY, target)).state == "done"
        assert await moving.tiers_of(blob) == ["hdd", "object"]
        assert await read(moving, blob, "hdd") == b"".join(PIECES)


async def test_a_blob_without_a_good_copy_is_given_up_with_the_reason(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        path = await moving.node.path_of(blob, "ssd")
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1])
        target = copy_target(blob, "hdd")
        await moving.queue(COPY, target)
        job = await moving.wait(COPY, target)
        assert job.state == "failed"
        assert "cut short" in job.error or "damaged" in job.error or "trailer" in job.error
        assert moving.files("hdd") == []


async def test_an_unknown_tier_is_refused_by_name(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        for tier in ("tape", "object"):
            await moving.queue(COPY, copy_target(blob, tier))
            job = await moving.wait(COPY, copy_target(blob, tier))
            assert job.state == "failed"
            assert f"not into '{tier}'" in job.error


async def test_a_migrated_blob_is_in_the_new_tier_only(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        (opened,) = await moving.node.opener.open("client", [blob])
        assert not isinstance(opened, Exception)
        opened.close()
        moving.node.opener.release("client", [blob])
        target = migrate_target(blob, "ssd", "hdd")
        await moving.queue(MIGRATE, target)
        assert (await moving.wait(MIGRATE, target)).state == "done"
        assert await moving.tiers_of(blob) == ["hdd"]
        assert moving.files("ssd") == []
        assert await read(moving, blob, "hdd") == b"".join(PIECES)
        (again,) = await moving.node.opener.open("client", [blob])
        assert not isinstance(again, Exception), "the place that was remembered is forgotten"
        assert again.tier == "hdd"
        again.close()


async def test_an_open_blob_is_copied_and_stays_until_it_is_released(tmp_path: Path) -> None:
    is_open = True
    async with open_moving(tmp_path, is_open=lambda blob: is_open) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        target = migrate_target(blob, "ssd", "hdd")
        await moving.queue(MIGRATE, target)
        shown = await moving.node.catalog.wait_until(_refusal, 20)
        assert shown is not None
        assert "is open in a client" in shown
        assert await moving.tiers_of(blob) == ["hdd", "ssd"]
        is_open = False
        assert (await moving.wait(MIGRATE, target)).state == "done"
        assert await moving.tiers_of(blob) == ["hdd"]


def _refusal(connection: Connection) -> str | None:
    return next((job.error for job in list_jobs(connection, 10) if job.error), None)


async def test_the_only_copy_and_the_object_tiers_are_never_given_up(tmp_path: Path) -> None:
    async with open_moving(tmp_path, run_jobs=False) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        write = moving.node.catalog.write
        among = ["ssd", "hdd", "object"]
        with pytest.raises(Conflict, match="no other copy"):
            await write(lambda c: give_up_replica(c, blob, "ssd", "x", "y", among=among))
        await moving.node.add_blob(PIECES, "object")
        with pytest.raises(Conflict, match="as durable as the object tier"):
            await write(lambda c: give_up_replica(c, blob, "object", "x", "y", among=among))
        with pytest.raises(Conflict, match="no other copy"):
            await write(lambda c: give_up_replica(c, blob, "ssd", "x", "y", among=["ssd"]))
        assert await write(lambda c: give_up_replica(c, blob, "ssd", "x", "y", among=among))
        assert await write(lambda c: give_up_replica(c, blob, "ssd", "x", "y", among=among)) == []
        assert await moving.tiers_of(blob) == ["object"]


async def test_a_mover_that_wakes_up_late_takes_nothing_away(tmp_path: Path) -> None:
    """It stood still between the copy and the removal; its lease ran out; another one has taken
    the job over, and what was to be left is the only good copy by now."""
    async with open_moving(tmp_path, run_jobs=False) as moving:
        catalog = moving.node.catalog
        blob = (await moving.node.add_blob(PIECES, "ssd", "hdd")).blob_id
        await moving.queue(MIGRATE, migrate_target(blob, "ssd", "hdd"))
        late = await catalog.write(lambda c: claim(c, "late-0", 0.01, [MIGRATE]))
        assert late is not None
        await asyncio.sleep(0.05)
        other = await catalog.write(lambda c: claim(c, "late-1", 60, [MIGRATE]))
        assert other is not None
        assert other.job == late.job
        before = moving.files("ssd")
        with pytest.raises(Conflict, match="was taken over"):
            await moving.migrator(Progress(late, "late-0"))
        assert await moving.tiers_of(blob) == ["hdd", "ssd"]
        assert moving.files("ssd") == before
        await moving.migrator(Progress(other, "late-1"))
        assert await moving.tiers_of(blob) == ["hdd"]


async def test_a_late_copy_adds_no_row_and_leaves_no_file(tmp_path: Path) -> None:
    async with open_moving(tmp_path, run_jobs=False) as moving:
        catalog = moving.node.catalog
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        await moving.queue(COPY, copy_target(blob, "hdd"))
        late = await catalog.write(lambda c: claim(c, "late-0", 0.01, [COPY]))
        assert late is not None
        await asyncio.sleep(0.05)
        assert await catalog.write(lambda c: claim(c, "other-0", 60, [COPY]))
        with pytest.raises(Conflict, match="was taken over"):
            await moving.copier(Progress(late, "late-0"))
        assert await moving.tiers_of(blob) == ["ssd"]
        assert moving.files("hdd") == []


async def test_copies_keep_to_the_rate_of_their_tier(tmp_path: Path) -> None:
    taken: list[tuple[str, int]] = []

    class Recorded(Budget):
        def take(self, tier: str, num_bytes: int, check: object = None) -> None:
            taken.append((tier, num_bytes))

    async with open_moving(tmp_path, budget=Recorded({})) as moving:
        blob = (await moving.node.add_blob(PIECES, "ssd")).blob_id
        target = copy_target(blob, "hdd")
        await moving.queue(COPY, target)
        await moving.wait(COPY, target)
    size = sum(len(piece) for piece in PIECES)
    for tier in ("ssd", "hdd"):
        assert sum(num_bytes for name, num_bytes in taken if name == tier) >= size


async def test_higher_priorities_come_first_and_an_older_job_is_raised(tmp_path: Path) -> None:
    async with open_moving(tmp_path, run_jobs=False) as moving:
        for target, priority in (("a", 0), ("b", 0), ("c", 5), ("a", 9)):
            await moving.queue(COPY, target, priority=priority)
        catalog = moving.node.catalog
        order = [await catalog.write(lambda c: claim(c, "me", 60, [COPY])) for _ in range(3)]
        assert [job.target for job in order if job is not None] == ["a", "c", "b"]
