"""One segment there and back: LZ4 blocks, with or without a shuffle before. Thread-safe.

The work is done without the GIL. The shuffled ones are Blosc chunks, as ``numcodecs`` makes them.
"""

from __future__ import annotations

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Final

import lz4.block
import numpy as np
from numcodecs import blosc

from forebay_server.model.encodings import Method, Way
from forebay_wire.errors import IntegrityError

# Segments are the unit of parallel work here: threads inside a segment only get in their way.
blosc.use_threads = False

NUM_CODEC_THREADS: Final = max(2, min(8, os.cpu_count() or 1))
CODEC_THREADS: Final = ThreadPoolExecutor(NUM_CODEC_THREADS, "codec")
"""Encode and decode for all tiers. What runs here waits for nothing but plain buffers."""
SHARE_BYTES: Final = 512 << 10
"""Less than this is not worth another thread."""

BLOSC_LEVEL: Final = 9
"""Against 5, byte-shuffled tokens shrink by 10 % more for 15 % more time; decoding is the same."""

BLOSC_HEADER: Final = struct.Struct("<BBBBIII")
"""version, LZ4 format, flags, typesize, nbytes u32, blocksize u32, cbytes u32."""
_BLOSC_VERSION: Final = 2
_BLOSC_LZ4: Final = 1
"""The compressor in the upper three bits of the flags."""

_SHUFFLES: Final = {Method.SHUFFLE_BYTES: blosc.SHUFFLE, Method.SHUFFLE_BITS: blosc.BITSHUFFLE}


def encode_segment(way: Way, data: memoryview) -> memoryview:
    """*data* in *way*; it may be larger than before."""
    if way.method is Method.RAW:
        return data
    if way.method is Method.LZ4:
        return memoryview(lz4.block.compress(data, store_size=False))
    shuffle = _SHUFFLES[way.method]
    return memoryview(
        blosc.compress(data, b"lz4", BLOSC_LEVEL, shuffle, blosc.AUTOBLOCKS, way.width)
    )


def decode_segment(way: Way, stored: memoryview, target: memoryview) -> None:
    """Fill *target* from *stored*; :class:`IntegrityError` unless that fits exactly.

    Takes about as much memory again as *target*, whatever *stored* says.
    """
    if way.method in _SHUFFLES:
        _unshuffle(way, stored, target)
        return
    plain = stored if way.method is Method.RAW else _decompress(stored, len(target))
    if len(plain) != len(target):
        raise IntegrityError(
            f"a stored segment decodes to {len(plain)} bytes instead of {len(target)}"
        )
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(plain, np.uint8))


def _decompress(stored: memoryview, num_bytes: int) -> memoryview:
    try:
        return memoryview(lz4.block.decompress(stored, uncompressed_size=num_bytes))
    except lz4.block.LZ4BlockError as error:
        raise IntegrityError(f"a stored segment cannot be decoded: {error}") from error


def _unshuffle(way: Way, stored: memoryview, target: memoryview) -> None:
    """The header is checked here: the decoder believes what it says of sizes."""
    if len(stored) < BLOSC_HEADER.size:
        raise IntegrityError("a stored segment is shorter than the header of a Blosc chunk")
    version, _, flags, width, num_bytes, block_bytes, stored_bytes = BLOSC_HEADER.unpack_from(
        stored
    )
    if (
        version != _BLOSC_VERSION
        or flags >> 5 != _BLOSC_LZ4
        or width != way.width
        or num_bytes != len(target)
        or stored_bytes != len(stored)
        or not 0 < block_bytes <= num_bytes
    ):
        raise IntegrityError("a stored segment is no Blosc chunk of LZ4, or of another segment")
    try:
        blosc.decompress(stored, target)
    except (RuntimeError, ValueError) as error:
        raise IntegrityError(f"a stored segment cannot be decoded: {error}") from error


def shares(group: range, num_bytes: int) -> list[range]:
    """*group* in as many parts as make worthwhile work for the codec threads."""
    num_parts = min(len(group), NUM_CODEC_THREADS, num_bytes // SHARE_BYTES + 1)
    borders = [group.start + len(group) * one // num_parts for one in range(num_parts + 1)]
    return [range(first, last) for first, last in pairwise(borders)]
