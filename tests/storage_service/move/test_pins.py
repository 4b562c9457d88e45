"""Pins and warm holds: they fit or are refused, and say why they are no longer true."""

import os
from pathlib import Path
from typing import Any

import pytest

from forebay_server.catalog.queries_damage import quarantine
from forebay_server.catalog.queries_datasets import delete_dataset
from forebay_server.catalog.queries_jobs import PIN
from forebay_server.catalog.queries_moves import give_up_replica
from forebay_server.catalog.queries_pins import drop_ended, end_pins, set_expiry
from forebay_server.catalog.queries_trash import trash_dataset
from forebay_server.move.pins import PinState
from forebay_server.testing.moving import MovingNode, open_moving
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_wire.errors import Conflict, InvalidRequest, NotFound, ResourceExhausted
from forebay_wire.limits import MIB

TIERS = ["ssd", "hdd", "object"]


def small_tiers(folder: Path, ssd_bytes: int) -> list[Any]:
    return [
        DirectoryTier("ssd", "ssd", folder / "ssd", limit_bytes=ssd_bytes, reserve_bytes=0),
        DirectoryTier("hdd", "hdd", folder / "hdd", reserve_bytes=0),
        RemoteTier("object", f"file://{folder}/object"),
    ]


async def warm(moving: MovingNode, target: str, tier: str = "", hold: float = 0.0) -> PinState:
    """Pin *target* and wait until its fetching has ended."""
    state = await moving.pins.pin(target, tier, hold, moving.jobs)
    assert await moving.jobs.wait(PIN, state.pin, 30) is not None
    return await moving.pins.look(state.pin)


async def test_a_warm_dataset_is_in_the_tier_and_nothing_takes_it_away(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        blobs = await moving.add_dataset("d", 1000, MIB, 5000)
        first = await moving.pins.pin("d", "", 0.0, moving.jobs)
        assert (first.target, first.tier, first.num_blobs) == ("dataset d@1", "ssd", 3)
        state = await warm(moving, "d@1")
        assert (state.is_warm, state.because, state.state) == (True, "", "held")
        assert state.done_bytes == state.total_bytes == 1000 + MIB + 5000
        for blob in blobs:
            assert await moving.tiers_of(blob) == ["object", "ssd"]
            with pytest.raises(Conflict, match="is pinned in tier ssd"):
                await moving.node.catalog.write(
                    lambda c, b=blob: give_up_replica(c, b, "ssd", "x", "y", among=TIERS)
                )
        assert moving.node.tiers.get("ssd").space().reserved_bytes == 0
        assert len(await moving.pins.list()) == 2
        assert await moving.pins.unpin("dataset d@1") == 2
        assert await moving.pins.unpin(state.pin) == 0
        ended = await moving.pins.look(state.pin)
        assert (ended.is_warm, ended.state) == (False, "ended")
        assert ended.because == "it was unpinned"
        await moving.node.catalog.write(
            lambda c: give_up_replica(c, blobs[0], "ssd", "x", "y", among=TIERS)
        )


async def test_a_hold_counts_from_the_moment_all_is_there_and_ends_by_itself(
    tmp_path: Path,
) -> None:
    async with open_moving(tmp_path) as moving:
        await moving.add_dataset("d", 1000)
        state = await warm(moving, "d", "hdd", 1000.0)
        assert state.is_warm
        assert 900 < state.expires_unix - state.created_unix < 1100
        await moving.node.catalog.write(lambda c: set_expiry(c, state.pin, -1.0))
        assert "the hold ended at 20" in (await moving.pins.look(state.pin)).because
        assert await moving.node.catalog.write(lambda c: drop_ended(c, 3600)) == 0
        assert await moving.node.catalog.write(lambda c: drop_ended(c, 0)) == 1
        with pytest.raises(NotFound, match="there is no pin"):
            await moving.pins.look(state.pin)


@pytest.mark.parametrize("remove", [delete_dataset, lambda c, name: trash_dataset(c, name, 3600)])
async def test_a_pin_ends_when_its_dataset_is_deleted(tmp_path: Path, remove: Any) -> None:
    async with open_moving(tmp_path) as moving:
        await moving.add_dataset("d", 1000)
        await moving.add_dataset("dd", 2000)
        state, other = await warm(moving, "d"), await warm(moving, "dd")
        await moving.node.catalog.write(lambda c: remove(c, "d"))
        ended = await moving.pins.look(state.pin)
        assert (ended.is_warm, ended.state, ended.because) == (False, "ended", "it was deleted")
        assert (await moving.pins.look(other.pin)).is_warm


async def test_what_does_not_fit_is_refused_with_the_numbers_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    asked: list[int] = []

    async def make_room(tier: Any, num_bytes: int) -> None:
        asked.append(num_bytes)

    tiers = small_tiers(tmp_path, 3 * MIB)
    async with open_moving(tmp_path, tiers=tiers, make_room=make_room) as moving:
        await moving.add_dataset("small", MIB)
        await moving.add_dataset("large", MIB, MIB, MIB)
        assert (await warm(moving, "small")).is_warm
        before = moving.node.tiers.get("ssd").space()
        with pytest.raises(ResourceExhausted) as refused:
            await moving.pins.pin("large", "ssd", 0.0, moving.jobs)
        assert f"{3 * (MIB + 4096)} bytes do not fit into tier ssd" in refused.value.message
        assert "Pins hold 1048" in refused.value.message
        assert asked
        assert moving.node.tiers.get("ssd").space() == before
        assert len(await moving.pins.list()) == 1


async def test_room_is_reserved_before_the_first_byte_comes(tmp_path: Path) -> None:
    tiers = small_tiers(tmp_path, 4 * MIB)
    async with open_moving(tmp_path, tiers=tiers, run_jobs=False) as moving:
        await moving.add_dataset("one", MIB, MIB)
        await moving.add_dataset("two", MIB, MIB)
        await moving.pins.pin("one", "ssd", 0.0, moving.jobs)
        assert moving.node.tiers.get("ssd").space().reserved_bytes >= 2 * MIB
        with pytest.raises(ResourceExhausted):
            await moving.pins.pin("two", "ssd", 0.0, moving.jobs)
        assert await moving.pins.unpin("one") == 1
        assert moving.node.tiers.get("ssd").space().reserved_bytes == 0
        await moving.pins.pin("two", "ssd", 0.0, moving.jobs)


async def test_what_is_there_already_is_verified_and_a_bad_copy_replaced(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        (blob,) = await moving.add_dataset("d", 5000, tiers=("ssd", "object"))
        path = await moving.node.path_of(blob, "ssd")
        damaged = bytearray(path.read_bytes())
        damaged[100] ^= 1
        path.chmod(0o600)
        path.write_bytes(damaged)
        assert (await warm(moving, "d")).is_warm
        assert await moving.node.path_of(blob, "ssd") != path


async def test_a_warm_hold_says_when_and_why_it_is_no_longer_true(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        first, second = await moving.add_dataset("d", 5000, 6000)
        state = await warm(moving, "d")
        located = await moving.node.locate(first)
        (replica,) = [one for one in located.live() if one.tier == "ssd"]
        await moving.node.catalog.write(
            lambda c: quarantine(c, replica.replica_id, "a flipped bit")
        )
        found = await moving.pins.look(state.pin)
        assert not found.is_warm
        assert "1 of its 2 blobs are not in ssd" in found.because
        assert "quarantined: a flipped bit" in found.because
        assert second not in found.because


async def test_a_pin_whose_bytes_are_gone_for_good_fails_and_holds_nothing(tmp_path: Path) -> None:
    async with open_moving(tmp_path) as moving:
        (blob,) = await moving.add_dataset("d", 5000)
        path = await moving.node.path_of(blob, "object")
        path.write_bytes(os.urandom(100))
        state = await warm(moving, "d")
        assert (state.state, state.is_warm) == ("failed", False)
        assert "could not be fetched" in state.because
        assert moving.node.tiers.get("ssd").space().reserved_bytes == 0


async def test_a_pin_made_before_a_restart_goes_on_after_it(tmp_path: Path) -> None:
    async with open_moving(tmp_path, run_jobs=False) as moving:
        await moving.add_dataset("d", 5000)
        state = await moving.pins.pin("d", "", 60.0, moving.jobs)
        assert state.state == "fetching"
        assert "0 of 5000 bytes" in state.because
    async with open_moving(tmp_path) as moving:
        assert await moving.jobs.wait(PIN, state.pin, 30) is not None
        assert (await moving.pins.look(state.pin)).is_warm
        assert moving.node.tiers.get("ssd").space().reserved_bytes == 0


@pytest.mark.parametrize(
    ("target", "tier", "hold", "error", "text"),
    [
        ("d", "tape", 0.0, InvalidRequest, "there is no tier 'tape'"),
        ("d", "object", 0.0, InvalidRequest, "there are ssd, hdd"),
        ("nothing", "", 0.0, NotFound, "there is no dataset nothing"),
        ("d@7", "", 0.0, NotFound, "no version 7"),
        ("r@1/2", "", 0.0, NotFound, "no committed generation"),
        ("a" * 64, "", 0.0, InvalidRequest, "cannot be pinned"),
        ("d d d", "", 0.0, InvalidRequest, "names nothing"),
        ("d", "", -1.0, InvalidRequest, "a hold of"),
    ],
)
async def test_bad_input_is_one_clear_error(
    tmp_path: Path, target: str, tier: str, hold: float, error: type[Exception], text: str
) -> None:
    async with open_moving(tmp_path, run_jobs=False) as moving:
        await moving.add_dataset("d", 100)
        with pytest.raises(error, match=text):
            await moving.pins.pin(target, tier, hold, moving.jobs)
        assert await moving.pins.list() == []


async def test_an_unknown_pin_is_refused(tmp_path: Path) -> None:
    async with open_moving(tmp_path, run_jobs=False) as moving:
        with pytest.raises(NotFound, match="there is no pin"):
            await moving.pins.look("0" * 32)
        with pytest.raises(NotFound):
            await moving.node.catalog.write(lambda c: end_pins(c, "0" * 32, "x"))
        with pytest.raises(InvalidRequest, match="not 32"):
            await moving.pins.look("x")
