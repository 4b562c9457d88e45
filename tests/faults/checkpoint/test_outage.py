"""The object store is away while generations are saved: they become local, and remote later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay_server.testing.beside import load_beside
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.s3 import make_bucket, missing_s3
from forebay_server.testing.seaweed import KEY, SECRET, SeaweedFS, seaweed_program

HERE = Path(__file__).parent

common = load_beside(__file__, "system")

OUTAGE_SECONDS = 60.0


def durability_of(client: forebay.Client, step: int) -> str:
    (found,) = (one for one in client.checkpoints("r") if one.step == step)
    return str(found.durability)


def save(checkpointer: forebay.Checkpointer, step: int) -> Any:
    saved = checkpointer.save(step, state=common.trainers.state_at(step))
    saved.wait("local", timeout=common.SECONDS)
    return saved


def check(client: forebay.Client, steps: range) -> None:
    for step in steps:
        with forebay.Checkpointer(client, "r") as checkpointer:
            resumed = checkpointer.restore(f"1/{step}")
        common.same_state(resumed.state, step)


@contextmanager
def store_of_its_own(folder: Path) -> Iterator[tuple[SeaweedFS, DaemonProcess]]:
    if seaweed_program() is None:
        pytest.skip(missing_s3({}) or "")
    with SeaweedFS(folder / "s3") as server:
        bucket = make_bucket(server.endpoint, KEY, SECRET)
        arguments = ("--object-url", bucket.url("x"), "--hdd-path", "none")
        with DaemonProcess(folder / "data", *arguments, environment=bucket.environment) as daemon:
            yield server, daemon


@pytest.mark.slow
def test_a_store_that_is_down_for_a_minute(tmp_path: Path) -> None:
    with (
        store_of_its_own(tmp_path) as (server, daemon),
        forebay.connect(daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, "r") as checkpointer,
    ):
        save(checkpointer, 1).wait("remote", timeout=common.SECONDS)
        server.kill()
        end, steps = time.monotonic() + OUTAGE_SECONDS, 1
        while time.monotonic() < end:
            steps += 1
            saved = save(checkpointer, steps)
            with pytest.raises(TimeoutError):
                saved.wait("remote", timeout=3)
        assert durability_of(client, steps) == "local"
        assert durability_of(client, 1) == "remote"
        check(client, range(1, steps + 1))
        server.start()
        common.until(
            lambda: all(durability_of(client, step) == "remote" for step in range(1, steps + 1)),
            lambda: daemon.log_tail(),
        )


def test_a_daemon_that_is_killed_while_the_store_is_away_flushes_later(tmp_path: Path) -> None:
    store = tmp_path / "object"
    arguments = ("--object-url", f"file://{store}", "--hdd-path", "none")
    with (
        DaemonProcess(tmp_path / "data", *arguments) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        with forebay.Checkpointer(client, "r") as checkpointer:
            save(checkpointer, 1).wait("remote", timeout=common.SECONDS)
            away = store.rename(tmp_path / "away")
            saved = save(checkpointer, 2)
            with pytest.raises(TimeoutError):
                saved.wait("remote", timeout=0.2)
            daemon.kill()
            away.rename(store)
            daemon.start().wait_ready()
            saved.wait("remote", timeout=common.SECONDS)
            save(checkpointer, 3)
        check(client, range(1, 4))
