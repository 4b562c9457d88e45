"""Files of other formats as streams of Arrow record batches: never a whole file in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from forebay.dataset.schema import Schema
from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.limits import MIB

BATCH_ROWS: Final = 16_384
"""Rows of a Parquet file that are decoded at a time."""

BLOCK_BYTES: Final = 4 * MIB
"""Bytes of a CSV file that are parsed at a time; types are inferred from the first."""

FORMATS: Final = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".npz": "npz",
}


@dataclass(frozen=True)
class CsvOptions:
    """How to read CSV files."""

    delimiter: str = ","
    has_header: bool = True
    types: Mapping[str, str] = field(default_factory=dict)
    """Column to type, where the inferred one is not wanted."""


class Source(Protocol):
    """One file, open."""

    @property
    def num_rows(self) -> int | None:
        """Rows, where the format tells before reading."""
        ...

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows in order."""
        ...


def format_of(name: str) -> str:
    """The format that the end of *name* stands for."""
    for suffix, found in FORMATS.items():
        if name.lower().endswith(suffix):
            return found
    raise InvalidRequest(
        f"the format of {name} is not known: it should end in {', '.join(FORMATS)}, or pass "
        "--format"
    )


def open_source(file: IO[bytes], name: str, kind: str, options: CsvOptions) -> Source:
    """*file* as a source; *name* is for messages and tells whether a CSV is compressed."""
    try:
        if kind == "parquet":
            return ParquetSource(file)
        if kind == "csv":
            return CsvSource(file, name, options)
        return NpzSource(file, name)
    except (pa.ArrowException, zipfile.BadZipFile, OSError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{name} cannot be read as {kind}: {error}") from error


class ParquetSource:
    """A Parquet file, decoded a few thousand rows at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = pq.ParquetFile(file)

    @property
    def num_rows(self) -> int | None:
        return int(self._file.metadata.num_rows)

    def batches(self) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(BATCH_ROWS)


class CsvSource:
    """A CSV file, gzip-compressed if its name says so."""

    num_rows = None

    def __init__(self, file: IO[bytes], name: str, options: CsvOptions) -> None:
        stream = pa.input_stream(file, compression="gzip" if name.endswith(".gz") else None)
        arrow = Schema.of(options.types).arrow if options.types else pa.schema([])
        self._name = name
        self._reader = pa_csv.open_csv(
            stream,
            read_options=pa_csv.ReadOptions(
                block_size=BLOCK_BYTES, autogenerate_column_names=not options.has_header
            ),
            parse_options=pa_csv.ParseOptions(delimiter=options.delimiter),
            convert_options=pa_csv.ConvertOptions(
                column_types={column.name: column.type for column in arrow}
            ),
        )

    def batches(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._reader
        except pa.ArrowInvalid as error:
            raise SchemaMismatch(
                f"{self._name}: {error}; types were inferred from the first "
                f"{BLOCK_BYTES // MIB} MiB: name the right one with --type COLUMN=TYPE"
            ) from error


@dataclass
class _Member:
    """One array of an npz file, being read from its front."""

    name: str
    stream: IO[bytes]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def read(self, num_rows: int) -> pa.Array:
        data = self.stream.read(num_rows * self.row_bytes)
        if len(data) < num_rows * self.row_bytes:
            raise InvalidRequest(f"array {self.name!r} is cut short")
        rows = np.frombuffer(data, self.dtype).reshape(num_rows, *self.shape[1:])
        rows = rows.astype(self.dtype.newbyteorder("="), copy=False)
        if rows.ndim == 1:
            return pa.array(rows.tolist() if rows.dtype.kind in "US" else rows)
        elements = pa.array(rows.reshape(-1))  # bool arrays have no shorter way
        size = int(np.prod(self.shape[1:], dtype=np.int64))
        return pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(elements.type, self.shape[1:]),
            pa.FixedSizeListArray.from_arrays(elements, size),
        )


class NpzSource:
    """An npz file: arrays of equal length become columns, those of more dimensions arrays."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._archive = zipfile.ZipFile(file)
        self._members = [_open_member(self._archive, member) for member in self._archive.namelist()]
        lengths = {member.name: member.shape[0] for member in self._members}
        if len(set(lengths.values())) != 1:
            raise InvalidRequest(
                f"{name}: arrays must be as long as each other to be columns; they are {lengths}"
            )
        self._num_rows = next(iter(lengths.values()))

    @property
    def num_rows(self) -> int | None:
        return self._num_rows

    def batches(self) -> Iterator[pa.RecordBatch]:
        row_bytes = max(1, sum(member.row_bytes for member in self._members))
        step = max(1, BLOCK_BYTES // row_bytes)
        names = [member.name for member in self._members]
        for start in range(0, self._num_rows, step):
            count = min(step, self._num_rows - start)
            columns = [member.read(count) for member in self._members]
            yield pa.RecordBatch.from_arrays(columns, names=names)


def _open_member(archive: zipfile.ZipFile, name: str) -> _Member:
    stream = archive.open(name)
    version = np.lib.format.read_magic(stream)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, is_fortran, dtype = read_header(stream)
    column = name.removesuffix(".npy")
    if dtype.hasobject:
        raise InvalidRequest(f"array {column!r} holds Python objects, which need pickle: not read")
    if not shape:
        raise InvalidRequest(f"array {column!r} has no dimension, so no rows: leave it out")
    if is_fortran and len(shape) > 1:
        raise InvalidRequest(
            f"array {column!r} is stored column by column: save it again after "
            "numpy.ascontiguousarray"
        )
    return _Member(column, stream, dtype, tuple(shape))
