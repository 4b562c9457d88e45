"""The daemon for real, with its object tier behind a link of a set latency and bandwidth.

Each run begins with an empty ssd tier. One blob is one sample here, so that a shuffled epoch is a
shuffled order of blobs. What the links are worth is measured by what they have to carry at least.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import MIB, Options, Report
from tiering_link import COUNT
from tiering_peers import Belady

import forebay
import forebay.dataset.loader  # with torch, before anything is timed
from forebay.dataset.dataset import Dataset
from forebay_server.testing.daemon import DaemonProcess

LATENCY_SECONDS = 0.02
SAMPLE_BYTES = MIB // 2
SHARD_BYTES = SAMPLE_BYTES + 8192
FILL_LEVELS = ("--watermarks", "98,99,100")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    num_blobs: int
    link_rate: float
    """Bytes per second."""
    num_busy_epochs: int
    num_job_epochs: int

    @property
    def num_bytes(self) -> int:
        return self.num_blobs * SAMPLE_BYTES


QUICK = Sizes(num_blobs=64, link_rate=12 * MIB, num_busy_epochs=3, num_job_epochs=2)
FULL = Sizes(num_blobs=256, link_rate=25 * MIB, num_busy_epochs=4, num_job_epochs=3)


class LinkedDaemon(DaemonProcess):
    """A daemon behind ``tiering_link.py``."""

    def __init__(self, data: Path, latency: float, rate: float, *arguments: str) -> None:
        super().__init__(data, *arguments)
        self._count = data.parent / f"{data.name}-count"
        self._count.write_bytes(COUNT.pack(0))
        self._link = (str(latency), str(rate), str(self._count))

    def start(self, *, environment: object = None) -> LinkedDaemon:
        script = str(Path(__file__).with_name("tiering_link.py"))
        command = [sys.executable, script, *self._link, "serve", "--data", str(self.data)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen([*command, *self.arguments], stdout=log, stderr=log)
        return self

    def origin_bytes(self) -> int:
        """Bytes that came over the link."""
        return int(COUNT.unpack(self._count.read_bytes())[0])


class Bench:
    """One dataset in an object tier, and daemons that have nothing else."""

    def __init__(self, work: Path, sizes: Sizes) -> None:
        self.work = work
        self.sizes = sizes
        self._objects = f"file://{work / 'objects'}"
        self._num_runs = 0

    def write(self) -> None:
        """Write the dataset, and a catalog that knows it without any local copy."""
        random = np.random.default_rng(7)
        arguments = ("--object-url", self._objects, "--hdd-path", "none")
        with DaemonProcess(self.work / "writer", *arguments), self._client("writer") as client:
            schema = {"x": forebay.Array("uint8", (SAMPLE_BYTES,)), "number": "int64"}
            with client.create_dataset("blobs", schema, shard_bytes=SHARD_BYTES) as writer:
                for number in range(self.sizes.num_blobs):
                    data = random.integers(0, 255, SAMPLE_BYTES, dtype=np.uint8)
                    writer.write(x=data, number=number)
            client.dataset("blobs").wait("remote", timeout=120)
        recover = ["recover", "--data", str(self.work / "cold"), self._objects]
        subprocess.run(
            [sys.executable, "-m", "forebay_server", *recover], check=True, capture_output=True
        )

    @contextmanager
    def run(
        self, rate: float, cache_bytes: int = 0, latency: float = LATENCY_SECONDS
    ) -> Iterator[tuple[LinkedDaemon, forebay.Client, Dataset]]:
        """A daemon with an empty ssd tier, a client of it, and the dataset."""
        self._num_runs += 1
        data = self.work / f"run{self._num_runs}"
        shutil.copytree(self.work / "cold", data)
        arguments = ["--object-url", self._objects, "--hdd-path", "none", *FILL_LEVELS]
        arguments += ["--ssd-bytes", str(cache_bytes)] if cache_bytes else []
        daemon = LinkedDaemon(data, latency, rate, *arguments)
        with daemon, self._client(data.name) as client:
            yield daemon, client, client.dataset("blobs")
        shutil.rmtree(data)

    def _client(self, name: str) -> forebay.Client:
        return forebay.connect(str(self.work / name))


def first_epoch(bench: Bench) -> float:
    """Time that the link needs for the dataset over the time of a first epoch without compute."""
    rate = bench.sizes.link_rate / 3
    with bench.run(rate) as (_, _, dataset):
        started = time.perf_counter()
        with forebay.DataLoader(dataset, global_batch_size=1, shuffle="full", seed=1) as loader:
            for epoch in loader.epochs(1):
                for _ in epoch:
                    pass
        took = time.perf_counter() - started
    return dataset.num_bytes / rate / took


def busy(bench: Bench) -> tuple[float, float]:
    """Share of compute time where the link is fast enough; bytes of the origin over unique ones."""
    sizes = bench.sizes
    compute = SAMPLE_BYTES / (0.7 * sizes.link_rate)
    with bench.run(sizes.link_rate) as (daemon, _, dataset):
        started, computed = time.perf_counter(), 0.0
        with forebay.DataLoader(dataset, global_batch_size=1, shuffle="full", seed=2) as loader:
            for epoch in loader.epochs(sizes.num_busy_epochs):
                for _ in epoch:
                    begun = time.perf_counter()
                    time.sleep(compute)
                    computed += time.perf_counter() - begun
        took = time.perf_counter() - started
        return computed / took, daemon.origin_bytes() / dataset.num_bytes


def against_clairvoyant(bench: Bench, share: float) -> float:
    """Bytes of the origin for two jobs over those of an optimal cache for the same trace."""
    sizes = bench.sizes
    trace: list[str] = []
    rate = 2 * sizes.link_rate
    compute = 2 * SAMPLE_BYTES / (0.7 * rate)
    file_bytes = SHARD_BYTES + 4096
    capacity = int(share * sizes.num_blobs) * file_bytes
    with bench.run(rate, capacity) as (daemon, _, dataset):
        blobs = [shard.blob for shard in dataset.manifest.shards]

        def job(seed: int) -> None:
            with forebay.DataLoader(
                dataset,
                global_batch_size=1,
                shuffle="full",
                seed=seed,
                num_threads=1,
                prefetch_batches=2,
            ) as loader:
                for epoch in loader.epochs(sizes.num_job_epochs):
                    for batch in epoch:
                        trace.append(blobs[int(batch["number"][0])])
                        time.sleep(compute)

        jobs = [threading.Thread(target=job, args=(seed,)) for seed in (3, 4)]
        for one in jobs:
            one.start()
        for one in jobs:
            one.join()
        fetched = daemon.origin_bytes()
    optimum = Belady(capacity, trace)
    misses = sum(not optimum.access(blob, file_bytes) for blob in trace)
    return fetched / (misses * dataset.num_bytes / sizes.num_blobs)


def add_to(report: Report, options: Options) -> None:
    """Measure for real, and add the ratios to *report*."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        bench = Bench(Path(folder), QUICK if options.quick else FULL)
        bench.write()
        repeats = 1 if options.quick else min(options.repeats, 3)
        report.ratio(
            "first_epoch_vs_link", [first_epoch(bench) for _ in range(repeats)], at_least=0.95
        )
        shares, origin = zip(*(busy(bench) for _ in range(repeats)), strict=True)
        report.ratio("busy_with_sufficient_link", shares, at_least=0.95)
        for share in (0.3, 0.5):
            report.value(
                "origin_bytes_vs_clairvoyant",
                [against_clairvoyant(bench, share) for _ in range(repeats)],
                at_most=1.1,
            )
        report.value("origin_bytes_all_fits", origin, at_most=1.02)
