"""LitData: an ``index.json`` and chunks of items.

Layouts after https://github.com/Lightning-AI/litData, all numbers little-endian:

    chunk       count u32, offsets u32[count + 1] from its start, items
    item        length u32 of each leaf, then the leaves in order; where the index gives the chunk a
                `dim`, an item is the elements of one tensor and nothing else
    rows        of newer chunks an Arrow IPC file stands for the items: that file, its length u32,
                "LDARW01" and a zero byte end the chunk
    tensor      type u32, rank u32, sizes u32[rank], elements; numpy arrays alike. The head is
                big-endian in tensors of newer versions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa

from forebay.dataset.schema import Schema
from forebay.importers.compressed import decompress
from forebay.importers.files import File, join, read_file
from forebay.importers.litdata_nested import NestedReader
from forebay.importers.piece import Block, Options
from forebay.importers.samples import Sample, blocks
from forebay_wire.errors import InvalidRequest

INDEX: Final = "index.json"
ARROW_END: Final = b"LDARW01\0"
COLUMN: Final = "item"
"""The column of items that are one value, not a dict, list or tuple."""

_TORCH: Final = dict(
    enumerate(
        (
            *("float32", "float32", "float64", "float64", "", "", "", "", "float16", "float16", ""),
            *("uint8", "int8", "int16", "int16", "int32", "int32", "int64", "int64", "bool"),
        )
    )
)
"""Number of a torch type to its name; complex numbers and bfloat16 have none here."""
_NUMPY: Final = dict(
    enumerate(
        (
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "float32", "float64"),
        )
    )
) | {13: "bool"}
_KINDS: Final = {
    "str": "string",
    "text": "string",
    "int": "int64",
    "float": "float64",
    "bool": "bool",
    "bytes": "binary",
    "file": "binary",
    "video": "binary",
    "tifffile": "image",
    "jpeg": "image",
    "jpeg_array": "image",
    "image": "image",
    **dict.fromkeys(("audio", "pdf", "nifti", "mesh"), "binary"),
}
"""Format of a leaf to the type of its column."""


@dataclass(frozen=True)
class LitDataPiece:
    """One chunk."""

    path: str
    num_bytes: int
    stamp: str
    num_rows: int
    columns: tuple[tuple[str, str], ...]
    """Name and format of each leaf."""
    is_bare: bool
    """Whether items are the elements of one tensor."""
    compression: str

    @property
    def name(self) -> str:
        return self.path

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        data = read_file(self.path)
        if self.compression:
            data = decompress(data, self.compression, None, self.path)
        raw = {name for name, kind in options.types.items() if kind in ("binary", "image")}
        if schema is not None:
            raw = {one.name for one in schema.columns if one.kind == "binary"}
        if data.endswith(ARROW_END):
            yield from self._arrow_rows(data)
            return
        hints = {name: kind for name, format in self.columns if (kind := _hint(format))}
        try:
            samples = self._samples(memoryview(data), raw)
            yield from blocks(samples, schema, options, self.path, hints.get)
        except (ValueError, IndexError, KeyError, struct.error) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{self.path} cannot be read as litdata: {error!r}") from error

    def _arrow_rows(self, data: bytes) -> Iterator[Block]:
        stop = len(data) - len(ARROW_END) - 4
        (length,) = struct.unpack_from("<I", data, max(0, stop))
        rows = 0
        try:
            reader = pa.ipc.open_file(pa.py_buffer(data)[max(0, stop - length) : stop])
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                rows += batch.num_rows
                yield Block(batch, self.num_bytes * rows // max(1, self.num_rows))
        except (pa.ArrowException, OSError) as error:
            raise InvalidRequest(f"{self.path} cannot be read as litdata: {error}") from error
        if rows != self.num_rows:
            raise InvalidRequest(f"{self.path} has {rows} rows, the index says {self.num_rows}")

    def _samples(self, data: memoryview, raw: set[str]) -> Iterator[Sample]:
        count = int(np.frombuffer(data, "<u4", 1)[0])
        if count != self.num_rows:
            raise InvalidRequest(f"{self.path} has {count} items, the index says {self.num_rows}")
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        readers = [
            bytes if name in raw else _reader(format, f"{self.path}, column {name!r}")
            for name, format in self.columns
        ]
        for row in range(count):
            item = data[offsets[row] : offsets[row + 1]]
            if self.is_bare:
                values = {self.columns[0][0]: readers[0](item)}
            else:
                values = self._leaves(item, readers, row)
            yield str(row), values, self.num_bytes * (row + 1) // count

    def _leaves(
        self, item: memoryview, readers: list[Callable[[memoryview], Any]], row: int
    ) -> dict[str, Any]:
        lengths = np.frombuffer(item, "<u4", len(self.columns)).tolist()
        position = 4 * len(lengths)
        values: dict[str, Any] = {}
        for (name, _), read, length in zip(self.columns, readers, lengths, strict=True):
            values[name] = read(item[position : position + length])
            position += length
        if position != len(item):
            raise InvalidRequest(f"{self.path}, item {row} has other bytes than it says")
        return values


def litdata_pieces(index: File, folder: str) -> list[LitDataPiece]:
    """The chunks that an index names."""
    try:
        found = json.loads(read_file(index.path))
        config = found["config"]
        if config.get("encryption"):
            raise InvalidRequest(f"{folder} is encrypted: decrypt it with litdata first")
        if (level := config.get("compression_level") or "chunk") != "chunk":
            raise InvalidRequest(
                f"{folder} is compressed within its chunks (level {level!r}), which is not read: "
                "write it with compression_level='chunk', or without compression"
            )
        formats = config["data_format"]
        names = _names(config.get("data_spec"), len(formats))
        return [
            LitDataPiece(
                path=join(folder, chunk["filename"]),
                num_bytes=int(chunk["chunk_bytes"]),
                stamp=index.stamp,
                num_rows=int(chunk["chunk_size"]),
                columns=tuple(zip(names, formats, strict=True)),
                is_bare=chunk.get("dim") is not None,
                compression=config.get("compression") or "",
            )
            for chunk in found["chunks"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{index.path} is no index of LitData chunks: {error!r}") from error


def _names(spec: Any, num_leaves: int) -> list[str]:
    """A name for each leaf: the path to it in the item, its steps joined by dots."""
    if spec is None:
        return [COLUMN] if num_leaves == 1 else [str(number) for number in range(num_leaves)]
    tree = json.loads(spec) if isinstance(spec, str) else spec
    names = list(_paths(tree[1], ()))
    if len(names) != num_leaves:
        raise ValueError(f"its items have {num_leaves} leaves, its data_spec names {len(names)}")
    return names


def _paths(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    children = node["children_spec"]
    if node["type"] is None:
        yield ".".join(path) or COLUMN
        return
    context = json.loads(node["context"]) if isinstance(node["context"], str) else node["context"]
    keys = context if isinstance(context, list) and len(context) == len(children) else None
    for number, child in enumerate(children):
        step = str(keys[number]) if keys is not None else str(number)
        yield from _paths(child, (*path, step))


def _hint(format: str) -> str | None:
    return _KINDS.get(format.partition(":")[0])


def _reader(format: str, where: str) -> Callable[[memoryview], Any]:
    name, _, detail = format.partition(":")
    if name in ("str", "text"):
        return lambda data: bytes(data).decode()
    if name in ("int", "float", "bool"):
        dtype = np.dtype({"int": "<i8", "float": "<f8", "bool": "?"}[name])
        return lambda data: np.frombuffer(data, dtype, 1)[0]
    if name in _KINDS:
        return bytes
    if name in ("no_header_tensor", "no_header_numpy"):
        types = _TORCH if name == "no_header_tensor" else _NUMPY
        flat = np.dtype(types[int(detail)]).newbyteorder("<")
        return lambda data: np.frombuffer(data, flat)
    if name in ("tensor", "numpy"):
        return partial(_array, _TORCH if name == "tensor" else _NUMPY)
    if name == "json":
        return lambda data: NestedReader(bytes(data)).read()
    raise InvalidRequest(
        f"{where}: the format {format!r} is not read"
        f"{', as it needs pickle' if name == 'pickle' else ''}; keep its bytes as they are with "
        "--type COLUMN=binary"
    )


def _array(types: Mapping[int, str], data: memoryview) -> Any:
    # Some versions write this head big-endian; types and ranks are small numbers.
    is_big = not (data[0] or data[4]) and (data[3] or data[7])
    order = ">" if is_big else "<"
    kind, rank = np.frombuffer(data, f"{order}u4", 2).tolist()
    shape = tuple(np.frombuffer(data, f"{order}u4", rank, 8).tolist())
    dtype = np.dtype(types[kind]).newbyteorder("<")
    return np.frombuffer(data[8 + 4 * rank :], dtype).reshape(shape)
