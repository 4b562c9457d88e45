"""Every tier passes the contract of tiers."""

from __future__ import annotations

from pathlib import Path

from forebay_server.testing.faults import FaultyTier
from forebay_server.testing.tier_contract import TierContract
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier
from forebay_server.tier.wrap import MeteredTier, ThrottledTier


class TestSsd(TierContract):
    def make_tier(self, folder: Path) -> Tier:
        return DirectoryTier("ssd", "ssd", folder / "ssd", reserve_bytes=0)


class TestHdd(TierContract):
    def make_tier(self, folder: Path) -> Tier:
        return DirectoryTier("hdd", "hdd", folder / "hdd", reserve_bytes=0)


class TestObjectDirectory(TierContract):
    def make_tier(self, folder: Path) -> Tier:
        return RemoteTier("object", f"file://{folder}/object")


class TestObjectStore(TierContract):
    def make_tier(self, folder: Path) -> Tier:
        return RemoteTier("object", f"memory://{folder.name}")


class TestWrappers(TierContract):
    """A tier inside all wrappers is a tier."""

    def make_tier(self, folder: Path) -> Tier:
        tier = DirectoryTier("ssd", "ssd", folder / "ssd", reserve_bytes=0)
        metered = MeteredTier(FaultyTier(tier), lambda *_: None)
        return ThrottledTier(metered, latency_seconds=1e-5, bytes_per_second=1e12)
