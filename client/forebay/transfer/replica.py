"""What the daemon hands over for one blob: descriptors, where its bytes lie in them, its table."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from forebay.forking import watch
from forebay.transfer.link import close_all
from forebay_wire.errors import IntegrityError, ResourceExhausted
from forebay_wire.limits import MAX_MAPS_PER_CLIENT
from forebay_wire.segments import SegmentTable


@dataclass(frozen=True)
class Extent:
    """A stretch of a blob in one file."""

    blob_offset: int
    descriptor: int
    file_offset: int
    length: int


class _Maps:
    """Counts this process's mappings of blobs; each lives until the last view of it is gone."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a mapping may die in a collection that starts inside
        self.number = 0
        watch(self)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Inside, a mapping is made; it is not counted if that fails."""
        with self._lock:
            if self.number >= MAX_MAPS_PER_CLIENT:
                raise ResourceExhausted(
                    f"{self.number} mapped blobs are in use in this process: let go of batches "
                    "and arrays that were read, or copy what you keep"
                )
            self.number += 1
        try:
            yield
        except BaseException:
            self.one_less()
            raise

    def one_less(self) -> None:
        with self._lock:
            self.number -= 1

    def forget_parent(self) -> None:
        """In a child of fork: the mappings are its own, too, but not the lock's holder."""
        self._lock = threading.RLock()


_maps: Final = _Maps()


class Replica:
    """One replica of a blob, open for reading. Thread-safe.

    Its descriptors are closed when nobody refers to it any more, so never under a reader's feet; a
    mapping made before outlives them.
    """

    def __init__(
        self, tier: str, table: SegmentTable, extents: tuple[Extent, ...], descriptors: list[int]
    ) -> None:
        self.tier = tier
        self.table = table
        self.extents = extents
        weakref.finalize(self, close_all, descriptors).atexit = False

    def read(self, offset: int, target: memoryview) -> int:
        """Fill *target* from *offset* of the blob; fewer bytes only if the file ends there."""
        done = 0
        for extent in self.extents:
            skip = offset + done - extent.blob_offset
            if not 0 <= skip < extent.length:
                continue
            part = target[done : done + extent.length - skip]
            count = read_fully(extent.descriptor, extent.file_offset + skip, part)
            done += count
            if count < len(part) or done == len(target):
                break
        return done

    def will_read(self, offset: int, length: int) -> None:
        """Have the kernel fetch these bytes, unless its cache has the first of them."""
        for extent in self.extents:
            start = max(offset, extent.blob_offset)
            stop = min(offset + length, extent.blob_offset + extent.length)
            if start < stop:
                place = extent.file_offset + start - extent.blob_offset
                with contextlib.suppress(OSError):  # a file system may not support either
                    if not _is_cached(extent.descriptor, place):
                        os.posix_fadvise(
                            extent.descriptor, place, stop - start, os.POSIX_FADV_WILLNEED
                        )

    def mapped(self) -> memoryview | None:
        """All bytes of the blob as they lie in the page cache; None if they lie in pieces.

        Raises ValueError if the file has become shorter: touching what is missing would be SIGBUS;
        ResourceExhausted where this process has as many mappings as it may have.
        """
        if len(self.extents) != 1:
            return None
        extent = self.extents[0]
        skip = extent.file_offset % mmap.ALLOCATIONGRANULARITY
        with _maps.one_more():
            memory = mmap.mmap(
                extent.descriptor,
                skip + extent.length,
                flags=mmap.MAP_SHARED,
                prot=mmap.PROT_READ,
                offset=extent.file_offset - skip,
            )
            weakref.finalize(memory, _maps.one_less).atexit = False
        return memoryview(memory)[skip:]


class Handover:
    """The descriptors of one answer, each taken by at most one replica; the rest are closed."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = list(descriptors)
        self._taken: set[int] = set()

    def close(self) -> None:
        """Close what no replica took."""
        for index, descriptor in enumerate(self._descriptors):
            if index not in self._taken:
                os.close(descriptor)
        self._descriptors = []

    def replica(self, entry: dict[str, Any], where: str) -> Replica:
        """The replica of an *entry* of the answer, its table proven to be the blob's.

        Raises IntegrityError if a file is shorter than the entry says or the table is damaged.
        """
        table_index, table_offset, table_length = entry["table"]
        stretches = [tuple(extent) for extent in entry["extents"]]
        self._check_size(table_index, table_offset + table_length, where)
        for _, index, file_offset, length in stretches:
            self._check_size(index, file_offset + length, where)
        table = self._read_table(entry, where)
        taken: dict[int, int] = {}
        for _, index, _, _ in stretches:
            if index not in taken:
                taken[index] = self._take(index)
        extents = tuple(
            Extent(blob_offset, taken[index], file_offset, length)
            for blob_offset, index, file_offset, length in stretches
        )
        return Replica(str(entry["tier"]), table, extents, list(taken.values()))

    def _check_size(self, index: int, needed: int, where: str) -> None:
        found = os.fstat(self._descriptors[index]).st_size
        if found < needed:
            raise IntegrityError(f"a file of {found} bytes should have {needed} ({where})")

    def _read_table(self, entry: dict[str, Any], where: str) -> SegmentTable:
        index, offset, length = entry["table"]
        data = bytearray(length)
        try:
            count = read_fully(self._descriptors[index], offset, memoryview(data))
        except OSError as error:
            raise IntegrityError(f"segment table cannot be read: {error} ({where})") from error
        table = SegmentTable.decode(memoryview(data)[:count], where, entry["blob"])
        stretches = sum(extent[3] for extent in entry["extents"])
        if not table.total_bytes == entry["length"] == stretches:
            raise IntegrityError(f"extents and segment table differ in length ({where})")
        return table

    def _take(self, index: int) -> int:
        if index in self._taken:  # two replicas in one file
            return os.dup(self._descriptors[index])
        self._taken.add(index)
        return self._descriptors[index]


def _is_cached(descriptor: int, offset: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def read_fully(descriptor: int, offset: int, target: memoryview) -> int:
    """Fill *target* from *offset* of a file; fewer bytes only if the file ends there."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
