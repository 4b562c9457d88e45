"""A daemon whose object store cannot create conditionally: it caches, and gives nobody remote."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.http_proxy import FaultyProxy
from forebay_server.testing.s3 import S3Bucket
from forebay_wire.errors import InvalidRequest

WAIT_SECONDS = 60.0


def wait_until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def connect(daemon: DaemonProcess) -> forebay.Client:
    return forebay.connect(daemon.address()["rpc"])


def tiers_of(client: forebay.Client, name: str) -> set[str]:
    return {one.tier for one in client.why(name).copies if one.state == "live"}


def damage(data: Path) -> None:
    (file,) = [one for one in (data / "ssd" / "files").rglob("*") if one.is_file()]
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)


def test_a_store_without_conditions_serves_and_promises_nothing(
    s3: S3Bucket, tmp_path: Path
) -> None:
    expected = np.random.default_rng(7).standard_normal((200, 1000), dtype=np.float32)
    data, url = tmp_path / "data", s3.url("careless-node")
    with FaultyProxy(s3.endpoint) as careless:
        careless.ignores_conditions = (s3.key, s3.secret)
        behind = replace(s3, endpoint=careless.endpoint).environment
        daemon = DaemonProcess(data, "--object-url", url, environment=behind)
        with daemon, connect(daemon) as client:
            (told,) = [tier for tier in client.status().tiers if tier.name == "cache"]
            assert "caches only, nothing becomes remote" in told.note
            assert "object" not in {tier.name for tier in client.status().tiers}
            with client.create_dataset(
                "d", schema={"x": forebay.Array("float32", (1000,))}
            ) as writer:
                for row in expected:
                    writer.write(x=row)
            began = time.monotonic()
            with pytest.raises(InvalidRequest, match=r"never becomes remote.*only if it does not"):
                client.wait_version("d", 1, "remote", timeout=WAIT_SECONDS)
            with forebay.Checkpointer(client, run="r") as checkpointer:
                saved = checkpointer.save(1, state={"w": torch.ones(1000)})
                saved.wait("local")
                assert saved.durability == "local"
                with pytest.raises(InvalidRequest, match="never becomes remote"):
                    saved.wait("remote", timeout=WAIT_SECONDS)
                with pytest.raises(InvalidRequest, match="Nothing becomes remote"):
                    checkpointer.restore("latest", durability="remote")
            assert time.monotonic() - began < WAIT_SECONDS / 2
            client.set_policy("dataset d", "warm")
            client.set_policy("run r", "warm")
            wait_until(lambda: tiers_of(client, "d") == {"ssd", "cache"}, "a copy in the cache")
            (ssd,) = [tier for tier in client.status().tiers if tier.name == "ssd"]
            assert ssd.dirty_bytes >= expected.nbytes  # its copies there count for nothing
            client.delete_checkpoints("r", now=True)
            wait_until(
                lambda: (
                    [one.num_files for one in client.status().tiers if one.name == "cache"] == [1]
                ),
                "what was deleted leaves the cache",
            )
            daemon.kill()
        damage(data)
        with daemon, connect(daemon) as client:
            assert np.array_equal(client.dataset("d").take(np.arange(200))["x"], expected)
    with (
        DaemonProcess(data, "--object-url", url, environment=s3.environment) as careful,
        connect(careful) as client,
    ):
        assert {tier.name for tier in client.status().tiers} >= {"object"}
        client.wait_version("d", 1, "remote", timeout=WAIT_SECONDS)
        careful.kill()
    with FaultyProxy(s3.endpoint) as careless:
        careless.ignores_conditions = (s3.key, s3.secret)
        behind = replace(s3, endpoint=careless.endpoint).environment
        refused = DaemonProcess(data, "--object-url", url, environment=behind).start()
        assert refused.wait_exit() == 2
        assert "This data folder has remote bytes" in refused.log_tail()
