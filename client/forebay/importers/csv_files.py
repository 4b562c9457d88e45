"""CSV files: looked through once for their types, then read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

import pyarrow as pa
import pyarrow.csv as pa_csv

from forebay.dataset.schema import Schema
from forebay.importers.csv_types import Rows, Scanned, common_schema, misfit, scan
from forebay.importers.files import WholeFile, open_file
from forebay.importers.piece import Block, Options
from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.limits import MIB

BLOCK_BYTES: Final = 4 * MIB
"""Bytes that are parsed at a time."""


@dataclass(frozen=True)
class CsvPiece(WholeFile):
    """A CSV file, gzip-compressed if its name says so. Quoted lines may break, so it is not cut."""

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        if schema is None:
            schema = csv_schema([self], options)
        types = {column.name: column.type for column in schema.arrow}
        with open_file(self.file.path) as file:
            try:
                for batch in self._open(file, types, options):
                    done = self.num_bytes if file.closed else file.tell()
                    yield Block(batch, done)
            except pa.ArrowInvalid as error:
                raise self._blamed(types, options, error) from error

    def scan(self, options: Options) -> Scanned:
        """All rows, for the types of the columns that the user has not given."""
        with open_file(self.file.path) as file:
            names = self._open(file, {}, options).schema.names
        if len(set(names)) != len(names):
            raise InvalidRequest(f"{self.name}: two columns have the same name: {', '.join(names)}")
        wanted = [name for name in names if name not in options.types]
        rows = self._rows(names, options)
        return scan(names, wanted, rows, lambda row: self.where(row, options), self.name)

    def where(self, row: int, options: Options) -> str:
        """File and line of a row. Reads the file up to there."""
        return f"{self.name}, line {self._line_of(row, options)}"

    @staticmethod
    def schema_of(pieces: Sequence[CsvPiece], options: Options) -> Schema:
        """Of all rows of all files."""
        return csv_schema(pieces, options)

    def _line_of(self, row: int, options: Options) -> int:
        """Number, from 1, of the line that a row begins on."""
        with open_file(self.file.path) as file, self._plain(file) as plain:
            text = io.TextIOWrapper(plain, encoding="utf-8", errors="replace", newline="")
            reader = csv.reader(text, delimiter=options.delimiter)
            left = row + (1 if options.has_header else 0)
            before = 0
            for fields in reader:
                if fields:  # lines without anything are no rows
                    if not left:
                        break
                    left -= 1
                before = reader.line_num
        return before + 1

    def _plain(self, file: IO[bytes]) -> pa.NativeFile:
        return pa.input_stream(file, compression="gzip" if self.name.endswith(".gz") else None)

    def _open(
        self, file: IO[bytes], types: Mapping[str, pa.DataType], options: Options
    ) -> pa_csv.CSVStreamingReader:
        try:
            return pa_csv.open_csv(
                self._plain(file),
                read_options=pa_csv.ReadOptions(
                    block_size=BLOCK_BYTES, autogenerate_column_names=not options.has_header
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=options.delimiter, newlines_in_values=True
                ),
                convert_options=pa_csv.ConvertOptions(column_types=dict(types)),
            )
        except (pa.ArrowException, OSError) as error:
            found = self._blamed(types, options, error) if types else None
            if isinstance(found, SchemaMismatch):
                raise found from error
            raise InvalidRequest(f"{self.name} cannot be read as csv: {error}") from error

    def _rows(self, names: Sequence[str], options: Options) -> Rows:
        """All rows as text."""
        row = 0
        with open_file(self.file.path) as file:
            try:
                for batch in self._open(file, dict.fromkeys(names, pa.string()), options):
                    yield row, batch
                    row += batch.num_rows
            except pa.ArrowInvalid as error:
                raise InvalidRequest(f"{self.name} cannot be read as csv: {error}") from error

    def _blamed(
        self, types: Mapping[str, pa.DataType], options: Options, error: Exception
    ) -> InvalidRequest:
        """The first value that is not of its column's type; else what *error* says."""

        for name, kind in types.items():
            if kind == pa.string():
                continue
            place = misfit(name, kind, self._rows(list(types), options))
            if place is not None:
                return SchemaMismatch(
                    f"{self.where(place.row, options)}, column {name!r}: {place.value!r} is no "
                    f"{kind}: name the right type with --type {name}=TYPE"
                )
        return InvalidRequest(f"{self.name} cannot be read as csv: {error}")


def csv_schema(pieces: Sequence[CsvPiece], options: Options) -> Schema:
    """Of all rows of all files. SchemaMismatch where no type keeps all values, naming the line."""
    found = [piece.scan(options) for piece in pieces]
    if not any(one.num_rows for one in found):
        raise InvalidRequest("there are no rows to import, so no columns either")
    return options.schema(common_schema(found))
