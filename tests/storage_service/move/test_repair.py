"""Damage is found by reading, its copy quarantined, another one used, and the bad one replaced."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import update

from forebay_server.catalog.queries_damage import (
    EVERYTHING,
    enqueue_return,
    mark_missing,
    remove_replaced,
)
from forebay_server.catalog.queries_jobs import COPY, FLUSH, REPAIR, SCRUB, schedule
from forebay_server.catalog.queries_scrub import BACKGROUND, due_copies, plan_scrub
from forebay_server.catalog.queries_why import page_jobs
from forebay_server.catalog.tables import replicas
from forebay_server.move.copy import copy_target
from forebay_server.serve.opened import OpenedBlob
from forebay_server.testing.integrity import flip, open_integrity
from forebay_server.tier.medium import MediumReader, open_medium
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound
from forebay_wire.limits import KIB

PIECES = [bytes(range(256)) * 300, os.urandom(1000)]

Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Damage] = {
    "a flipped bit": lambda path: flip(path, 70_000, 3),
    "cut short": cut,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("bad", ["ssd", "hdd", "object"])
async def test_a_bad_copy_is_found_and_replaced_by_a_good_one(
    bad: str, damage: str, tmp_path: Path
) -> None:
    async with open_integrity(tmp_path) as node:
        node.node.tiers.get("hdd").encoding = "lz4"
        _, (blob,) = await node.add_dataset(PIECES)
        await node.run_queued(FLUSH)
        await node.run(COPY, copy_target(blob, "hdd"))
        path = await node.node.path_of(blob, bad)
        if bad == "hdd":
            flip(path, 5)  # an encoded file is short
        else:
            DAMAGES[damage](path)
        report = await node.scrub()
        assert (report.num_copies, report.num_damaged) == (3, 1)
        assert [(one["tier"], one["blob"]) for one in report.damaged] == [(bad, blob)]
        assert (bad, "quarantined") in await node.states(blob)
        (opened,) = await node.node.opener.open("client", [blob])
        assert isinstance(opened, OpenedBlob), "another copy serves"
        opened.close()
        assert [error for _, error in await node.run_queued(REPAIR, FLUSH)] == [""] * (
            2 if bad == "object" else 1
        )
        assert await node.states(blob) == [(tier, "live") for tier in ("hdd", "object", "ssd")]
        await node.check_copies(blob)
        assert not path.exists()
        assert (await node.scrub()).num_damaged == 0
        assert {"quarantined", "repaired"} <= set(await node.events(f"blob {blob}"))
        assert (await node.integrity.fsck(repair=False)).found == []


async def test_without_a_good_copy_it_is_reported_and_stays(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES)
        path = await node.node.path_of(blob, "ssd")
        flip(path, 0)
        before = path.read_bytes()
        assert (await node.scrub("ssd")).num_damaged == 1
        ((_, error),) = await node.run_queued(REPAIR)
        assert "has no good copy left" in error
        assert await node.states(blob) == [("ssd", "quarantined")]
        assert path.read_bytes() == before
        assert (await node.events(f"blob {blob}"))[-1] == "not repaired"
        found = (await node.integrity.fsck(repair=False)).found
        assert {one.kind for one in found} == {"quarantined", "lost blob"}


async def test_a_good_copy_that_comes_after_the_repair_was_given_up_mends_at_the_next_scrub(
    tmp_path: Path,
) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES)
        flip(await node.node.path_of(blob, "ssd"), 0)
        await node.scrub()
        ((_, error),) = await node.run_queued(REPAIR)
        assert "has no good copy left" in error
        await node.node.add_blob(PIECES, "hdd")
        assert (await node.scrub()).num_damaged == 0
        assert not any(error for _, error in await node.run_queued(REPAIR))
        assert await node.states(blob) == [("hdd", "live"), ("ssd", "live")]
        await node.check_copies(blob)


async def test_a_bad_copy_stays_until_a_good_one_is_in_its_tier(tmp_path: Path) -> None:
    """Whatever became, meanwhile, of the copy that was to take its place."""
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES, tiers=("ssd", "hdd"))
        flip(await node.node.path_of(blob, "ssd"), 0)
        assert not await node.node.opener.report(blob, "ssd", 0, "XXH3 differs")
        write = node.node.catalog.write
        assert await write(lambda connection: remove_replaced(connection, blob, "ssd")) == []
        assert await node.states(blob) == [("hdd", "live"), ("ssd", "quarantined")]


async def test_a_last_copy_in_the_object_tier_keeps_its_extent_list(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES)
        await node.run_queued(FLUSH)
        for tier in ("ssd", "object"):
            flip(await node.node.path_of(blob, tier), 0)
        objects = node.files("object")
        assert (await node.scrub()).num_damaged == 2
        assert all(error for _, error in await node.run_queued(REPAIR, FLUSH))
        assert node.files("object") == objects


async def test_a_copy_whose_source_is_bad_too_is_made_from_the_next_one(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES, tiers=("ssd", "hdd"))
        await node.run_queued(FLUSH)
        for tier in ("ssd", "hdd"):
            flip(await node.node.path_of(blob, tier), 0)
        assert (await node.scrub("ssd")).num_damaged == 1
        outcome = await node.run_queued(REPAIR)
        assert [error for _, error in outcome][:1] == [""]
        assert await node.states(blob) == [(tier, "live") for tier in ("hdd", "object", "ssd")]
        await node.check_copies(blob)


async def test_a_client_that_reports_damage_has_it_repaired(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES, tiers=("ssd", "hdd"))
        flip(await node.node.path_of(blob, "ssd"), 0)
        assert not await node.node.opener.report(blob, "ssd", 0, "XXH3 differs")
        assert [error for _, error in await node.run_queued(REPAIR)] == [""]
        assert await node.states(blob) == [("hdd", "live"), ("ssd", "live")]


async def test_a_start_repairs_all_that_is_quarantined_and_names_what_it_cannot(
    tmp_path: Path,
) -> None:
    async with open_integrity(tmp_path) as node:
        _, both = await node.add_dataset(PIECES, [b"x"], tiers=("ssd", "hdd"))
        _, (alone,) = await node.add_dataset([b"alone"])
        gone = []
        for blob in [*both, alone]:
            path = await node.node.path_of(blob, "ssd")
            path.unlink()
            gone.append(path.name)
        await node.node.catalog.write(lambda c: mark_missing(c, gone, "the file is gone"))
        await node.node.catalog.write(enqueue_return)
        ((job, error),) = await node.run_queued(REPAIR)
        assert job.target == EVERYTHING
        assert "1 blobs are not repaired" in error
        for blob in both:
            assert await node.states(blob) == [("hdd", "live"), ("ssd", "live")]
        assert await node.states(alone) == [("ssd", "quarantined")]


# ------------------------------------------------------------------------------------------- scrub


async def test_what_was_read_longest_ago_comes_first_and_is_marked(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, blobs = await node.add_dataset(*([bytes([n])] for n in range(3)))
        found = {one.blob: one for one in await due(node)}
        assert set(found) == set(blobs)
        for number, blob in enumerate(blobs):
            await node.node.catalog.write(
                lambda c, b=blob, n=number: c.execute(
                    update(replicas).where(replicas.c.blob == b).values(verified=10.0 - n)
                )
            )
        assert [one.blob for one in await due(node)] == blobs[::-1]
        assert (await node.scrub()).num_copies == 3
        assert {one.verified_unix > 1000 for one in await due(node)} == {True}


async def due(node):
    return await node.node.catalog.read(lambda c: due_copies(c, "ssd", 1e12, (-1.0, ""), 10))


async def test_a_tier_that_does_not_answer_is_said_and_nothing_in_it_condemned(
    tmp_path: Path,
) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES)
        (tmp_path / "ssd").rename(tmp_path / "away")
        report = await node.scrub()
        assert (report.num_damaged, report.num_unread) == (0, 1)
        assert "is away" in report.unread
        (tmp_path / "away").rename(tmp_path / "ssd")
        assert await node.states(blob) == [("ssd", "live")]


async def test_a_damaged_extent_list_is_written_anew(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES)
        await node.run_queued(FLUSH)
        path = tmp_path / "object" / "blobs" / blob
        before = path.read_bytes()
        flip(path, 40)
        report = await node.scrub()
        assert (report.num_damaged, report.num_lists) == (0, 1)
        assert path.read_bytes() == before


async def test_an_unknown_tier_is_refused_by_name(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        with pytest.raises(InvalidRequest, match=r"no tier 'tape'.*it has ssd, hdd, object"):
            await node.integrity.begin_scrub("tape")
        with pytest.raises(NotFound, match="no scrub 'x'"):
            await node.integrity.look_at_scrub("x")


async def test_the_background_scrub_comes_again_and_an_interval_of_0_ends_it(
    tmp_path: Path,
) -> None:
    async with open_integrity(tmp_path, scrub_interval_seconds=1e6) as node:
        catalog = node.node.catalog
        job = await catalog.read(lambda c: all_scrubs(c))
        assert len(job) == 1
        await catalog.write(lambda c: plan_scrub(c, 500.0))  # a shorter interval holds at once
        assert (await catalog.read(all_scrubs))[0].due_unix < job[0].due_unix
        await catalog.write(lambda c: plan_scrub(c, 0.0))
        assert await catalog.read(all_scrubs) == []
        await catalog.write(lambda c: schedule(c, SCRUB, BACKGROUND, 0.0))
        await node.run_queued(SCRUB)


def all_scrubs(connection):
    found = page_jobs(connection, None, 100, everything=True)
    return [job for job in found if job.kind == SCRUB]


# -------------------------------------------------------------------------------------- the medium


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4097, 300 * KIB + 5])
def test_reading_around_the_page_cache_gives_the_bytes(num_bytes: int, tmp_path: Path) -> None:
    data = os.urandom(num_bytes)
    (tmp_path / "file").write_bytes(data)
    with open_medium(tmp_path / "file", "here") as reader:
        assert reader.size_bytes == num_bytes
        for start, stop in ((0, num_bytes), (num_bytes // 3, num_bytes), (1, num_bytes // 2)):
            if start < stop:
                found = bytearray(stop - start)
                reader.read_into(start, found)
                assert found == data[start:stop]
        with pytest.raises(IntegrityError, match="cut short"):
            reader.read_into(num_bytes, bytearray(1))


def test_reading_from_the_medium_sees_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_medium(tmp_path / "file", "here")
    (tmp_path / "file").write_bytes(bytes(10))
    with open_medium(tmp_path / "file", "here") as reader:
        if not isinstance(reader, MediumReader):
            pytest.skip("this file system has no direct reads")
        assert reader.fileno() is None
