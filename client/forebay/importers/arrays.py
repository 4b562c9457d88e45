"""Arrays whose first axis is that of samples: npz, npy, zarr."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.schema import Schema
from forebay.importers.files import File, WholeFile, list_all, open_file, read_file
from forebay.importers.piece import Block, Options
from forebay.zarr_codecs import METADATA_NAMES, check_codecs, check_metadata
from forebay_wire.errors import InvalidRequest
from forebay_wire.limits import MIB

BLOCK_BYTES: Final = 4 * MIB
RANGE_BYTES: Final = 64 * MIB

COLUMN: Final = "data"
"""The column of a single array."""


def column_of(rows: NDArray[Any]) -> pa.Array:
    """An array of samples as a column: numbers, or fixed-shape tensors."""
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=False)
    if rows.ndim == 1:
        return pa.array(rows.tolist() if rows.dtype.kind in "US" else rows)
    elements = pa.array(np.ascontiguousarray(rows).reshape(-1))  # of bools there is no shorter way
    size = int(np.prod(rows.shape[1:], dtype=np.int64))
    return pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(elements.type, rows.shape[1:]),
        pa.FixedSizeListArray.from_arrays(elements, size),
    )


@dataclass(frozen=True)
class _Header:
    """What an npy header says, and where the elements begin."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))


def _read_header(stream: IO[bytes], where: str) -> _Header:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read(stream)
    if dtype.hasobject:
        raise InvalidRequest(f"{where} holds Python objects, which need pickle: not read")
    if not shape:
        raise InvalidRequest(f"{where} has no dimension, so no rows: leave it out")
    if is_fortran and len(shape) > 1:
        raise InvalidRequest(
            f"{where} is stored column by column: save it again after numpy.ascontiguousarray"
        )
    return _Header(dtype, tuple(shape), stream.tell())


def _read_rows(stream: IO[bytes], header: _Header, num_rows: int, where: str) -> pa.Array:
    wanted = num_rows * header.row_bytes
    data = stream.read(wanted)
    if len(data) < wanted:
        raise InvalidRequest(f"{where} is cut short")
    return column_of(np.frombuffer(data, header.dtype).reshape(num_rows, *header.shape[1:]))


@dataclass(frozen=True)
class NpyPiece:
    """Rows of an npy file, in the column :data:`COLUMN`."""

    file: File
    start: int
    stop: int
    num_bytes: int

    @property
    def name(self) -> str:
        return f"{self.file.path}, rows {self.start} to {self.stop}"

    @property
    def stamp(self) -> str:
        return self.file.stamp

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        with open_file(self.file.path) as file:
            header = _read_header(file, self.file.path)
            file.seek(header.start + self.start * header.row_bytes)
            step = max(1, BLOCK_BYTES // max(1, header.row_bytes))
            for row in range(self.start, self.stop, step):
                count = min(step, self.stop - row)
                column = _read_rows(file, header, count, self.file.path)
                done = (row + count - self.start) * header.row_bytes
                yield Block(pa.RecordBatch.from_arrays([column], names=[COLUMN]), done)


def npy_pieces(file: File) -> list[NpyPiece]:
    try:
        with open_file(file.path) as opened:
            header = _read_header(opened, file.path)
    except (ValueError, OSError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{file.path} cannot be read as npy: {error}") from error
    step = max(1, RANGE_BYTES // max(1, header.row_bytes))
    stops = [
        (start, min(start + step, header.shape[0])) for start in range(0, header.shape[0], step)
    ]
    return [NpyPiece(file, start, stop, (stop - start) * header.row_bytes) for start, stop in stops]


@dataclass(frozen=True)
class NpzPiece(WholeFile):
    """An npz file: arrays of equal length become columns. Compressed, so it is not cut."""

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        try:
            with open_file(self.file.path) as file, zipfile.ZipFile(file) as archive:
                yield from self._read(archive)
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{self.name} cannot be read as npz: {error}") from error

    def _read(self, archive: zipfile.ZipFile) -> Iterator[Block]:
        streams = {name.removesuffix(".npy"): archive.open(name) for name in archive.namelist()}
        headers = {
            name: _read_header(stream, f"{self.name}: array {name!r}")
            for name, stream in streams.items()
        }
        lengths = {name: header.shape[0] for name, header in headers.items()}
        if len(set(lengths.values())) != 1:
            raise InvalidRequest(
                f"{self.name}: arrays must be as long as each other to be columns; they are "
                f"{lengths}"
            )
        num_rows = next(iter(lengths.values()))
        step = max(1, BLOCK_BYTES // max(1, sum(one.row_bytes for one in headers.values())))
        for start in range(0, num_rows, step):
            count = min(step, num_rows - start)
            columns = [
                _read_rows(stream, headers[name], count, f"{self.name}: array {name!r}")
                for name, stream in streams.items()
            ]
            done = self.num_bytes * (start + count) // num_rows
            yield Block(pa.RecordBatch.from_arrays(columns, names=list(streams)), done)


@dataclass(frozen=True)
class ZarrPiece:
    """Rows of a zarr array (column :data:`COLUMN`), or of the arrays of a group (a column each)."""

    path: str
    columns: tuple[str, ...]
    """Names of the arrays in the group; none: the path is that of an array."""
    start: int
    stop: int
    num_bytes: int
    stamp: str

    @property
    def name(self) -> str:
        return f"{self.path}, rows {self.start} to {self.stop}"

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        found = open_zarr(self.path)
        arrays = {name: found[name] for name in self.columns} or {COLUMN: found}
        step = _zarr_step(list(arrays.values()), BLOCK_BYTES)
        for start in range(self.start, self.stop, step):
            stop = min(start + step, self.stop)
            columns = [column_of(np.asarray(one[start:stop])) for one in arrays.values()]
            done = self.num_bytes * (stop - self.start) // (self.stop - self.start)
            yield Block(pa.RecordBatch.from_arrays(columns, names=list(arrays)), done)


def zarr_pieces(path: str, stamp: str) -> list[ZarrPiece]:
    """Ranges of whole chunks of about :data:`RANGE_BYTES`."""
    found = open_zarr(path)
    arrays: dict[str, Any] = {COLUMN: found}
    if not hasattr(found, "shape"):
        arrays = dict(sorted(found.arrays()))
    lengths = {name: one.shape[0] if one.shape else 0 for name, one in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(one.shape for one in arrays.values()):
        raise InvalidRequest(
            f"{path}: the arrays of a group must be as long as each other to be columns; they are "
            f"{lengths}"
        )
    num_rows = next(iter(lengths.values()))
    step = _zarr_step(list(arrays.values()), RANGE_BYTES)
    names = tuple(arrays) if not hasattr(found, "shape") else ()
    row_bytes = sum(one.nbytes for one in arrays.values()) // max(1, num_rows)
    return [
        ZarrPiece(
            path,
            names,
            start,
            min(start + step, num_rows),
            (min(start + step, num_rows) - start) * row_bytes,
            stamp,
        )
        for start in range(0, num_rows, step)
    ]


def _zarr_step(arrays: Sequence[Any], wanted_bytes: int) -> int:
    """Rows of about *wanted_bytes*: whole chunks of the array whose chunks are longest."""
    rows = max(1, int(arrays[0].shape[0]))
    row_bytes = max(1, sum(int(one.nbytes) for one in arrays) // rows)
    chunk = max(int(one.chunks[0]) for one in arrays)
    return max(1, wanted_bytes // row_bytes // chunk) * chunk


def open_zarr(path: str) -> Any:
    """An array or a group. InvalidRequest without the package, for what zarr cannot open, and for
    arrays that take unpickling."""
    try:
        import zarr
    except ImportError as error:
        raise InvalidRequest(
            f"{path} is in zarr's format: pip install 'forebay[zarr]' to read it"
        ) from error
    try:
        found = zarr.open(path, mode="r")
        arrays = [("", found)] if hasattr(found, "shape") else list(found.arrays())
    except Exception as error:
        for key, file in list_all(path):  # zarr may say that it has no such kind of data
            if key.rpartition("/")[2] in METADATA_NAMES:
                check_metadata(key, read_file(file.path), path)
        raise InvalidRequest(f"{path} cannot be read as zarr: {error}") from error
    for name, array in arrays:  # as consolidated metadata has them, or its own
        check_codecs(array.metadata.to_dict(), f"array {name!r} of {path}")
    return found
