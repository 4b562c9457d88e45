"""Every tier passes the contract of tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

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


class ReplacesFiles(MemoryFileSystem):
    """Takes the mode for one more option to ignore."""

    protocol = "replacesfiles"

    def pipe_file(self, path: str, value: bytes, mode: str = "", **kwargs: Any) -> None:
        super().pipe_file(path, value)


class TestCacheOnlyStore(TierContract):
    """A store that would replace what is there: of one process, its writers look first."""

    def make_tier(self, folder: Path) -> Tier:
        fsspec.register_implementation(ReplacesFiles.protocol, ReplacesFiles, clobber=True)
        url = f"{ReplacesFiles.protocol}://{folder.name}-cache"
        return RemoteTier("cache", url, caches_only=True)
