"""Memory of large batches, used again: fresh pages cost more than what is written to them.

The kernel clears each page that a process gets for the first time, and a batch of decoded pictures
is tens of thousands of pages. What a batch leaves goes to the next one as soon as nobody holds a
tensor, an array or a view of it any more (docs/design/0007-memory-of-batches-used-again.md).
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forebay_wire.limits import MIB

SMALLEST_BYTES: Final = 4 * MIB
"""Below it the allocator of the process does as well."""

GRAIN_BYTES: Final = 2 * MIB
"""Blocks are whole huge pages."""

MAX_FREE_BYTES: Final = 512 * MIB
"""What is kept for later, at most; and a block that is larger than that, alone."""


class _Lease:
    """A block in use: an array over it holds this, and when all let go, it is free."""

    def __init__(self, pool: BatchMemory, block: mmap.mmap, num_bytes: int) -> None:
        self._pool, self._block = pool, block
        view = np.frombuffer(block, dtype=np.uint8)
        address: int = view.__array_interface__["data"][0]
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "data": (address, False),
        }

    def __del__(self) -> None:
        self._pool._give(self._block)


class BatchMemory:
    """Free blocks of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with anything in it."""
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if num_bytes < SMALLEST_BYTES:
            return np.empty(shape, dtype)
        block = self._take(num_bytes)
        if block is None:
            size = -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _ask_for_huge_pages(block)
        return np.asarray(_Lease(self, block, num_bytes)).view(dtype).reshape(shape)

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody uses."""
        with self._lock:
            return sum(map(len, self._free))

    def clear(self) -> None:
        """Give what is free back to the kernel."""
        with self._lock:
            self._free.clear()

    def _take(self, num_bytes: int) -> mmap.mmap | None:
        """The smallest free block that is large enough, and not twice as large."""
        with self._lock:
            fitting = [one for one in self._free if num_bytes <= len(one) < 2 * num_bytes]
            if not fitting:
                return None
            found = min(fitting, key=len)
            self._free = [one for one in self._free if one is not found]
            return found

    def _give(self, block: mmap.mmap) -> None:
        # It runs wherever the last reference goes, also inside the lock of the same thread.
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._free.append(block)
            while len(self._free) > 1 and sum(map(len, self._free)) > MAX_FREE_BYTES:
                del self._free[0]
        finally:
            self._lock.release()


def _ask_for_huge_pages(block: mmap.mmap) -> None:
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:  # macOS has none
        with suppress(OSError):  # EINVAL: a kernel that was built without them
            block.madvise(advice)


batch_memory = BatchMemory()


def _forget_lock() -> None:
    """In a forked child: another thread of the parent may have held it."""
    batch_memory._lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
