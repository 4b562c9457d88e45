"""Tables in files: Parquet, CSV, JSON lines, and Arrow streams (what ``datasets`` saves)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from forebay.dataset.schema import Schema
from forebay.importers.files import File, open_file
from forebay.importers.json_types import Inexact, check_exact, numbered_rows, sure_schema
from forebay.importers.piece import Block, Options
from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.limits import MIB

BATCH_ROWS: Final = 16_384
"""Rows of a Parquet file that are decoded at a time."""

BLOCK_BYTES: Final = 4 * MIB
"""Bytes of a text file that are parsed at a time; types are inferred from the first."""

RANGE_BYTES: Final = 64 * MIB
"""A file of JSON lines is cut into ranges of about so many, a Parquet file between row groups."""


@dataclass(frozen=True)
class ParquetPiece:
    """Row groups of a Parquet file, decoded a few thousand rows at a time."""

    file: File
    groups: tuple[int, ...]
    num_bytes: int
    num_rows: int

    @property
    def name(self) -> str:
        return f"{self.file.path}, row groups {self.groups[0]} to {self.groups[-1]}"

    @property
    def stamp(self) -> str:
        return self.file.stamp

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        with open_file(self.file.path) as file:
            try:
                parquet = pq.ParquetFile(file)
                rows = 0
                for batch in parquet.iter_batches(BATCH_ROWS, row_groups=list(self.groups)):
                    rows += batch.num_rows
                    yield Block(batch, self.num_bytes * rows // max(1, self.num_rows))
            except (pa.ArrowException, OSError) as error:
                raise InvalidRequest(f"{self.name} cannot be read as parquet: {error}") from error


def parquet_pieces(file: File) -> list[ParquetPiece]:
    """Runs of row groups of about :data:`RANGE_BYTES`."""
    try:
        with open_file(file.path) as opened:
            metadata = pq.ParquetFile(opened).metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{file.path} cannot be read as parquet: {error}") from error
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if not groups:  # still a table, with columns
        return []
    sizes = [
        sum(one.column(c).total_compressed_size for c in range(one.num_columns)) for one in groups
    ]
    pieces: list[ParquetPiece] = []
    first = 0
    for number in range(1, len(groups) + 1):
        if number == len(groups) or sum(sizes[first:number]) >= RANGE_BYTES:
            rows = sum(one.num_rows for one in groups[first:number])
            run = tuple(range(first, number))
            pieces.append(ParquetPiece(file, run, sum(sizes[first:number]), rows))
            first = number
    return pieces


@dataclass(frozen=True)
class JsonLinesPiece:
    """The lines that begin within a range of a file of JSON objects, one a line."""

    file: File
    start: int
    stop: int

    @property
    def name(self) -> str:
        if self.start == 0 and self.stop >= self.file.num_bytes:
            return self.file.path
        return f"{self.file.path}, bytes {self.start} to {self.stop}"

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    @property
    def stamp(self) -> str:
        return self.file.stamp

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        wanted = Schema.of(options.types).arrow if options.types else pa.schema([])
        may_add = schema is None
        if schema is not None:
            wanted = schema.arrow
        before = 0
        with open_file(self.file.path) as file:
            for lines, done in self._lines(file):
                try:
                    table = self._table(lines, wanted, options, may_add=may_add)
                except pa.ArrowInvalid as error:
                    raise self._blamed(lines, before, wanted, error, may_add=may_add) from error
                except Inexact as error:
                    where = self._place(before + error.line)
                    raise SchemaMismatch(f"{where}, column {error.column!r}: {error}") from error
                wanted, may_add = wanted if schema is not None else table.schema, False
                before += lines.count(b"\n")
                for batch in table.combine_chunks().to_batches():
                    yield Block(batch, done)

    def _table(
        self, lines: bytes, wanted: pa.Schema, options: Options, *, may_add: bool
    ) -> pa.Table:
        """*lines* with no value changed, except where the user gave a type."""
        table = _parse_lines(lines, wanted, may_add=may_add)
        if may_add:
            rows = numbered_rows(lines)
            # Arrow adds the columns that have a type, also if there are none.
            options.check_names(list(dict.fromkeys(key for _, one in rows for key in one)))
            sure = sure_schema(table.schema, rows, options.types)
            if sure != table.schema:
                table = _parse_lines(lines, sure, may_add=False)
        check_exact(table, lines, options.types)
        return table

    def where(self, row: int, options: Options) -> str:
        """File and line of a row of the range."""
        before = 0
        with open_file(self.file.path) as file:
            for lines, _ in self._lines(file):
                for number, line in enumerate(lines.split(b"\n"), before):
                    if line.strip(b" \t\r"):
                        if not row:
                            return self._place(number)
                        row -= 1
                before += lines.count(b"\n")
        return self.name

    def _place(self, line: int) -> str:
        """File and number, from 1, of a line of the range, there counted from 0."""
        before = 0
        if self.start:
            with open_file(self.file.path) as file:
                left = self.start - 1
                while left and (data := file.read(min(left, BLOCK_BYTES))):
                    before += data.count(b"\n")
                    left -= len(data)
            before += 1  # what that line ends with
        return f"{self.file.path}, line {before + line + 1}"

    def _blamed(
        self, lines: bytes, before: int, wanted: pa.Schema, error: Exception, *, may_add: bool
    ) -> SchemaMismatch:
        """Which of *lines*, which come after *before* lines of the range, is to blame, and why."""
        for number, line in enumerate(lines.split(b"\n"), before):
            if not line.strip(b" \t\r"):
                continue
            try:
                _parse_lines(line, wanted, may_add=may_add)
            except pa.ArrowInvalid as found:
                return SchemaMismatch(
                    f"{self._place(number)}{_new_column(line, wanted)}: {found}; columns and types "
                    "are those of the first lines: give others with --type COLUMN=TYPE"
                )
        return SchemaMismatch(
            f"{self._place(before)} and further: {error}; give a type with --type COLUMN=TYPE"
        )

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
        """Whole lines, some MiB at a time, and how many bytes of the range are read with them."""
        stream: Any = file
        if self.name.endswith((".gz", ".zst")):
            codec = "gzip" if self.name.endswith(".gz") else "zstd"
            stream = pa.input_stream(file, compression=codec)
        elif self.start:
            file.seek(self.start - 1)
            file.readline()  # the line that the range before has begun
        begun = bytearray()
        while True:
            here = file.tell() if stream is file else -1
            if here >= self.stop:
                break
            wanted = BLOCK_BYTES if stream is not file else min(BLOCK_BYTES, self.stop - here)
            data = stream.read(wanted)
            if stream is file and data and not data.endswith(b"\n"):
                data += file.readline()
            begun += data
            end = begun.rfind(b"\n") + 1 if data else len(begun)
            if end and bytes(begun[:end]).strip():
                done = here + len(data) - self.start if stream is file else _told(file)
                yield bytes(begun[:end]), min(done, self.num_bytes)
            del begun[:end]
            if not data:
                break
        if begun.strip():
            yield bytes(begun), self.num_bytes


def _parse_lines(lines: bytes, wanted: pa.Schema, *, may_add: bool) -> pa.Table:
    """*lines* as a table: columns of *wanted*, and if *may_add* those that come up."""
    fields = [pa.field(one.name, one.type) for one in wanted]  # nulls are looked for later
    return pa_json.read_json(
        io.BytesIO(lines),
        read_options=pa_json.ReadOptions(
            use_threads=False, block_size=max(BLOCK_BYTES, len(lines) + 1)
        ),
        parse_options=pa_json.ParseOptions(
            explicit_schema=pa.schema(fields),
            unexpected_field_behavior="infer" if may_add else "error",
        ),
    )


def _new_column(line: bytes, wanted: pa.Schema) -> str:
    """The first column of *line* that is not among those *wanted*, in words; empty: none."""
    try:
        keys = json.loads(line)
    except ValueError:
        return ""
    new = [key for key in keys if key not in wanted.names] if isinstance(keys, dict) else []
    return f", column {new[0]!r}" if new else ""


def _told(file: IO[bytes]) -> int:
    return 0 if file.closed else file.tell()


def json_lines_pieces(file: File) -> list[JsonLinesPiece]:
    """Ranges of about :data:`RANGE_BYTES`; a compressed file is one."""
    if file.path.endswith((".gz", ".zst")):
        return [JsonLinesPiece(file, 0, file.num_bytes)]
    starts = range(0, max(1, file.num_bytes), RANGE_BYTES)
    return [
        JsonLinesPiece(file, start, min(start + RANGE_BYTES, file.num_bytes)) for start in starts
    ]


@dataclass(frozen=True)
class ArrowPiece:
    """An Arrow IPC file or stream, as written by pyarrow or saved by Hugging Face ``datasets``."""

    file: File
    media: tuple[str, ...] = ()
    """Columns of images or sounds, which ``datasets`` keeps as bytes beside a path."""

    @property
    def name(self) -> str:
        return self.file.path

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    @property
    def stamp(self) -> str:
        return self.file.stamp

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        with open_file(self.file.path) as file:
            try:
                for batch in _arrow_batches(file):
                    for start in range(0, batch.num_rows, BATCH_ROWS):
                        rows = batch.slice(start, BATCH_ROWS)
                        yield Block(media_bytes(rows, self.media, self.name), file.tell())
            except (pa.ArrowException, OSError) as error:
                raise InvalidRequest(f"{self.name} cannot be read as arrow: {error}") from error


def _arrow_batches(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    head = file.read(6)
    file.seek(0)
    if head == b"ARROW1":
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from pa.ipc.open_stream(file)


def media_bytes(batch: pa.RecordBatch, media: tuple[str, ...], where: str) -> pa.RecordBatch:
    """*batch* with columns of ``{"bytes", "path"}`` as the bytes alone."""
    for name in media:
        index = batch.schema.get_field_index(name)
        values = batch.column(index)
        if not pa.types.is_struct(values.type):
            continue
        data = values.field("bytes")
        lacking = [row for row in range(batch.num_rows) if not data[row].is_valid]
        lost = [row for row in lacking if values[row].is_valid and values[row].as_py()["path"]]
        if lost:
            raise InvalidRequest(
                f"{where}, column {name!r}, row {lost[0]}: it names a file instead of holding its "
                "bytes; have `datasets` embed the files (save_to_disk does for decoded columns)"
            )
        columns = [data if number == index else one for number, one in enumerate(batch.columns)]
        batch = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    return batch
