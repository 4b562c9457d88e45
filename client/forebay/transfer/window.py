"""Warm memory for bytes on their way: a pool of buffers that have been touched before.

Fresh memory costs a page fault each 4 KiB (0.4-1.9 GB/s); the same copy into memory used before
runs at memory speed. A buffer goes back to the pool when the last view of it dies, never earlier:
so nobody can read bytes that a later fetch has overwritten.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from typing import Final

import numpy as np
from numpy.typing import NDArray

from forebay.forking import watch
from forebay_wire.limits import KIB, MIB

SMALLEST_BYTES: Final = 64 * KIB
KEEP_BYTES: Final = 256 * MIB
"""Idle memory that a process keeps warm; above it buffers go back to the system."""


class _Lease(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """The one exporter of a lent buffer: a subclass, because plain arrays collapse their bases."""


class WindowPool:
    """Lends buffers of power-of-two sizes. Thread-safe; nobody has to give anything back."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self.keep_bytes = keep_bytes
        # Reentrant: a lease may die in a garbage collection that starts inside the lock.
        self._lock = threading.RLock()
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._idle_bytes = 0
        self._lent_bytes = 0

    @property
    def idle_bytes(self) -> int:
        return self._idle_bytes

    @property
    def lent_bytes(self) -> int:
        """Bytes of buffers (not of requests) that views still hold."""
        return self._lent_bytes

    def lend(self, num_bytes: int) -> memoryview:
        """A writable buffer of *num_bytes* with unspecified content.

        It belongs to the caller as long as any view of it (a slice, an array, an Arrow buffer)
        lives. Fresh only if no idle one fits.
        """
        size = max(SMALLEST_BYTES, 1 << max(0, num_bytes - 1).bit_length())
        with self._lock:
            idle = self._idle.get(size)
            memory = idle.pop() if idle else None
            if memory is not None:
                self._idle_bytes -= size
            self._lent_bytes += size
        if memory is None:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array: NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
        lease = array.view(_Lease)
        weakref.finalize(lease, self._take_back, memory, size).atexit = False
        return memoryview(lease)[:num_bytes]  # type: ignore[arg-type]  # arrays are buffers

    def _take_back(self, memory: mmap.mmap, size: int) -> None:
        with self._lock:
            self._lent_bytes -= size
            if self._idle_bytes + size > self.keep_bytes:
                return
            self._idle.setdefault(size, []).append(memory)
            self._idle_bytes += size

    def forget_parent(self) -> None:
        """In a forked child: another thread of the parent may have held the lock."""
        self._lock = threading.RLock()


POOL: Final = WindowPool()
"""The pool of this process."""

watch(POOL)
