"""A plan has what it needs brought into the fastest tier, wherever it lies."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay_server.testing.engine import EngineProcess
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB

SECONDS = 30.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    made = EngineProcess(tmp_path / "data", {"reserve_bytes": 0}).start()
    yield made
    made.stop()


@pytest.fixture
def dataset(engine: EngineProcess) -> tuple[str, list[str]]:
    """In ssd and object: its manifest and its blobs."""
    rng = random.Random(1)
    manifest, blobs = engine.call("commit_dataset", "d", [rng.randbytes(64 * KIB) for _ in "abc"])
    wait_until_in(engine, blobs, "object")
    return manifest, blobs


def tiers_of(engine: EngineProcess, blobs: list[str]) -> list[set[str]]:
    copies = engine.call("copies", blobs)
    return [{tier for tier, _, state, _ in copies[blob] if state == "live"} for blob in blobs]


def wait_until_in(engine: EngineProcess, blobs: list[str], tier: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not all(tier in tiers for tiers in tiers_of(engine, blobs)):
        assert time.monotonic() < deadline, tiers_of(engine, blobs)
        time.sleep(0.02)


def test_what_a_slower_local_tier_has_comes_into_the_fastest(
    engine: EngineProcess, dataset: tuple[str, list[str]]
) -> None:
    manifest, blobs = dataset
    for blob in blobs:
        engine.call("queue_migration", blob, "ssd", "hdd")
    engine.call("settle")
    assert tiers_of(engine, blobs) == [{"hdd", "object"}] * len(blobs)
    engine.call("register", new_random_name(), manifest, "none", 0, 0)
    wait_until_in(engine, blobs, "ssd")


def test_what_a_job_moves_away_comes_back(
    engine: EngineProcess, dataset: tuple[str, list[str]]
) -> None:
    manifest, blobs = dataset
    plan = new_random_name()
    engine.call("register", plan, manifest, "none", 0, 0)
    engine.call("queue_migration", blobs[1], "ssd", "hdd")
    engine.call("settle")
    engine.call("advance", plan, 0, 1)
    wait_until_in(engine, blobs, "ssd")
