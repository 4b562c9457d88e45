"""CSV files: looked through once for their types, then read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final

import pyarrow as pa
import pyarrow.csv as pa_csv

from forebay.dataset.schema import Schema
from forebay.importers.csv_lines import Record, Watched, records
from forebay.importers.csv_types import (
    Place,
    Rows,
    Scanned,
    common_schema,
    first_hexadecimal,
    has_infinity,
    misfit,
    scan,
)
from forebay.importers.files import WholeFile, open_file
from forebay.importers.piece import Block, Options
from forebay_wire.errors import ForebayError, InvalidRequest, SchemaMismatch, StorageError
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
        is_looked_at = False
        floats = {name for name, kind in types.items() if pa.types.is_floating(kind)}
        with open_file(self.file.path) as file:
            watched = self._watched(file, options)
            for batch in self._batches(watched, types, options):
                if watched.has_hex and not is_looked_at:
                    self._check_hexadecimal(types, options)
                    is_looked_at = True  # to the end of the file
                there = floats.intersection(batch.schema.names)
                infinite = {name for name in there if has_infinity(batch.column(name))}
                for name in infinite:
                    self._check(name, types, options)
                floats -= infinite
                done = self.num_bytes if file.closed else file.tell()
                yield Block(batch, done)

    def scan(self, options: Options) -> Scanned:
        """All rows, for the types of the columns that the user has not given."""
        with open_file(self.file.path) as file:
            names = self._open(self._watched(file, options), {}, options).schema.names
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
        line = 1
        for number, record in enumerate(self._records(options), -1 if options.has_header else 0):
            line = record.line
            if number == row:
                break
        return line

    def _records(self, options: Options) -> Iterator[Record]:
        with open_file(self.file.path) as file, self._plain(file) as plain:
            yield from records(plain, options.delimiter)

    def _plain(self, file: IO[bytes]) -> pa.NativeFile:
        return pa.input_stream(file, compression="gzip" if self.name.endswith(".gz") else None)

    def _watched(self, file: IO[bytes], options: Options) -> Watched:
        return Watched(self._plain(file), options.delimiter)

    def _open(
        self, plain: Watched, types: Mapping[str, pa.DataType], options: Options
    ) -> pa_csv.CSVStreamingReader:
        try:
            reader = pa_csv.open_csv(
                plain,
                read_options=pa_csv.ReadOptions(
                    block_size=BLOCK_BYTES, autogenerate_column_names=not options.has_header
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=options.delimiter, newlines_in_values=True
                ),
                convert_options=pa_csv.ConvertOptions(column_types=dict(types)),
            )
            _ = reader.schema.names  # decoded
        except UnicodeDecodeError as error:
            raise self._malformed(options, str(error)) from error
        except (pa.ArrowException, OSError) as error:
            raise self._blamed(types, options, error) from error
        return reader

    def _batches(
        self, plain: Watched, types: Mapping[str, pa.DataType], options: Options
    ) -> Iterator[pa.RecordBatch]:
        """All rows; what is wrong with the file is named with its line."""
        reader = self._open(plain, types, options)
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                break
            except (pa.ArrowException, OSError) as error:
                raise self._blamed(types, options, error) from error
            yield batch
        if plain.may_be_open:
            for record in self._records(options):
                if record.open_quote is not None:
                    raise InvalidRequest(self._never_closed(record.open_quote))

    def _rows(self, names: Sequence[str], options: Options) -> Rows:
        """All rows as text."""
        row = 0
        with open_file(self.file.path) as file:
            plain = self._watched(file, options)
            for batch in self._batches(plain, dict.fromkeys(names, pa.string()), options):
                yield row, batch
                row += batch.num_rows

    def _check(self, name: str, types: Mapping[str, pa.DataType], options: Options) -> None:
        """SchemaMismatch for the first value of a column that is not of its type."""
        place = misfit(name, types[name], self._rows(list(types), options))
        if place is not None:
            raise self._no(name, types[name], place, options)

    def _check_hexadecimal(self, types: Mapping[str, pa.DataType], options: Options) -> None:
        """SchemaMismatch for the first ``0x10`` in a column of whole numbers, which Arrow reads."""
        integers = [name for name, kind in types.items() if pa.types.is_integer(kind)]
        found = first_hexadecimal(integers, self._rows(list(types), options))
        if found is not None:
            name, place = found
            raise self._no(name, types[name], place, options)

    def _no(self, name: str, kind: pa.DataType, place: Place, options: Options) -> SchemaMismatch:
        return SchemaMismatch(
            f"{self.where(place.row, options)}, column {name!r}: {place.shown} is no {kind}: name "
            f"the right type with --type {name}=TYPE"
        )

    def _blamed(
        self, types: Mapping[str, pa.DataType], options: Options, error: Exception
    ) -> ForebayError:
        """What is wrong with the file, or the first value that is not of its column's type; else
        what *error* says."""
        text = str(error)
        if "Empty CSV file" in text:
            return InvalidRequest(
                f"{self.name} is empty: a CSV file has at least the names of its columns; leave it "
                "out, or write them"
            )
        if "ompress" in text or "inflate" in text:
            return InvalidRequest(
                f"{self.name} is cut off or damaged ({text}): copy it again, or compress it anew"
            )
        if not isinstance(error, pa.ArrowException):
            return StorageError(f"{self.name} cannot be read: {text}")
        if "conversion error to" not in text or "UTF8" in text:
            return self._malformed(options, text)
        try:
            for name, kind in types.items():
                if kind != pa.string():
                    self._check(name, types, options)
        except InvalidRequest as found:
            return found
        return self._malformed(options, text)

    def _malformed(self, options: Options, text: str) -> InvalidRequest:
        """The first row that is none, by its line; else what *text* says."""
        expected: int | None = None
        for record in self._records(options):
            if record.open_quote is not None:
                return InvalidRequest(self._never_closed(record.open_quote))
            where = f"{self.name}, line {record.line}"
            if record.undecodable is not None:
                line, field = record.undecodable
                return InvalidRequest(
                    f"{self.name}, line {line}, column {self._column(field, options)}: the text is "
                    "not UTF-8: convert the file, as with iconv -f LATIN1 -t UTF-8"
                )
            if record.num_fields != (expected or record.num_fields):
                return InvalidRequest(
                    f"{where}: expected {expected} columns, found {record.num_fields}: write "
                    f"fields with {options.delimiter!r} or line breaks within quotes, and missing "
                    "values as empty fields; another delimiter is named with --delimiter"
                )
            if record.num_bytes > BLOCK_BYTES and "straddling" in text:
                return InvalidRequest(
                    f"{where}: the row has {record.num_bytes} bytes, and rows of up to "
                    f"{BLOCK_BYTES} are read: write such values as Parquet"
                )
            expected = record.num_fields
        return InvalidRequest(f"{self.name} cannot be read as csv: {text}")

    def _column(self, field: int, options: Options) -> str:
        """Name of a field, or its number where the names cannot be read."""
        try:
            with open_file(self.file.path) as file, self._plain(file) as plain:
                head = pa_csv.open_csv(
                    io.BytesIO(plain.read(BLOCK_BYTES).partition(b"\n")[0] + b"\n"),
                    read_options=pa_csv.ReadOptions(
                        autogenerate_column_names=not options.has_header
                    ),
                    parse_options=pa_csv.ParseOptions(delimiter=options.delimiter),
                )
                return repr(head.schema.names[field])
        except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError):
            return str(field + 1)

    def _never_closed(self, line: int) -> str:
        return (
            f"{self.name}, line {line}: the quote that opens there is never closed: close it, or "
            'write a quote within quotes twice ("")'
        )


def csv_schema(pieces: Sequence[CsvPiece], options: Options) -> Schema:
    """Of all rows of all files. SchemaMismatch where no type keeps all values, naming the line."""
    found = [piece.scan(options) for piece in pieces]
    if not any(one.num_rows for one in found):
        raise InvalidRequest("there are no rows to import, so no columns either")
    return options.schema(common_schema(found))
