"""How fast are verified reads through the daemon, against the bare system calls?

Yardsticks, on the same bytes: ``preadv`` of a page-cached file into a warm buffer, a fresh ``mmap``
of it with every byte touched, and a bare sendfile -> recv_into loop over loopback TCP from another
process. Each repeat uploads a blob never stored before; its pages are in the page cache, as they
are for a second reader on a node.
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
from harness import MIB, Options, Report, Samples, interleave, parse_options, percentile

import forebay
from forebay.methods import Admin, Blobs
from forebay.transfer import Blob, Transfer, make_transfer
from forebay_wire.protocol import DataEndpoint, protocol_range
from forebay_wire.segments import even_cuts
from forebay_wire.v1 import admin_pb2, blobs_pb2

PIECE_BYTES = 4 * MIB


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
    """A daemon, and per repeat a plain file and a blob with equally many fresh bytes."""

    client: forebay.Client
    folder: Path
    num_bytes: int
    endpoint: DataEndpoint
    buffer: np.ndarray

    def plain_file(self, repeat: int) -> Path:
        path = self.folder / f"plain-{repeat}"
        if not path.exists():
            path.write_bytes(np.random.default_rng().bytes(self.num_bytes))
            self._read_all(path)
        return path

    def _read_all(self, path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            preadv_all(file.fileno(), self.buffer)


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


def bare_preadv(files: Files, repeat: int) -> float:
    descriptor = os.open(files.plain_file(repeat), os.O_RDONLY)
    try:
        return timed(lambda: preadv_all(descriptor, files.buffer))
    finally:
        os.close(descriptor)


def bare_mmap(files: Files, repeat: int) -> float:
    descriptor = os.open(files.plain_file(repeat), os.O_RDONLY)

    def work() -> None:
        with mmap.mmap(descriptor, files.num_bytes, prot=mmap.PROT_READ) as mapped:
            view = memoryview(mapped)
            touch(view)
            view.release()

    try:
        return timed(work)
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
        """One repeat: bare yardsticks and blob passes in turn, on bytes never stored before."""
        blob_id = store_random_blob(self.files.client, self.transfer, self.files.num_bytes)
        warm_page_cache(self.transfer, blob_id, self.files.buffer)
        for kind, bare, work in (
            ("read", bare_preadv, lambda blob: read_blob(blob, self.files.buffer)),
            ("mmap", bare_mmap, map_blob),
        ):
            (blob,) = self.transfer.open([blob_id])
            with contextlib.closing(blob):
                numbers = {
                    f"bare_{kind}": bare(self.files, repeat),
                    f"first_{kind}": timed(lambda blob=blob, work=work: work(blob)),
                    f"bare_{kind}_again": self._bare_second(kind, repeat),
                    f"second_{kind}": timed(lambda blob=blob, work=work: work(blob)),
                }
            if repeat >= 0:
                for name, number in numbers.items():
                    self.samples.add(name, number)
        (self.files.folder / f"plain-{repeat}").unlink()

    def _bare_second(self, kind: str, repeat: int) -> float:
        """The yardstick of a second pass: a mapping that was touched before, a file read before."""
        if kind == "read":
            return bare_preadv(self.files, repeat)
        descriptor = os.open(self.files.plain_file(repeat), os.O_RDONLY)
        try:
            with mmap.mmap(descriptor, self.files.num_bytes, prot=mmap.PROT_READ) as mapped:
                view = memoryview(mapped)
                touch(view)
                number = timed(lambda: touch(view))
                view.release()
                return number
        finally:
            os.close(descriptor)


def warm_page_cache(local: Transfer, blob_id: str, buffer: np.ndarray) -> None:
    """Read a blob once: it was written around the page cache."""
    (blob,) = local.open([blob_id])
    with contextlib.closing(blob):
        read_blob(blob, buffer)


def serve_bare(path: str, num_bytes: int, port: Connection) -> None:
    """The remote yardstick's server: one file to each connection, by sendfile."""
    with socket.create_server(("127.0.0.1", 0)) as listener, Path(path).open("rb") as file:
        port.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection:
                while connection.recv(1):
                    sent = 0
                    while sent < num_bytes:
                        sent += os.sendfile(
                            connection.fileno(), file.fileno(), sent, num_bytes - sent
                        )


@contextlib.contextmanager
def bare_server(path: Path, num_bytes: int) -> Iterator[socket.socket]:
    """A connection to a bare sendfile server in another process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_bare, args=(str(path), num_bytes, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(30):
            raise TimeoutError("the bare sendfile server did not start within 30 s")
        with socket.create_connection(("127.0.0.1", ours.recv())) as connection:
            yield connection
    finally:
        process.kill()
        process.join()


def receive_bare(connection: socket.socket, buffer: np.ndarray) -> None:
    connection.sendall(b"g")
    view, received = memoryview(buffer), 0
    while received < len(view):
        received += connection.recv_into(view[received:])


def measure_remote(files: Files, repeats: int, report: Report) -> None:
    """One stream over loopback: verified HTTP ranges against the bare loop."""
    remote = make_transfer(
        DataEndpoint(None, files.endpoint.http_url, files.endpoint.token, "benchmark")
    )
    local = make_transfer(files.endpoint)
    plain = files.plain_file(10_000)
    with contextlib.closing(remote), bare_server(plain, files.num_bytes) as connection:

        def verified(_repeat: int) -> float:
            blob_id = store_random_blob(files.client, local, files.num_bytes)
            warm_page_cache(local, blob_id, files.buffer)
            (blob,) = remote.open([blob_id])
            with contextlib.closing(blob):
                return timed(lambda: blob.read_into(0, memoryview(files.buffer)))

        samples = interleave(
            {
                "bare": lambda _repeat: timed(lambda: receive_bare(connection, files.buffer)),
                "verified": verified,
            },
            repeats=repeats,
        )
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
    with forebay.connect(folder / "data") as client:
        files = Files(
            client, folder, num_bytes, client.endpoint, np.ones(num_bytes, dtype=np.uint8)
        )
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
