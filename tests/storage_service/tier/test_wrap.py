"""Wrappers: measured, slowed, failing."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from forebay_server.testing.faults import FaultyTier
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.health import GuardedTier
from forebay_server.tier.store import Tier
from forebay_server.tier.wrap import MeteredTier, ThrottledTier, TierWrapper
from forebay_wire.errors import NotFound, ResourceExhausted, StorageError
from forebay_wire.ids import new_random_name


@pytest.fixture
def ssd(tmp_path: Path) -> DirectoryTier:
    tier = DirectoryTier("ssd", "ssd", tmp_path, reserve_bytes=0)
    tier.open()
    return tier


def test_every_byte_is_recorded(ssd: DirectoryTier) -> None:
    calls: list[tuple[str, str, int]] = []
    tier = MeteredTier(ssd, lambda *call: calls.append(call[:3]))
    name = new_random_name()
    tier.put(name, b"12345")
    tier.get(name)
    assert ("ssd", "write", 5) in calls
    assert ("ssd", "read_into", 5) in calls
    assert [call[1] for call in calls] == ["create", "write", "publish", "read", "read_into"]


def test_a_failed_call_is_recorded_as_one(ssd: DirectoryTier) -> None:
    calls: list[tuple[str, bool]] = []
    tier = MeteredTier(
        ssd, lambda _, operation, size, seconds, failed: calls.append((operation, failed))
    )
    with pytest.raises(NotFound):
        tier.read(new_random_name())
    for _ in range(2):
        tier.put(new_random_name(), b"1")
    listing = iter(tier.list())
    next(listing)
    listing.close()  # whoever needs no more of a list ends it early
    assert [call for call in calls if call[1]] == [("read", True)]
    assert ("list", False) in calls


@pytest.mark.parametrize("wrap", [MeteredTier, GuardedTier])
def test_a_wrapper_says_what_its_tier_says(wrap: type[TierWrapper], ssd: DirectoryTier) -> None:
    ssd.is_foreign, ssd.encoding = True, "lz4"
    tier = GuardedTier(ssd) if wrap is GuardedTier else MeteredTier(ssd, lambda *call: None)
    for name in Tier.__annotations__:
        assert getattr(tier, name) == getattr(ssd, name), name
    for name, method in vars(Tier).items():  # what a tier may have better than the base class
        if callable(method) and not name.startswith("_") and name not in ("put", "get"):
            assert getattr(type(tier), name) is not method, name


def test_a_slow_tier_takes_its_time(ssd: DirectoryTier) -> None:
    tier = ThrottledTier(ssd, latency_seconds=0.0, bytes_per_second=1e6)
    started = time.monotonic()
    tier.put(new_random_name(), bytes(100_000))
    assert time.monotonic() - started >= 0.1


@pytest.mark.parametrize("operation", ["create", "write", "publish"])
@pytest.mark.parametrize(
    ("code", "error"), [(errno.EIO, StorageError), (errno.ENOSPC, ResourceExhausted)]
)
def test_a_fault_on_the_way_leaves_nothing(
    ssd: DirectoryTier, operation: str, code: int, error: type[Exception]
) -> None:
    tier, name = FaultyTier(ssd), new_random_name()
    tier.fail(operation, code=code)
    with pytest.raises(error):
        tier.put(name, b"data")
    assert list(tier.list()) == []
    assert tier.space().reserved_bytes == 0
    tier.put(name, b"data")
    assert tier.get(name) == b"data"
    assert tier.calls[operation] == 2
