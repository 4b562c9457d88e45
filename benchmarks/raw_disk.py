"""Bare writes and reads of a disk, by the best of some ways: what benchmarks compare with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MIB = 1024 * 1024

Way = tuple[int, int]
"""Bytes at a time (negative, of a read: with O_DIRECT), threads."""

DISK_WAYS: tuple[Way, ...] = ((1 * MIB, 1), (4 * MIB, 1), (16 * MIB, 1), (4 * MIB, 2), (4 * MIB, 4))
"""Of writes, with O_DIRECT all."""

READ_WAYS: tuple[Way, ...] = (
    *((4 * MIB, threads) for threads in (1, 2, 4)),
    *((-4 * MIB, threads) for threads in (2, 4)),
)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fastest(ways: tuple[Way, ...], work: Callable[[Way], float]) -> Way:
    """The way with the best time of three."""
    work(ways[0])  # the first one pays for what all need
    seconds = {way: min(work(way) for _ in range(3)) for way in ways}
    return min(seconds, key=seconds.__getitem__)


def write_raw(path: Path, data: memoryview, way: Way) -> float:
    """Seconds of a plain durable write of a new file of *data*, whose address is aligned."""
    piece_bytes, num_threads = way

    def write(threads: ThreadPoolExecutor) -> None:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, len(data))
            starts = range(0, len(data), piece_bytes)
            pieces = ((data[start : start + piece_bytes], start) for start in starts)
            written = sum(threads.map(lambda piece: os.pwrite(descriptor, *piece), pieces))
            if written != len(data):
                raise OSError("short write of a benchmark file")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        folder_descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder_descriptor)
        os.close(folder_descriptor)

    with ThreadPoolExecutor(num_threads) as threads:
        return timed(lambda: write(threads))


def write_and_remove(folder: Path, data: memoryview, way: Way) -> float:
    """Seconds of :func:`write_raw`, whose file is gone again after."""
    path = folder / "raw"
    seconds = write_raw(path, data, way)
    path.unlink()
    return seconds


def read_raw(path: Path, into: memoryview, way: Way) -> float:
    """Seconds of a plain cold read of the beginning of *path*, as much as *into* takes."""
    piece_bytes, num_threads = way
    drop_cached(path.parent)
    flags = os.O_RDONLY | (os.O_DIRECT if piece_bytes < 0 else 0)
    descriptor = os.open(path, flags)
    piece_bytes = abs(piece_bytes)

    def read(start: int) -> None:
        part = into[start : start + piece_bytes]
        if os.preadv(descriptor, [part], start) != len(part):
            raise OSError("short read of a benchmark file")

    try:
        with ThreadPoolExecutor(num_threads) as threads:
            starts = range(0, len(into), piece_bytes)
            return timed(lambda: list(threads.map(read, starts)))
    finally:
        os.close(descriptor)


def drop_cached(folder: Path) -> None:
    """Have nothing of the files of *folder* in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def disk_reads(pid: int | str = "self") -> int:
    """Bytes that a process had disks read, so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes: "))
