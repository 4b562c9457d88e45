"""The object tier on a real S3 passes the contract of tiers, by both clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay_server.testing.s3 import S3Bucket
from forebay_server.testing.tier_contract import TierContract
from forebay_server.tier.store import Tier


class S3Contract(TierContract):
    @pytest.fixture(autouse=True)
    def _bucket(self, s3: S3Bucket) -> None:
        self.s3 = s3


class TestS3fs(S3Contract):
    def make_tier(self, folder: Path) -> Tier:
        return self.s3.tier(f"s3fs-{folder.name}", "s3fs")


class TestObstore(S3Contract):
    def make_tier(self, folder: Path) -> Tier:
        pytest.importorskip("obstore")
        return self.s3.tier(f"obstore-{folder.name}", "obstore")
