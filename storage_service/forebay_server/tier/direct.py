"""Whether a file system takes writes around the page cache (O_DIRECT)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Final

from forebay_server.tier.buffers import aligned_buffer

DIRECT_ALIGNMENT: Final = 4096
"""Bytes to which address, offset and length of our direct writes are aligned."""

_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STATX_BYTES: Final = 256
_MASK_OFFSET: Final = 0x00
_DIO_OFFSET: Final = 0x98  # stx_dio_mem_align u32, stx_dio_offset_align u32

_libc: Final = ctypes.CDLL(None, use_errno=True)


def direct_writes_work(probe: Path) -> bool:
    """Try it with the new file *probe*, which is removed again.

    Asks statx first (Linux 6.1), for file systems that take the flag and then copy anyway; where
    it does not say, one aligned block is written.
    """
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_DIRECT, 0o600)
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    try:
        alignment = _stated_alignment(descriptor)
        if alignment is not None:
            return 0 < alignment <= DIRECT_ALIGNMENT
        return os.pwrite(descriptor, aligned_buffer(DIRECT_ALIGNMENT), 0) == DIRECT_ALIGNMENT
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _stated_alignment(descriptor: int) -> int | None:
    """The larger of memory and offset alignment, 0: not possible, None: nobody says."""
    if not hasattr(_libc, "statx"):
        return None
    found = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(descriptor, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, found) != 0:
        return None
    (mask,) = struct.unpack_from("<I", found.raw, _MASK_OFFSET)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("<II", found.raw, _DIO_OFFSET)
    return 0 if 0 in (memory, offset) else max(memory, offset)
