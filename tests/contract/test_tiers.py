"""Every tier passes the contract of tiers."""

from __future__ import annotations

from pathlib import Path

from forebay_server.testing.tier_contract import TierContract
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier


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
