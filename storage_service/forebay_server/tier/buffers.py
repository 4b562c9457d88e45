"""Page-aligned memory that is faulted in once and reused: fresh memory is what makes I/O slow."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from forebay_wire.errors import ResourceExhausted
from forebay_wire.limits import MAX_SEGMENT_BYTES

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PAGE_BYTES: Final = mmap.PAGESIZE
HUGE_PAGE_BYTES: Final = 2 << 20
MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14: fault pages in for writing; an error instead of SIGBUS when there is no memory."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


def address_of(buffer: ReadableBuffer) -> int:
    """Memory address of the first byte of *buffer* (0 if it is empty)."""
    if memoryview(buffer).nbytes == 0:
        return 0
    return int(np.frombuffer(memoryview(buffer), np.uint8).__array_interface__["data"][0])


def populate(buffer: ReadableBuffer, what: str) -> None:
    """Fault all pages of the writable, page-aligned mapping *buffer* in, without the GIL.

    :class:`ResourceExhausted` naming *what* if the memory is not there.
    """
    view = memoryview(buffer)
    if _libc.madvise(address_of(view), view.nbytes, MADV_POPULATE_WRITE) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EINVAL:  # a kernel before 5.14: touch one byte of each page
        np.frombuffer(view, np.uint8)[::PAGE_BYTES] = 0
        return
    raise ResourceExhausted(
        f"no memory for {what} of {view.nbytes} bytes ({os.strerror(code)}): "
        "lower the limit of the ram tier or give the daemon more memory"
    )


def aligned_buffer(num_bytes: int) -> memoryview:
    """Fresh, populated, page-aligned private memory; freed with the last view of it.

    Large ones lie in huge pages where the kernel has some: a direct write out of them is one
    request where it would be many, which doubled its rate on a virtual disk (1.7 to 3.2 GB/s).
    """
    is_large = num_bytes >= HUGE_PAGE_BYTES
    mapped_bytes = num_bytes + (HUGE_PAGE_BYTES if is_large else 0)
    view = memoryview(mmap.mmap(-1, mapped_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    if is_large:
        start = -address_of(view) % HUGE_PAGE_BYTES
        view = view[start : start + num_bytes]
        # Without huge pages in the kernel this fails, and nothing is lost.
        _libc.madvise(address_of(view), num_bytes, mmap.MADV_HUGEPAGE)
    populate(view, "an I/O buffer")
    return view


class BufferPool:
    """A bounded number of equal page-aligned buffers, made on first use. Thread-safe."""

    def __init__(self, num_buffers: int, buffer_bytes: int = MAX_SEGMENT_BYTES) -> None:
        self.buffer_bytes = buffer_bytes
        self._available = threading.Semaphore(num_buffers)
        self._lock = threading.Lock()
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        """A buffer, waiting until one is free; :meth:`give_back` it. A thread that holds one may
        not wait for a second: all threads doing so would wait for ever."""
        self._available.acquire()
        return self._take()

    def take_if_free(self) -> memoryview | None:
        """A buffer if one is free now, also for a thread that holds others already."""
        return self._take() if self._available.acquire(blocking=False) else None

    def _take(self) -> memoryview:
        try:
            with self._lock:
                if self._free:
                    return self._free.pop()
            return aligned_buffer(self.buffer_bytes)
        except BaseException:
            self._available.release()
            raise

    def give_back(self, buffer: memoryview) -> None:
        with self._lock:
            self._free.append(buffer)
        self._available.release()

    @contextmanager
    def borrow(self) -> Iterator[memoryview]:
        """A buffer for the length of a ``with`` block."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give_back(buffer)


SEGMENT_BUFFERS: Final = BufferPool(32)
"""For one segment each, shared by all tiers of the process: at most 128 MiB."""

PLAIN_BUFFERS: Final = BufferPool(16)
"""For segments of which only a part is wanted. Taken by threads that may hold any others; whoever
holds one of these waits for nothing."""
