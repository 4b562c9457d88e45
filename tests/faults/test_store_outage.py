"""The object store is away for a while: what is local serves and stays, flushes wait."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.s3 import make_bucket, missing_s3
from forebay_server.testing.seaweed import KEY, SECRET, SeaweedFS, seaweed_program

Rows = Callable[[forebay.Client, str, int], None]
Until = Callable[[Callable[[], bool], str], None]

ROW_BYTES = 64 * 1024
ROWS = 200
"""12.5 MiB of them, and as much is in a large dataset."""
SSD = ("--ssd-bytes", "200MiB", "--hdd-path", "none")


def health_of(client: forebay.Client, name: str) -> str:
    return next(str(tier.health) for tier in client.status().tiers if tier.name == name)


def noise(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, ROW_BYTES), dtype=np.uint8)


def write_large(client: forebay.Client, name: str, seed: int) -> None:
    schema = {"noise": forebay.Array("uint8", (ROW_BYTES,))}
    with client.create_dataset(name, schema=schema) as writer:
        for row in noise(seed):
            writer.write(noise=row)


def check_large(client: forebay.Client, name: str, seed: int) -> None:
    found = client.dataset(name).take(np.arange(ROWS))
    assert np.array_equal(found["noise"], noise(seed))


def test_nothing_is_evicted_for_copies_in_a_folder_that_is_away(
    tmp_path: Path, wait_until: Until
) -> None:
    store = tmp_path / "object"
    with (
        DaemonProcess(tmp_path / "data", "--object-url", f"file://{store}", *SSD) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
    ):
        for seed in range(3):
            write_large(client, f"before-{seed}", seed)
            client.dataset(f"before-{seed}").wait("remote", timeout=60)
        on_ssd = next(tier for tier in client.status().tiers if tier.name == "ssd")
        assert on_ssd.used_bytes > 3 * ROWS * ROW_BYTES, "something has gone already"
        away = store.rename(tmp_path / "away")
        written = 0
        while written < 20:  # more than there is room for, once all that may go has gone
            try:
                write_large(client, f"during-{written}", 10 + written)
            except forebay.ResourceExhausted:
                break
            written += 1
        assert 1 <= written < 20
        assert "is away" in health_of(client, "object")
        with forebay.connect(daemon.address()["rpc"]) as other:  # with nothing mapped yet
            for seed in range(3):
                check_large(other, f"before-{seed}", seed)
            for number in range(written):
                check_large(other, f"during-{number}", 10 + number)
        away.rename(store)
        wait_until(lambda: health_of(client, "object") == "ok", "the store serves again")
        for number in range(written):
            client.dataset(f"during-{number}").wait("remote", timeout=60)
        write_large(client, "after", 30)  # there is room again
    check_log(daemon)


@pytest.mark.slow
def test_a_store_that_is_killed_is_out_of_service_until_it_is_back(
    tmp_path: Path, write_rows: Rows, check_rows: Rows, wait_until: Until
) -> None:
    if seaweed_program() is None:
        pytest.skip(missing_s3({}) or "")
    with SeaweedFS(tmp_path / "s3") as server:
        bucket = make_bucket(server.endpoint, KEY, SECRET)
        arguments = ("--object-url", bucket.url("x"))
        with (
            DaemonProcess(tmp_path / "data", *arguments, environment=bucket.environment) as daemon,
            forebay.connect(daemon.address()["rpc"]) as client,
        ):
            write_rows(client, "before", 1)
            client.dataset("before").wait("remote", timeout=60)
            server.kill()
            for number in range(4):
                write_rows(client, f"during-{number}", 10 + number)
            wait_until(
                lambda: health_of(client, "object").startswith("out of service"),
                "the store is out of service",
            )
            check_rows(client, "before", 1)
            check_rows(client, "during-0", 10)
            with pytest.raises(TimeoutError):
                client.dataset("during-0").wait("remote", timeout=1)
            server.start()
            for number in range(4):
                client.dataset(f"during-{number}").wait("remote", timeout=60)
            assert health_of(client, "object") == "ok"
    check_log(daemon)


@pytest.mark.slow
def test_a_daemon_starts_beside_a_store_that_is_down(
    tmp_path: Path, write_rows: Rows, check_rows: Rows, wait_until: Until
) -> None:
    if seaweed_program() is None:
        pytest.skip(missing_s3({}) or "")
    with SeaweedFS(tmp_path / "s3") as server:
        bucket = make_bucket(server.endpoint, KEY, SECRET)
        arguments = ("--object-url", bucket.url("x"))
        environment = bucket.environment
        daemon = DaemonProcess(tmp_path / "data", *arguments, environment=environment)
        with daemon, forebay.connect(daemon.address()["rpc"]) as client:
            write_rows(client, "before", 1)
            client.dataset("before").wait("remote", timeout=60)
            server.kill()
            daemon.restart()
            assert health_of(client, "object").startswith("out of service")
            assert "starts out of service" in daemon.log()
            check_rows(client, "before", 1)
            write_rows(client, "during", 2)
            with pytest.raises(TimeoutError):
                client.dataset("during").wait("remote", timeout=1)
            server.start()
            client.dataset("during").wait("remote", timeout=60)
            assert health_of(client, "object") == "ok"
        server.kill()
        elsewhere = ("--object-url", bucket.url("typo"))
        other = DaemonProcess(tmp_path / "data", *elsewhere, environment=environment)
        assert other.start().process.wait(60) != 0
        assert other.log().count("is the store up, reachable") > 0
        fresh = DaemonProcess(tmp_path / "fresh", *arguments, environment=environment)
        assert fresh.start().process.wait(60) != 0
        assert "is the store up, reachable" in fresh.log()


def check_log(daemon: DaemonProcess) -> None:
    """One line when it went and one when it came, beside the two flushes that found out."""
    log = daemon.log()
    assert log.count("is taken out of service") == 1
    assert log.count("is in service again") == 1
    assert log.count("WARNING") <= 4, log
    assert "Traceback" not in log
