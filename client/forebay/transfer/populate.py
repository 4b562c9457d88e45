"""Faults pages in where a page that cannot be read is an error code and not SIGBUS.

``MADV_POPULATE_READ`` does that, and looks at every page for it. Much of that work the kernel saves
where one page of each 64 KiB is populated: a fault maps what else the page cache holds around it
(``fault_around_bytes``). So many single pages are populated in one call (``process_madvise`` on
ourselves, Linux 6.13), and then one look at the page table (``PAGEMAP_SCAN``, Linux 6.7) says
whether every page is there: a mapped page cannot fault. Otherwise, and wherever the kernel or a
sandbox refuses one of the two, ``MADV_POPULATE_READ`` takes over.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from typing import Final

import numpy as np

from forebay.forking import watch

MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14; the mmap module knows neither, and its madvise keeps the GIL."""

PAGE: Final = mmap.PAGESIZE
AROUND_BYTES: Final = 16 * PAGE
"""What the kernel maps around a fault by default."""

WORTH_BYTES: Final = 8 * AROUND_BYTES
"""Below this, two more system calls cost more than they save."""

MAX_PAGES_A_CALL: Final = 1024
"""IOV_MAX."""

_SYS_PROCESS_MADVISE: Final = 440
_PAGEMAP_SCAN: Final = 0xC0606610
_PAGE_IS_PRESENT: Final = 1 << 3

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_uint,
)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class _ScanArgument(ctypes.Structure):
    """``struct pm_scan_arg`` of linux/fs.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


class _AroundFaults:
    """The way by single pages. Thread-safe; a child of fork opens its own descriptors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: tuple[int, int] | None = None
        self._is_refused = not hasattr(os, "pidfd_open")
        watch(self)

    def forget_parent(self) -> None:
        """In a child of fork: both descriptors are about the parent's memory."""
        self._lock = threading.Lock()
        inherited, self._descriptors = self._descriptors, None
        for descriptor in inherited or ():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def populate(self, start: int, stop: int) -> bool:
        """Whether every page of [start, stop), both page-aligned, is mapped now."""
        if self._is_refused:
            return False
        descriptors = self._descriptors or self._open()
        if descriptors is None:
            return False
        process, pages = descriptors
        firsts = np.arange(start, stop, AROUND_BYTES, dtype=np.uint64)
        vector = np.full((len(firsts), 2), PAGE, dtype=np.uint64)
        vector[:, 0] = firsts
        for first in range(0, len(vector), MAX_PAGES_A_CALL):
            part = vector[first : first + MAX_PAGES_A_CALL]
            done = _libc.syscall(
                _SYS_PROCESS_MADVISE, process, part.ctypes.data, len(part), MADV_POPULATE_READ, 0
            )
            if done < 0:
                self._is_refused = ctypes.get_errno() in (errno.EINVAL, errno.EPERM, errno.ENOSYS)
            if done != len(part) * PAGE:
                return False
        return self._all_present(pages, start, stop)

    def _all_present(self, pages: int, start: int, stop: int) -> bool:
        region = (ctypes.c_uint64 * 3)()
        argument = _ScanArgument(
            size=ctypes.sizeof(_ScanArgument),
            start=start,
            end=stop,
            vec=ctypes.addressof(region),
            vec_len=1,
            category_mask=_PAGE_IS_PRESENT,
            return_mask=_PAGE_IS_PRESENT,
        )
        count = _libc.ioctl(pages, _PAGEMAP_SCAN, ctypes.byref(argument))
        if count < 0:
            self._is_refused = True
        return count == 1 and (region[0], region[1]) == (start, stop)

    def _open(self) -> tuple[int, int] | None:
        with self._lock:
            if self._descriptors is None and not self._is_refused:
                try:
                    process = os.pidfd_open(os.getpid())
                    pages = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
                    self._descriptors = process, pages
                except OSError:
                    self._is_refused = True
            return self._descriptors


_around_faults: Final = _AroundFaults()


def populate_read(address: int, num_bytes: int) -> int:
    """Fault in the pages that hold these bytes of a mapping; 0 or the errno. Releases the GIL."""
    start = address & -PAGE
    stop = -(-(address + num_bytes) // PAGE) * PAGE
    if stop - start >= WORTH_BYTES and _around_faults.populate(start, stop):
        return 0
    return _advise(start, stop - start, MADV_POPULATE_READ)


def populate_write(address: int, num_bytes: int) -> int:
    """Like :func:`populate_read`, for memory that is going to be written."""
    start = address & -PAGE
    return _advise(start, address + num_bytes - start, MADV_POPULATE_WRITE)


def _advise(start: int, num_bytes: int, advice: int) -> int:
    while _libc.madvise(start, num_bytes, advice):
        failure = ctypes.get_errno()
        if failure != errno.EINTR:
            return failure
    return 0
