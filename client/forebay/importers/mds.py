"""Mosaic Streaming's MDS: an ``index.json`` and shards of samples.

Layouts after https://docs.mosaicml.com/projects/streaming (MDS) and its encodings, all numbers
little-endian:

    shard       count u32, offsets u32[count + 1] from its start, column names as JSON, samples
    sample      length u32 of each column of varying size, then the columns' values in order
    ndarray     [type u8] [rank << 2 | width u8, sizes u(8 << width)[rank]] elements; what stands
                in brackets is there unless the encoding names it
    pil         width u32, height u32, length u32 of the mode, mode, pixels
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import xxhash

from forebay.dataset.schema import Array, Schema
from forebay.importers.compressed import decompress
from forebay.importers.files import File, join, read_file
from forebay.importers.piece import Block, Options
from forebay.importers.samples import Sample, blocks, parse_json
from forebay_wire.errors import IntegrityError, InvalidRequest

INDEX: Final = "index.json"

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
class Column:
    """One column of an MDS shard."""

    name: str
    encoding: str
    size: int | None
    """Bytes of each value; None: they vary."""


@dataclass(frozen=True)
class MdsPiece:
    """One shard."""

    path: str
    num_bytes: int
    stamp: str
    columns: tuple[Column, ...]
    num_rows: int
    raw_bytes: int
    """Bytes of the shard when it is not compressed."""
    compression: str
    hashes: tuple[tuple[str, str], ...]
    """Of the file: algorithm and hexadecimal digest."""

    @property
    def name(self) -> str:
        return self.path

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        data = read_file(self.path)
        check_hashes(data, self.hashes, self.path)
        if self.compression:
            data = decompress(data, self.compression, self.raw_bytes, self.path)
        if schema is None:
            kinds: Mapping[str, Any] = options.types
        else:
            kinds = {
                one.name: one.text for one in schema.columns if one.kind in ("binary", "string")
            }
        try:
            samples = self._samples(memoryview(data), kinds)
            hints = {one.name: kind for one in self.columns if (kind := _hint(one.encoding))}
            yield from blocks(samples, schema, options, self.path, hints)
        except (ValueError, IndexError, KeyError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{self.path} cannot be read as mds: {error}") from error

    def _samples(self, data: memoryview, kinds: Mapping[str, Any]) -> Iterator[Sample]:
        count = int(np.frombuffer(data, "<u4", 1)[0])
        if count != self.num_rows:
            raise InvalidRequest(f"{self.path} has {count} samples, the index says {self.num_rows}")
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        decoders = [_decoder(one, kinds.get(one.name), self.path) for one in self.columns]
        varying = [number for number, one in enumerate(self.columns) if one.size is None]
        sizes = [one.size or 0 for one in self.columns]
        for row in range(count):
            start, stop = offsets[row], offsets[row + 1]
            if not start <= stop <= len(data):
                raise InvalidRequest(f"{self.path}, sample {row} lies outside of it")
            lengths = np.frombuffer(data, "<u4", len(varying), start)
            for number, length in zip(varying, lengths.tolist(), strict=True):
                sizes[number] = length
            position = start + 4 * len(varying)
            values: dict[str, Any] = {}
            for column, decode, size in zip(self.columns, decoders, sizes, strict=True):
                values[column.name] = decode(data[position : position + size])
                position += size
            if position != stop:
                raise InvalidRequest(f"{self.path}, sample {row} has other bytes than it says")
            yield str(row), values, self.num_bytes * (row + 1) // count


def mds_pieces(index: File, folder: str) -> list[MdsPiece]:
    """The shards that an index names."""
    try:
        return [
            _piece(shard, folder, index.stamp)
            for shard in json.loads(read_file(index.path))["shards"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{index.path} is no index of MDS shards: {error!r}") from error


def _piece(shard: Mapping[str, Any], folder: str, stamp: str) -> MdsPiece:
    if shard.get("format") != "mds":
        raise InvalidRequest(
            f"{folder} has shards of format {shard.get('format')!r}: only mds is read; its csv "
            "and json shards can be imported as csv and jsonl files"
        )
    stored = shard["zip_data"] or shard["raw_data"]
    columns = zip(
        shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True
    )
    return MdsPiece(
        path=join(folder, stored["basename"]),
        num_bytes=int(stored["bytes"]),
        stamp=stamp,
        columns=tuple(Column(*one) for one in columns),
        num_rows=int(shard["samples"]),
        raw_bytes=int(shard["raw_data"]["bytes"]),
        compression=str(shard["compression"] or "") if shard["zip_data"] else "",
        hashes=tuple(sorted(stored["hashes"].items())),
    )


def check_hashes(data: bytes, hashes: tuple[tuple[str, str], ...], where: str) -> None:
    """IntegrityError unless *data* has the digests that are known here."""
    for algorithm, expected in hashes:
        make: Any = getattr(xxhash, algorithm, None) if algorithm.startswith("xx") else None
        if make is None and algorithm in hashlib.algorithms_guaranteed:
            make = partial(hashlib.new, algorithm, usedforsecurity=False)
        if make is None or algorithm.startswith("shake"):
            continue
        found = make(data=data) if algorithm in hashlib.algorithms_guaranteed else make(data)
        if found.hexdigest() != expected:
            raise IntegrityError(f"{where} is damaged: its {algorithm} is not what the index says")


def _hint(encoding: str) -> Any:
    """The type that an encoding tells, if it does."""
    name, _, detail = encoding.partition(":")
    if name in _SCALARS:
        return _SCALARS[name]
    if name == "ndarray" and ":" in detail:
        dtype, _, shape = detail.partition(":")
        return Array(dtype, tuple(int(size) for size in shape.split(",")))
    known = {"bytes": "binary", "str": "string", "jpeg": "image", "png": "image"}
    return known.get(name) or {"str_decimal": "string"}.get(name)


def _decoder(column: Column, kind: Any, where: str) -> Decode:
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
