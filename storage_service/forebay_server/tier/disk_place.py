"""Where a file begins on its disk, as far as the kernel tells."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

_FS_IOC_FIEMAP: Final = 0xC020660B
_REQUEST: Final = struct.Struct("=QQLLLL")
"""Start, length, flags, mapped extents (out), room for extents, reserved."""
_EXTENT: Final = struct.Struct("=QQQ16xL12x")
"""Logical and physical offset, length, flags."""
_NO_PLACE: Final = 0x2 | 0x4 | 0x200
"""Flags of an extent: its place is unknown, not chosen yet, or inside metadata."""


def disk_position(descriptor: int) -> int:
    """A number that grows with the place on the disk where the open file begins.

    The byte where the file system says that its first extent lies; else the number of its inode:
    file systems give those out in order, and put near together what was written so. ``OSError``
    if the file cannot even be looked at.
    """
    start = _first_byte(descriptor)
    return os.fstat(descriptor).st_ino if start is None else start


def _first_byte(descriptor: int) -> int | None:
    answer = bytearray(_REQUEST.size + _EXTENT.size)
    _REQUEST.pack_into(answer, 0, 0, 1, 0, 0, 1, 0)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, answer)
    except OSError:  # tmpfs, overlay and network file systems do not tell
        return None
    num_extents = _REQUEST.unpack_from(answer)[3]
    _, physical, _, flags = _EXTENT.unpack_from(answer, _REQUEST.size)
    return int(physical) if num_extents and not flags & _NO_PLACE else None
