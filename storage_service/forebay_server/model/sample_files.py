"""Whether a file looks like one of samples: an MDS shard, a tar file. Clients know the rest.

So that only such files can be read below the origin prefixes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from forebay_wire.errors import InvalidRequest

Read = Callable[[int, int], bytes | bytearray]
"""``read(offset, length)`` of the file."""

TAR_MAGIC: Final = b"ustar"
TAR_MAGIC_OFFSET: Final = 257
TAR_BLOCK_BYTES: Final = 512


def check_mds(read: Read, num_bytes: int, where: str) -> None:
    """:class:`InvalidRequest` unless the offset of the end of the last sample is the file's."""
    count = struct.unpack("<I", read(0, 4))[0] if num_bytes >= 8 else 0
    end = 4 + 4 * count
    if not count or end + 4 > num_bytes or struct.unpack("<I", read(end, 4))[0] != num_bytes:
        raise InvalidRequest(f"{where} is no MDS shard, or a compressed one: import it")


def check_tar(read: Read, num_bytes: int, where: str) -> None:
    """:class:`InvalidRequest` unless the file begins with the head of a member."""
    is_long = num_bytes >= TAR_BLOCK_BYTES
    if not is_long or read(TAR_MAGIC_OFFSET, len(TAR_MAGIC)) != TAR_MAGIC:
        raise InvalidRequest(f"{where} is no tar file, or a compressed one: import it")


CHECKS: Final = {"mds": check_mds, "webdataset": check_tar}
"""By format."""
