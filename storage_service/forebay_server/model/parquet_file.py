"""The end of a Parquet file, for whoever can read it: schema and row groups stand there.

https://parquet.apache.org/docs/file-format/: the footer, its length i32, "PAR1".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from forebay_wire.errors import InvalidRequest

MAGIC: Final = b"PAR1"
END: Final = struct.Struct("<i4s")
MAX_FOOTER_BYTES: Final = 3 << 20
"""More does not go into a message."""


def footer_of(read: Callable[[int, int], bytes | bytearray], num_bytes: int, where: str) -> bytes:
    """The footer with what ends it. :class:`InvalidRequest` naming *where* if there is none."""
    advice = "; import it instead (forebay dataset import)"
    if num_bytes < len(MAGIC) + END.size or read(0, len(MAGIC)) != MAGIC:
        raise InvalidRequest(f"{where} is no Parquet file{advice}")
    length, magic = END.unpack(read(num_bytes - END.size, END.size))
    if magic != MAGIC or not 0 < length <= num_bytes - END.size - len(MAGIC):
        raise InvalidRequest(f"{where} does not end like a Parquet file, or is encrypted{advice}")
    if length > MAX_FOOTER_BYTES:
        raise InvalidRequest(
            f"the footer of {where} has {length} bytes, more than {MAX_FOOTER_BYTES}: write it "
            "with larger row groups, or in several files"
        )
    return bytes(read(num_bytes - END.size - length, length + END.size))
