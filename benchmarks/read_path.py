"""How fast are verified reads through the daemon, against the bare system calls?

Yardsticks, on the blob's own file: ``preadv`` of the page-cached file into a warm buffer, a fresh
``mmap`` of it with every byte touched, and a bare sendfile -> recv_into loop over loopback TCP from
another process. Each repeat uploads a blob never stored before; its pages are in the page cache, as
they are for a second reader on a node.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from harness import MIB, Options, Report, Samples, parse_options, percentile

import forebay
from forebay.methods import Admin, Blobs
from forebay.transfer import Blob, Transfer, make_transfer
from forebay_wire.protocol import DataEndpoint, protocol_range
from forebay_wire.segments import even_cuts
from forebay_wire.v1 import admin_pb2, blobs_pb2

PIECE_BYTES = 4 * MIB

ROUNDS = 11
"""Interleaved rounds of yardstick and case on each repeat's blob; their medians are compared.

A pass takes a few milliseconds, a time slice that another process takes as many.
"""


def store_random_blob(client: forebay.Client, transfer: Transfer, num_bytes: int) -> str:
    """Upload *num_bytes* of fresh random bytes; the blob's id."""
    begin = blobs_pb2.BeginUploadRequest(
        total_bytes=num_bytes, slot_bytes=num_bytes, owner="benchmark"
    )
    session = client.channel.call(Blobs.BeginUpload, begin)
    slot = transfer.upload_slot(session.session, session.slot_bytes, session.put_ticket)
    np.frombuffer(slot.buffer, dtype=np.uint8)[:num_bytes] = np.frombuffer(
        np.random.default_rng().bytes(num_bytes), dtype=np.uint8
    )
    slot.flush(num_bytes)
    seal = blobs_pb2.SealRequest(
        session=session.session, sequence=0, num_bytes=num_bytes, cuts=even_cuts(num_bytes)
    )
    sealed = client.channel.call(Blobs.Seal, seal, timeout=120)
    slot.close()
    return str(sealed.blob)


@dataclass
class Files:
    """A daemon, its data folder, and a warm buffer as long as each blob."""

    client: forebay.Client
    data: Path
    num_bytes: int
    endpoint: DataEndpoint
    buffer: np.ndarray

    def newest_file(self) -> Path:
        """The file of the blob that was stored last: what the yardsticks read."""
        files = (path for path in (self.data / "ssd" / "files").rglob("*") if path.is_file())
        return max(files, key=lambda path: path.stat().st_mtime_ns)


def preadv_all(descriptor: int, buffer: np.ndarray) -> None:
    view = memoryview(buffer)
    for start in range(0, len(view), PIECE_BYTES):
        part = view[start : start + PIECE_BYTES]
        if os.preadv(descriptor, [part], start) != len(part):
            raise OSError("short read of a benchmark file")


def touch(view: memoryview) -> int:
    """Read every byte once, piece by piece."""
    total = 0
    for start in range(0, len(view), PIECE_BYTES):
        words = np.frombuffer(view[start : start + PIECE_BYTES], dtype=np.uint64)
        total ^= int(np.bitwise_or.reduce(words))
    return total


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_preadv(path: Path, buffer: np.ndarray) -> float:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return timed(lambda: preadv_all(descriptor, buffer))
    finally:
        os.close(descriptor)


def bare_mmap(path: Path, num_bytes: int) -> tuple[float, float]:
    """Seconds to map a file and touch every byte, and to touch every byte again."""
    descriptor = os.open(path, os.O_RDONLY)
    start = time.perf_counter()
    try:
        with mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ) as mapped:
            view = memoryview(mapped)
            touch(view)
            first = time.perf_counter() - start
            again = timed(lambda: touch(view))
            view.release()
            return first, again
    finally:
        os.close(descriptor)


def read_blob(blob: Blob, buffer: np.ndarray) -> None:
    view = memoryview(buffer)
    for start in range(0, len(view), PIECE_BYTES):
        blob.read_into(start, view[start : start + PIECE_BYTES])


def map_blob(blob: Blob) -> None:
    total = 0
    for start in range(0, blob.num_bytes, PIECE_BYTES):
        words = np.frombuffer(
            blob.map(start, min(PIECE_BYTES, blob.num_bytes - start)), dtype=np.uint64
        )
        total ^= int(np.bitwise_or.reduce(words))


@dataclass
class BlobCases:
    """First and second passes over fresh blobs, read and mapped."""

    files: Files
    transfer: Transfer
    samples: Samples

    def measure(self, repeat: int) -> None:
        """One repeat on bytes never stored before: yardsticks and blob passes in turn.

        A blob opened anew has checked nothing yet, so each round has its first pass.
        """
        blob_id = store_random_blob(self.files.client, self.transfer, self.files.num_bytes)
        warm_page_cache(self.transfer, blob_id, self.files.buffer)
        path = self.files.newest_file()
        rounds = Samples()
        for _ in range(ROUNDS):
            numbers = self._read_passes(path, blob_id) | self._map_passes(path, blob_id)
            for name, number in numbers.items():
                rounds.add(name, number)
        if repeat >= 0:
            self.samples.add_medians(rounds)

    def _read_passes(self, path: Path, blob_id: str) -> dict[str, float]:
        buffer = self.files.buffer
        (blob,) = self.transfer.open([blob_id])
        with contextlib.closing(blob):
            return {
                "bare_read": bare_preadv(path, buffer),
                "first_read": timed(lambda: read_blob(blob, buffer)),
                "bare_read_again": bare_preadv(path, buffer),
                "second_read": timed(lambda: read_blob(blob, buffer)),
            }

    def _map_passes(self, path: Path, blob_id: str) -> dict[str, float]:
        (blob,) = self.transfer.open([blob_id])
        with contextlib.closing(blob):
            first, again = bare_mmap(path, self.files.num_bytes)
            return {
                "bare_mmap": first,
                "first_mmap": timed(lambda: map_blob(blob)),
                "bare_mmap_again": again,
                "second_mmap": timed(lambda: map_blob(blob)),
            }


def warm_page_cache(local: Transfer, blob_id: str, buffer: np.ndarray) -> None:
    """Read a blob once: it was written around the page cache."""
    (blob,) = local.open([blob_id])
    with contextlib.closing(blob):
        read_blob(blob, buffer)


def serve_bare(num_bytes: int, port: Connection) -> None:
    """The remote yardstick's server: for each line, the start of the file that it names."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port.send(listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                descriptor = os.open(line.rstrip(b"\n"), os.O_RDONLY)
                sent = 0
                while sent < num_bytes:
                    sent += os.sendfile(connection.fileno(), descriptor, sent, num_bytes - sent)
                os.close(descriptor)


@contextlib.contextmanager
def bare_server(num_bytes: int) -> Iterator[socket.socket]:
    """A connection to a bare sendfile server in another process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_bare, args=(num_bytes, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(30):
            raise TimeoutError("the bare sendfile server did not start within 30 s")
        with socket.create_connection(("127.0.0.1", ours.recv())) as connection:
            yield connection
    finally:
        process.kill()
        process.join()


def receive_bare(connection: socket.socket, path: Path, buffer: np.ndarray) -> None:
    connection.sendall(f"{path}\n".encode())
    view, received = memoryview(buffer), 0
    while received < len(view):
        received += connection.recv_into(view[received:])


def measure_remote(files: Files, repeats: int, report: Report) -> None:
    """One stream over loopback: verified HTTP ranges against the bare loop, on the same file."""
    remote = make_transfer(
        DataEndpoint(None, files.endpoint.http_url, files.endpoint.token, "benchmark")
    )
    local = make_transfer(files.endpoint)
    samples = Samples()
    with contextlib.closing(remote), bare_server(files.num_bytes) as connection:
        for repeat in range(-1, repeats):
            blob_id = store_random_blob(files.client, local, files.num_bytes)
            warm_page_cache(local, blob_id, files.buffer)
            path = files.newest_file()
            (blob,) = remote.open([blob_id])
            with contextlib.closing(blob):
                rounds = Samples()
                for _ in range(ROUNDS):
                    bare = timed(lambda path=path: receive_bare(connection, path, files.buffer))
                    verified = timed(lambda blob=blob: blob.read_into(0, memoryview(files.buffer)))
                    rounds.add("bare", bare)
                    rounds.add("verified", verified)
            if repeat >= 0:
                samples.add_medians(rounds)
    report.ratio("remote_read_vs_sendfile", samples.ratio("bare", "verified"), at_least=0.7)


def measure_handover(files: Files, report: Report, *, rounds: int) -> None:
    """Opening blobs by descriptor, one and 64 at a time, and the control calls beside it."""
    transfer = make_transfer(files.endpoint)
    blobs = [store_random_blob(files.client, transfer, 64 * 1024) for _ in range(64)]

    def open_microseconds(ids: list[str]) -> float:
        opened: list[Blob] = []
        seconds = timed(lambda: opened.extend(transfer.open(ids)))
        for blob in opened:
            blob.close()
        return seconds * 1e6 / len(ids)

    for _ in range(20):
        open_microseconds(blobs[:1])
    single = [open_microseconds(blobs[:1]) for _ in range(rounds)]
    batched = [open_microseconds(blobs) for _ in range(max(rounds // 20, 10))]
    request = admin_pb2.HandshakeRequest(protocols=protocol_range(), client_version="benchmark")
    unary = [
        timed(lambda: files.client.channel.call(Admin.Handshake, request)) * 1e6
        for _ in range(rounds // 2)
    ]
    report.value("handover_us_p50", single, at_most=200)
    report.value("handover_us_p99", [percentile(single, 0.99)])
    report.value("batched_handover_us_per_blob", batched)
    report.value("unary_rpc_us_p50", unary)
    report.value("unary_rpc_us_p99", [percentile(unary, 0.99)])


def run(options: Options, folder: Path) -> Report:
    """All figures of this script."""
    report = Report("Reads through the daemon against the bare system calls")
    num_bytes = (64 if options.quick else 256) * MIB
    data = folder / "data"
    with forebay.connect(data) as client:
        files = Files(client, data, num_bytes, client.endpoint, np.ones(num_bytes, dtype=np.uint8))
        measure_handover(files, report, rounds=400 if options.quick else 4000)
        cases = BlobCases(files, make_transfer(client.endpoint), Samples())
        for repeat in range(-1, options.repeats):
            cases.measure(repeat)
        ratio = cases.samples.ratio
        report.ratio("first_read_vs_preadv", ratio("bare_read", "first_read"), at_least=0.7)
        report.ratio("first_mmap_vs_mmap", ratio("bare_mmap", "first_mmap"), at_least=0.6)
        report.ratio(
            "second_read_vs_preadv", ratio("bare_read_again", "second_read"), at_least=0.95
        )
        report.ratio("second_mmap_vs_mmap", ratio("bare_mmap_again", "second_mmap"), at_least=0.95)
        measure_remote(files, options.repeats, report)
    return report


def main() -> int:
    options = parse_options(__doc__.splitlines()[0])
    with tempfile.TemporaryDirectory(prefix="forebay-read-path-", dir=options.work) as folder:
        return run(options, Path(folder)).finish(options)


if __name__ == "__main__":
    sys.exit(main())
