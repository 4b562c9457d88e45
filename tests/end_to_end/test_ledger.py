"""Where the time of batches goes, by a real daemon and its loaders: made slow on purpose."""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess, run_server
from forebay_server.testing.slow_objects import SlowObjects
from forebay_wire.limits import KIB

NUM_SHARDS = 8
ROWS = 4
SAMPLE_BYTES = 64 * KIB
FAST = 1e12


@pytest.fixture(scope="module")
def cold(tmp_path_factory) -> Path:
    """An object tier of one dataset, and a catalog of just that."""
    folder = tmp_path_factory.mktemp("ledger")
    arguments = ("--object-url", f"file://{folder}/objects", "--reserve-bytes", "0")
    with (
        DaemonProcess(folder / "writer", *arguments),
        forebay.connect(str(folder / "writer")) as client,
    ):
        schema = {"x": forebay.Array("uint8", (SAMPLE_BYTES,)), "number": "int64"}
        random = np.random.default_rng(0)
        shard_bytes = ROWS * SAMPLE_BYTES + 16 * KIB
        with client.create_dataset("d", schema, shard_bytes=shard_bytes) as writer:
            for number in range(NUM_SHARDS * ROWS):
                writer.write(x=random.integers(0, 255, SAMPLE_BYTES, np.uint8), number=number)
        dataset = client.dataset("d")
        assert len(dataset.manifest.shards) >= NUM_SHARDS
        dataset.wait("remote", timeout=60)
    url = f"file://{folder}/objects"
    run_server("recover", "--data", folder / "node", url).check_returncode()
    return folder


def slow_daemon(cold: Path, data: Path, latency: float, rate: float) -> SlowObjects:
    """One that has only the object tier's copies, and local room for a quarter of them."""
    shutil.copytree(cold / "node", data)
    room = NUM_SHARDS // 4 * (ROWS * SAMPLE_BYTES + 32 * KIB)
    return SlowObjects(
        data,
        latency,
        rate,
        *("--object-url", f"file://{cold}/objects", "--hdd-path", "none"),
        *("--reserve-bytes", "0", "--ssd-bytes", str(room)),
    )


def largest(seconds) -> str:
    return max(seconds, key=lambda cause: seconds[cause])


def check(report) -> None:
    """The sums of a report are of one piece."""
    assert sum(report.stalls.values()) == pytest.approx(report.wait_seconds)
    assert sum(one.samples for one in report.epochs) == report.samples
    assert sum(one.wait_seconds for one in report.epochs) == pytest.approx(report.wait_seconds)
    slowest = report.slow_steps[0]
    assert slowest.wait_seconds == max(one.wait_seconds for one in report.slow_steps)
    assert sum(slowest.stalls.values()) == pytest.approx(slowest.wait_seconds)
    json.dumps(report.to_json())
    assert "waited for: " in str(report)


def status(data: Path, *arguments: str) -> str:
    """What ``forebay status --loaders`` prints."""
    command = [sys.executable, "-m", "forebay.cli", "status", "--loaders", "--data", str(data)]
    ended = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
    return ended.stdout


@pytest.mark.parametrize(
    ("latency", "rate", "cause", "no_local"),
    [
        (0.1, FAST, "origin", ""),
        pytest.param(0.0, 2e6, "throttle", "", marks=pytest.mark.slow),
        pytest.param(0.1, FAST, "origin", "1", marks=pytest.mark.slow),
        pytest.param(0.0, 2e6, "throttle", "1", marks=pytest.mark.slow),
    ],
)
def test_a_slow_object_tier_is_named(cold, tmp_path, latency, rate, cause, no_local, monkeypatch):
    monkeypatch.setenv("FOREBAY_NO_LOCAL", no_local)
    with (
        slow_daemon(cold, tmp_path / "node", latency, rate) as daemon,
        forebay.connect(str(daemon.data)) as client,
        forebay.DataLoader(
            client.dataset("d"), global_batch_size=ROWS, shuffle="full", include_times=True
        ) as loader,
    ):
        for batch in loader:
            times = batch["_times"]
            assert times["wait"] >= 0.0
            assert times["ready"] >= 0.0
        report = loader.report()
        check(report)
        assert largest(report.stalls) == cause, report
        assert largest(report.slow_steps[0].stalls) == cause
        deadline = time.monotonic() + 30
        while "SSD tier is" not in loader.report().advice:
            assert time.monotonic() < deadline, loader.report()
        told = loader.report().advice
        assert told.startswith("reading is ")
        assert told.endswith((" kB short of this plan", " MB short of this plan"))

        while "SSD tier is" not in (plans := client.status().plans)[0].times.advice:
            assert time.monotonic() < deadline, plans
        [plan] = json.loads(status(daemon.data, "--json"))
        assert plan["times"]["causes"][0]["cause"] == cause
        assert plan["times"]["samples"] == NUM_SHARDS * ROWS
        shown = status(daemon.data)
        assert f" {cause} " in shown
        assert f": {plan['times']['advice']}\n" in shown
        loader.close()
        url = f"{daemon.address()['http_url']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            text = answer.read().decode()
        counted = next(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith(f'forebay_loader_wait_seconds_total{{cause="{cause}"}}')
        )
        assert counted == pytest.approx(loader.report().stalls[cause], abs=1e-3)
        assert f"forebay_loader_samples_total {float(NUM_SHARDS * ROWS)}" in text


@pytest.fixture(scope="module")
def daemon_of(tmp_path_factory):
    """The data folder of a daemon that has all it needs."""
    data = tmp_path_factory.mktemp("warm") / "data"
    with DaemonProcess(data):
        yield data


@pytest.fixture(scope="module")
def warm(daemon_of):
    """Its dataset."""
    with forebay.connect(str(daemon_of)) as client:
        with client.create_dataset("d", {"number": "int64"}) as writer:
            for number in range(400):
                writer.write(number=number)
        yield client.dataset("d")


def slowly(batch):
    time.sleep(0.02)
    return batch


@pytest.mark.parametrize("num_threads", [0, 1])
def test_a_slow_transform_is_named(warm, num_threads):
    with forebay.DataLoader(
        warm, global_batch_size=20, num_threads=num_threads, transform=slowly
    ) as loader:
        for _ in loader:
            assert loader.last_batch_times.read["transform"] >= 0.02
        report = loader.report()
    check(report)
    assert largest(report.stalls) == "transform", report
    assert report.advice.startswith("transform is ")
    assert report.advice.endswith(" a cheaper transform")


def test_a_slow_trainer_waits_for_nothing(warm):
    with forebay.DataLoader(warm, global_batch_size=20) as loader:
        for _ in loader:
            time.sleep(0.03)
        report = loader.report()
    assert report.wait_share < 0.3, report  # of a first batch that also opens all there is
    assert report.ready_batches >= 15
    assert report.ready_seconds > report.wait_seconds
    later = sum(one.wait_seconds for one in report.slow_steps if one.step > 1)
    assert later < 0.05 * report.seconds


def _told_by_workers(data: Path):
    """What the daemon knows of them, once it has heard of both."""
    with forebay.connect(str(data)) as client:
        deadline = time.monotonic() + 30
        while True:
            for plan in client.status().plans:
                if plan.times.covers.startswith("figures of 2 workers"):
                    return plan.times
            assert time.monotonic() < deadline, client.status().plans


def test_workers_tell_what_they_are_busy_with(warm, daemon_of):
    stream = forebay.StreamingDataset(
        warm, global_batch_size=20, transform=slowly, include_times=True
    )
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    for number, batch in enumerate(loader):
        assert batch["_times"]["transform"] >= 0.02
        if number == 9:
            told = _told_by_workers(daemon_of)
            assert 8 <= told.batches <= 20
            assert told.causes[0].cause == "transform"
    report = stream.report()
    assert (report.samples, report.batches) == (400, 20)
    assert largest(report.reading) == "transform"
    assert report.reading["transform"] == pytest.approx(20 * 0.02, rel=1.0)
    assert report.covers.startswith("figures of 2 workers")
    assert report.wait_seconds == 0.0
    assert "transform" in str(report)


def test_without_workers_all_reading_is_waited_for(warm):
    stream = forebay.StreamingDataset(warm, global_batch_size=20, transform=slowly)
    for _ in stream:
        time.sleep(0.001)
    report = stream.report()
    assert report.wait_seconds == pytest.approx(sum(report.reading.values()))
    assert report.covers == ""
    assert report.advice.startswith("transform is ")
