"""Every region of every file of a run damaged: a restore is right, or an error, and never wrong."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import forebay
from forebay_server.testing.beside import load_beside
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.integrity import flip

HERE = Path(__file__).parent

common = load_beside(__file__, "system")

SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
FROM_END = (1, 5, 13, 40, 100, 300)
"""Places within a file, and bytes before its end: tables and trailers lie there."""

STEPS = 2


def offsets(num_bytes: int) -> list[int]:
    found = {int(share * num_bytes) for share in SHARES}
    found |= {num_bytes - back for back in FROM_END}
    return sorted(one for one in found if 0 <= one < num_bytes)


def saved(folder: Path, *arguments: str, durability: str) -> Path:
    """A data folder with a run of two generations; nobody serves it."""
    with (
        DaemonProcess(folder, "--hdd-path", "none", *arguments) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, "r") as checkpointer,
    ):
        for step in range(1, STEPS + 1):
            state = common.trainers.state_at(step)
            checkpointer.save(step, state=state).wait(durability, timeout=common.SECONDS)
    return folder


def files_of(data: Path) -> Iterator[Path]:
    """All that holds bytes of generations, or says where they are."""
    for tier in ("ssd/files", "object/data", "object/blobs", "object/manifests"):
        yield from sorted(path for path in (data / tier).rglob("*") if path.is_file())


def outcome(data: Path, *arguments: str) -> str:
    """What a restore comes to: which step, and what was passed over; never wrong bytes."""
    with (
        DaemonProcess(data, "--hdd-path", "none", *arguments) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, "r", timeout=common.SECONDS) as checkpointer,
    ):
        try:
            resumed = checkpointer.restore("latest")
        except forebay.IntegrityError:
            return "error"
        assert resumed is not None
        common.same_state(resumed.state, resumed.step)
        skipped = [one.step for one in resumed.skipped]
        assert skipped == list(range(STEPS, resumed.step, -1)), "a newer one is passed over unsaid"
        return "right" if resumed.step == STEPS else "older"


def sweep(template: Path, scratch: Path, *arguments: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for path in files_of(template):
        for offset in offsets(path.stat().st_size):
            data = scratch / "data"
            shutil.copytree(template, data, ignore=shutil.ignore_patterns("*.sock"))
            flip(data / path.relative_to(template), offset, bit=offset % 8)
            try:
                kind = outcome(data, *arguments)
            except BaseException as error:
                error.add_note(f"bit {offset % 8} of byte {offset} of {path.name} flipped")
                raise
            found[kind] += 1
            shutil.rmtree(data)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_damage_without_another_copy_means_an_older_generation_or_an_error(tmp_path: Path) -> None:
    alone = ("--object-url", "none")
    template = saved(tmp_path / "template", *alone, durability="local")
    found = sweep(template, tmp_path, *alone)
    assert found["older"] >= 5, found
    assert found["right"] >= 5, found  # damage to what only the older one needs


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damage_to_one_of_two_copies_is_made_good(tmp_path: Path) -> None:
    template = saved(tmp_path / "template", durability="remote")
    found = sweep(template, tmp_path)
    assert set(found) == {"right"}, found
    assert found["right"] > 50, found
