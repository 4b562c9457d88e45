"""The safetensors file format: a header of JSON, then the tensors' bytes; needs no torch.

See https://github.com/huggingface/safetensors#format: a little-endian u64 with the header's length,
the header (name to dtype, shape and byte range; ``__metadata__``: text to text), the data without
holes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forebay_wire.errors import IntegrityError, InvalidRequest

DTYPES: Final = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}
"""torch's names to the format's; others it cannot hold."""
_TORCH_DTYPES: Final = {name: torch_name for torch_name, name in DTYPES.items()}
_ITEM_BYTES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}

LENGTH: Final = struct.Struct("<Q")
MAX_HEADER_BYTES: Final = 100_000_000
"""As the reference implementation has it."""
INDEX_FILE: Final = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str
    """torch's name."""
    shape: tuple[int, ...]
    start: int
    """Bytes from the start of the file."""
    num_bytes: int


def encode_header(
    tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str]
) -> bytes:
    """What stands before the bytes of *tensors* (name, torch's dtype, shape, bytes), which follow
    in this order; a multiple of 8 bytes long."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidRequest(
            f"the header of {len(tensors)} tensors has {len(text)} bytes, readers take "
            f"{MAX_HEADER_BYTES}: make the files smaller"
        )
    return LENGTH.pack(len(text)) + text


def read_header(file: Path) -> tuple[list[Entry], dict[str, str]]:
    """Tensors and metadata of *file*; :class:`IntegrityError` if it is no such file, or cut."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(LENGTH.size)
        length = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size):
            raise IntegrityError(f"{file} is no safetensors file, or cut short")
        text = stream.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {}) or {}
        found = [_entry(name, one, LENGTH.size + length) for name, one in header.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the header of {file} is no safetensors header: {error!r}") from error
    for one in found:
        if one.start + one.num_bytes > size:
            raise IntegrityError(f"{file} is cut short: {one.name} ends behind its {size} bytes")
    return found, metadata


def _entry(name: str, one: Mapping[str, Any], data_start: int) -> Entry:
    dtype, shape = one["dtype"], tuple(int(size) for size in one["shape"])
    start, stop = one["data_offsets"]
    if dtype not in _TORCH_DTYPES:
        raise InvalidRequest(f"tensor {name} has the dtype {dtype}, which Forebay does not know")
    if start < 0 or stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{name} has {stop - start} bytes")
    return Entry(name, _TORCH_DTYPES[dtype], shape, data_start + start, stop - start)
