"""The daemon with its object tier on a real S3: what is remote survives the loss of the node."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.s3 import S3Bucket

NUM_ROWS = 3000
ROW_FLOATS = 4096
"""Rows of 16 KiB: shards of more than one part."""


def rows() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((NUM_ROWS, ROW_FLOATS), dtype=np.float32)


def test_a_lost_node_is_recovered_from_s3(s3: S3Bucket, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    url, expected = s3.url("node"), rows()
    weights = torch.arange(1_000_000, dtype=torch.float32)
    lost = DaemonProcess(tmp_path / "lost", "--object-url", url, environment=s3.environment)
    with lost as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        schema = {"x": forebay.Array("float32", (ROW_FLOATS,))}
        with client.create_dataset("d", schema=schema) as writer:
            for row in expected:
                writer.write(x=row)
        client.wait_version("d", 1, "remote", timeout=90)
        with forebay.Checkpointer(client, run="r") as checkpointer:
            checkpointer.save(3, state={"w": weights}).wait("remote", timeout=90)
        lost.kill()  # and its disk with it

    data = tmp_path / "new"
    told = recover(url, data, s3)
    assert (told["num_datasets"], told["num_generations"], told["left_out"]) == (1, 1, [])
    settings = (data / "forebay.toml").read_text()
    assert tomllib.loads(settings) == {"object-url": url, "object-client": "obstore"}
    assert s3.secret not in settings

    found = DaemonProcess(data, environment=s3.environment)
    with found as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        dataset = client.dataset("d")
        assert dataset.num_rows == NUM_ROWS
        assert np.array_equal(dataset.take(np.arange(NUM_ROWS))["x"], expected)
        with forebay.Checkpointer(client, run="r") as checkpointer:
            resumed = checkpointer.restore("latest")
        assert torch.equal(resumed.state["w"], weights)
    for log in (lost.log_path, found.log_path):
        assert s3.secret not in log.read_text()


def recover(url: str, data: Path, s3: S3Bucket) -> dict[str, object]:
    command = [sys.executable, "-m", "forebay_server", "recover", url, "--data", str(data)]
    done = subprocess.run(
        [*command, "--object-client", "obstore", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, **s3.environment},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_options_of_the_file_reach_the_store_and_are_not_shown(
    s3: S3Bucket, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in s3.options.items())
    (data / "forebay.toml").write_text(
        f'object-url = "{s3.url("options")}"\n[object-options]\n{options}'
    )
    command = [sys.executable, "-m", "forebay_server", "serve", "--data", str(data)]
    shown = subprocess.run([*command, "--show-config"], capture_output=True, text=True, check=True)
    assert "key=***,secret=***" in shown.stdout
    assert s3.secret not in shown.stdout
    with DaemonProcess(data) as daemon, forebay.connect(daemon.address()["rpc"]) as client:
        (tier,) = [tier for tier in client.status().tiers if tier.kind == "object"]
        assert tier.location == s3.url("options")


def test_a_daemon_with_wrong_credentials_says_so_and_ends(s3: S3Bucket, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "forebay_server", "serve", "--data", str(tmp_path / "data")]
    done = subprocess.run(
        [*command, "--object-url", s3.url("denied")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, **s3.environment, "AWS_SECRET_ACCESS_KEY": "wrongsecret"},
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("forebay:")]
    assert "SignatureDoesNotMatch" in line
    assert "check the credentials" in line
    assert "wrongsecret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
