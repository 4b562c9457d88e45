"""Values of Mosaic Streaming's MDS shards, by the encodings of their columns.

Layouts after https://docs.mosaicml.com/projects/streaming (MDS) and its encodings, all numbers
little-endian:

    shard       count u32, offsets u32[count + 1] from its start, column names as JSON, samples
    sample      length u32 of each column of varying size, then the columns' values in order
    ndarray     [type u8] [rank << 2 | width u8, sizes u(8 << width)[rank]] elements; what stands
                in brackets is there unless the encoding names it
    pil         width u32, height u32, length u32 of the mode, mode, pixels
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from forebay.dataset.schema import Array
from forebay_wire.errors import InvalidRequest

Decode = Callable[[memoryview], Any]

_SCALARS: Final = {
    "int": "int64",
    **{name: name for name in ("uint8", "uint16", "uint32", "uint64")},
    **{name: name for name in ("int8", "int16", "int32", "int64")},
    **{name: name for name in ("float16", "float32", "float64")},
}
_ELEMENTS: Final = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
_MODES: Final = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3, "LAB": 3, "HSV": 3}
"""Bytes of a pixel of images that are plain arrays of bytes."""


@dataclass(frozen=True)
class MdsColumn:
    """One column of an MDS shard."""

    name: str
    encoding: str
    size: int | None
    """Bytes of each value; None: they vary."""


class MdsSamples:
    """Takes samples of a shard apart."""

    def __init__(self, columns: Sequence[MdsColumn], kinds: Any, where: str) -> None:
        """*kinds* is what the user wants of a column, or the dataset has: its type by name."""
        self._columns = columns
        self._where = where
        self._decoders = [decoder(one, kinds.get(one.name), where) for one in columns]
        self._varying = [number for number, one in enumerate(columns) if one.size is None]
        self._sizes = [one.size or 0 for one in columns]

    def take_apart(self, sample: memoryview, row: int) -> dict[str, Any]:
        """The values of sample number *row*. InvalidRequest if its sizes do not fit."""
        sizes = self._sizes.copy()
        lengths = np.frombuffer(sample, "<u4", len(self._varying)).tolist()
        for number, length in zip(self._varying, lengths, strict=True):
            sizes[number] = length
        position = 4 * len(lengths)
        values: dict[str, Any] = {}
        for column, decode, size in zip(self._columns, self._decoders, sizes, strict=True):
            values[column.name] = decode(sample[position : position + size])
            position += size
        if position != len(sample):
            raise InvalidRequest(f"{self._where}, sample {row} has other bytes than it says")
        return values


def parse_json(data: bytes | memoryview, where: str) -> Any:
    """A JSON value; InvalidRequest naming *where*."""
    try:
        return json.loads(bytes(data))
    except ValueError as error:
        raise InvalidRequest(f"{where} is no JSON: {error}") from error


def hint(encoding: str) -> Any:
    """The type that an encoding tells, if it does."""
    name, _, detail = encoding.partition(":")
    if name in _SCALARS:
        return _SCALARS[name]
    if name == "ndarray" and ":" in detail:
        dtype, _, shape = detail.partition(":")
        return Array(dtype, tuple(int(size) for size in shape.split(",")))
    known = {"bytes": "binary", "str": "string", "jpeg": "image", "png": "image"}
    return known.get(name) or {"str_decimal": "string"}.get(name)


def decoder(column: MdsColumn, kind: Any, where: str) -> Decode:
    """How to read a column; *kind* is what the user wants of it, or the dataset has."""
    name, _, detail = column.encoding.partition(":")
    if kind in ("binary", "image"):
        return bytes
    if name in ("str", "str_decimal") or (
        name in ("json", "str_int", "str_float") and kind == "string"
    ):
        return lambda data: bytes(data).decode()
    if name in ("bytes", "jpeg", "png"):
        return bytes
    if name in _SCALARS:
        dtype = np.dtype(_SCALARS[name]).newbyteorder("<")
        return lambda data: np.frombuffer(data, dtype, 1)[0]
    if name == "ndarray":
        return partial(_array, *_array_detail(detail))
    if name == "json":
        return lambda data: parse_json(data, f"{where}, column {column.name!r}")
    if name in ("str_int", "str_float"):
        number: Any = int if name == "str_int" else float
        return lambda data: number(bytes(data).decode())
    if name == "pil":
        return partial(_pixels, f"{where}, column {column.name!r}")
    raise InvalidRequest(
        f"{where}, column {column.name!r}: the encoding {column.encoding!r} is not read"
        f"{', as it needs pickle' if name == 'pkl' else ''}; keep its bytes as they are with "
        f"--type {column.name}=binary"
    )


def _array_detail(detail: str) -> tuple[str, tuple[int, ...]]:
    dtype, _, shape = detail.partition(":")
    return dtype, tuple(int(size) for size in shape.split(",")) if shape else ()


def _array(dtype: str, shape: tuple[int, ...], data: memoryview) -> Any:
    position = 0
    if not dtype:
        dtype = _ELEMENTS[data[0]]
        position = 1
    if not shape:
        rank, width = data[position] >> 2, data[position] & 3
        position += 1
        sizes = np.frombuffer(data, f"<u{1 << width}", rank, position)
        shape = tuple(sizes.tolist())
        position += rank << width
    return np.frombuffer(data[position:], np.dtype(dtype).newbyteorder("<")).reshape(shape)


def _pixels(where: str, data: memoryview) -> Any:
    width, height, length = np.frombuffer(data, "<u4", 3).tolist()
    mode = bytes(data[12 : 12 + length]).decode()
    channels = _MODES.get(mode)
    if channels is None:
        raise InvalidRequest(
            f"{where}: images of mode {mode!r} are not read; keep the bytes (--type COLUMN=binary)"
        )
    pixels = np.frombuffer(data[12 + length :], np.uint8)
    return pixels.reshape((height, width, channels) if channels > 1 else (height, width))
