"""One segment there and back: LZ4 blocks, with or without a shuffle before. Thread-safe.

The work is done without the GIL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lz4.block
import numpy as np

from forebay_server.model.encodings import Method, Way
from forebay_wire.errors import IntegrityError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def encode_segment(way: Way, data: memoryview) -> ReadableBuffer:
    """*data* in *way*; it may be larger than before."""
    if way.method is Method.RAW:
        return data
    encoded: bytes = lz4.block.compress(data, store_size=False)
    return encoded


def decode_segment(way: Way, stored: memoryview, target: memoryview) -> None:
    """Fill *target* from *stored*; :class:`IntegrityError` unless that fits exactly.

    Takes no more memory than twice the size of *target*, whatever *stored* says.
    """
    plain = stored if way.method is Method.RAW else _decompress(stored, len(target))
    if len(plain) != len(target):
        raise IntegrityError(
            f"a stored segment decodes to {len(plain)} bytes instead of {len(target)}"
        )
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(plain, np.uint8))


def _decompress(stored: memoryview, num_bytes: int) -> bytes:
    try:
        plain: bytes = lz4.block.decompress(stored, uncompressed_size=num_bytes)
    except lz4.block.LZ4BlockError as error:
        raise IntegrityError(f"a stored segment cannot be decoded: {error}") from error
    return plain
