"""Whole files that were compressed by another library."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from typing import Final

import pyarrow as pa

from forebay_wire.errors import InvalidRequest

_STREAMS: Final = {"zstd": "zstd", "br": "brotli", "brotli": "brotli", "lz4": "lz4"}
_FUNCTIONS: Final = {"gz": gzip.decompress, "bz2": bz2.decompress, "xz": lzma.decompress}


def decompress(data: bytes, compression: str, num_bytes: int | None, where: str) -> bytes:
    """*data* plain again. *compression* is a name, with a level behind a colon or without;
    *num_bytes* are what it should become. InvalidRequest."""
    name = compression.partition(":")[0]
    try:
        if name in _FUNCTIONS:
            plain = _FUNCTIONS[name](data)
        elif name in _STREAMS:
            with pa.CompressedInputStream(io.BytesIO(data), _STREAMS[name]) as stream:
                plain = stream.read()
        elif name == "snappy" and num_bytes is not None:
            plain = pa.decompress(data, num_bytes, "snappy", asbytes=True)
        else:
            raise InvalidRequest(f"{where} is compressed by {compression!r}, which is not read")
    except (pa.ArrowException, OSError, EOFError, ValueError, lzma.LZMAError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{where} is no {name} stream: {error}") from error
    if num_bytes is not None and len(plain) != num_bytes:
        raise InvalidRequest(f"{where} has {len(plain)} bytes, its index says {num_bytes}")
    return plain
