"""What nobody has read yet, through a daemon with an empty local tier and by the bare S3 client.

Both read the same objects of the same server, as many at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from harness import MIB, Options, Report

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.s3 import S3Bucket, missing_s3, open_bucket

SAMPLE_BYTES = 4 * MIB
NUM_READERS = 8
NUM_QUICK = 24
NUM_FULL = 64


class ColdBench:
    """One dataset in the bucket, one sample an object, and a catalog that has no local copies."""

    def __init__(self, work: Path, bucket: S3Bucket, num_blobs: int) -> None:
        self._work = work
        self._bucket = bucket
        self._num_blobs = num_blobs
        self._num_runs = 0

    def write(self) -> None:
        """Write the dataset, and a catalog that knows it without any local copy."""
        random = np.random.default_rng(11)
        with self._daemon("writer"), forebay.connect(str(self._work / "writer")) as client:
            schema = {"x": forebay.Array("uint8", (SAMPLE_BYTES,)), "number": "int64"}
            with client.create_dataset("cold", schema, shard_bytes=SAMPLE_BYTES + 8192) as writer:
                for number in range(self._num_blobs):
                    data = random.integers(0, 255, SAMPLE_BYTES, dtype=np.uint8)
                    writer.write(x=data, number=number)
            client.dataset("cold").wait("remote", timeout=300)
        recover = ["recover", "--data", str(self._work / "cold"), self._bucket.url("cold")]
        subprocess.run(
            [sys.executable, "-m", "forebay_server", *recover],
            env={**os.environ, **self._bucket.environment},
            check=True,
            capture_output=True,
        )

    def through_daemon(self) -> float:
        """Bytes per second of a loader's first epoch."""
        self._num_runs += 1
        name = f"run{self._num_runs}"
        shutil.copytree(self._work / "cold", self._work / name)
        with self._daemon(name), forebay.connect(str(self._work / name)) as client:
            dataset = client.dataset("cold")
            with forebay.DataLoader(
                dataset,
                global_batch_size=1,
                num_threads=NUM_READERS,
                prefetch_batches=NUM_READERS,
            ) as loader:
                started = time.perf_counter()
                for epoch in loader.epochs(1):
                    for _ in epoch:
                        pass
                took = time.perf_counter() - started
        shutil.rmtree(self._work / name)
        return dataset.num_bytes / took

    def by_bare_client(self) -> float:
        """Bytes per second of s3fs alone."""
        files = self._bucket.file_system()
        folder = self._bucket.url("cold").removeprefix("s3://")
        paths = files.ls(f"{folder}/data", detail=False)
        with ThreadPoolExecutor(NUM_READERS) as readers:
            started = time.perf_counter()
            num_bytes = sum(readers.map(lambda path: len(files.cat_file(path)), paths))
            took = time.perf_counter() - started
        return num_bytes / took

    def _daemon(self, name: str) -> DaemonProcess:
        return DaemonProcess(
            self._work / name,
            *("--object-url", self._bucket.url("cold"), "--hdd-path", "none"),
            environment=self._bucket.environment,
        )


def add_to(report: Report, options: Options) -> None:
    """Measure, and add the ratio to *report*; without an S3 server there is none."""
    missing = missing_s3()
    if missing is not None:
        print(f"no cold reads: {missing}")
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.work)))
        bucket = stack.enter_context(open_bucket(folder / "s3"))
        bench = ColdBench(folder, bucket, NUM_QUICK if options.quick else NUM_FULL)
        bench.write()
        repeats = 2 if options.quick else min(options.repeats, 5)
        ratios = []
        for repeat in range(-1, repeats):  # the first one touches memory that nobody has used yet
            bare = bench.by_bare_client()
            ratio = bench.through_daemon() / bare
            if repeat >= 0:
                ratios.append(ratio)
        report.ratio("cold_read_vs_bare_client", ratios, at_least=0.7)
