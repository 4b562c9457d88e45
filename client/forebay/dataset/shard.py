"""One shard as an Arrow IPC file: written into memory that is given, read batch by batch.

Reading parses the footer itself (pyarrow's file reader touches, and hence would need verified, more
than the record batch that is wanted). The layout is that of the Arrow columnar format, "IPC File
Format": https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute  # `take` imports it at its first use: in a forked child that may never end
from numpy.typing import NDArray

from forebay.dataset.schema import Column, Schema
from forebay_wire.errors import IntegrityError, InvalidRequest, SchemaMismatch
from forebay_wire.limits import MAX_SEGMENT_BYTES

ARROW_MAGIC: Final = b"ARROW1"
FOOTER_END: Final = struct.Struct("<i6s")
"""Length of the footer i32, magic."""

BLOCK: Final = np.dtype(
    {"names": ["offset", "head", "body"], "formats": ["<i8", "<i4", "<i8"], "offsets": [0, 8, 16]}
)
"""Where a record batch lies: offset i64, metadata length i32, 4 bytes padding, body length i64."""

RECORD_BATCHES_FIELD: Final = 3
"""Index of ``recordBatches`` in the footer's flatbuffer table."""


@dataclass(frozen=True)
class ShardContent:
    """What a finished shard holds."""

    num_bytes: int
    num_rows: int
    batch_rows: tuple[int, ...]
    cuts: tuple[int, ...]
    """Segment lengths in bytes: at record-batch borders, at most 4 MiB each."""


class ShardBuilder:
    """Writes one shard straight into *memory* (writable). Not thread-safe."""

    def __init__(self, memory: memoryview, schema: pa.Schema) -> None:
        if memory.readonly:
            raise InvalidRequest("a shard needs writable memory")  # Arrow would abort the process
        self._capacity = memory.nbytes
        self._sink = pa.FixedSizeBufferWriter(pa.py_buffer(memory))
        # One thread: a record batch is a memcpy, and pools of two cores only add switches.
        self._writer = pa.ipc.new_file(
            self._sink, schema, options=pa.ipc.IpcWriteOptions(use_threads=False)
        )
        self._schema_bytes = len(schema.serialize())
        self._ends: list[int] = []
        self._rows: list[int] = []

    @property
    def num_batches(self) -> int:
        return len(self._rows)

    def fits(self, batch: pa.RecordBatch) -> bool:
        """Whether *batch* and everything that has to follow it fit."""
        used = self._ends[-1] if self._ends else self._schema_bytes + 64
        footer = shard_overhead(self._schema_bytes, len(self._ends) + 1)
        return used + int(pa.ipc.get_record_batch_size(batch)) + footer <= self._capacity

    def write(self, batch: pa.RecordBatch) -> None:
        """Append *batch*, which :meth:`fits`."""
        self._writer.write_batch(batch)
        self._ends.append(int(self._sink.tell()))
        self._rows.append(batch.num_rows)

    @property
    def settled_bytes(self) -> int:
        """So many from the start will not change any more: all but the last record batch, which
        the footer will join."""
        return self._ends[-2] if len(self._ends) > 1 else 0

    def settled_cuts(self) -> tuple[int, ...]:
        """Segment lengths of those: the first ones of the shard."""
        return segment_cuts(self._ends[:-1], self.settled_bytes)

    def finish(self) -> ShardContent:
        """Write the footer; the shard is the first ``num_bytes`` of the memory."""
        self._writer.close()
        num_bytes = int(self._sink.tell())
        self.close()
        return ShardContent(
            num_bytes, sum(self._rows), tuple(self._rows), segment_cuts(self._ends, num_bytes)
        )

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        self._sink.close()


def shard_overhead(schema_bytes: int, num_batches: int) -> int:
    """An upper bound of the bytes of a footer with *num_batches* record batches."""
    return 2 * schema_bytes + 64 * num_batches + 1024


def largest_sample(shard_bytes: int, schema: pa.Schema) -> int:
    """Bytes of values that surely fit a shard of *shard_bytes* as its only row."""
    schema_bytes = len(schema.serialize())
    head = 64 + schema_bytes + 1024 + 256 * len(schema)  # of the file and of the record batch
    return max(0, shard_bytes - head - shard_overhead(schema_bytes, 1))


def segment_cuts(batch_ends: list[int], num_bytes: int) -> tuple[int, ...]:
    """Segment lengths for a file of *num_bytes* whose record batches end at *batch_ends*.

    The header joins the first batch and the footer the last; what is longer than a segment may be
    is cut evenly.
    """
    cuts: list[int] = []
    start = 0
    for end in [*batch_ends[:-1], num_bytes]:
        pieces = -(-(end - start) // MAX_SEGMENT_BYTES)
        size, larger = divmod(end - start, max(pieces, 1))
        cuts += [size + 1] * larger + [size] * (pieces - larger)
        start = end
    return tuple(cuts)


class Bytes(Protocol):
    """What a shard is read from: an open blob (``forebay.transfer.Blob``)."""

    @property
    def num_bytes(self) -> int: ...

    def map(self, offset: int = 0, length: int | None = None) -> memoryview: ...


class ShardReader:
    """Record batches of an open shard, parsed without a copy at their first use. Thread-safe.

    Exactly the footer and the record batches that are used are mapped, and hence verified.
    """

    def __init__(
        self, blob: Bytes, schema: Schema, batch_rows: tuple[int, ...], where: str
    ) -> None:
        self._blob = blob
        self._schema = schema
        self._batch_rows = batch_rows
        self._where = where
        self._blocks: NDArray[np.void] | None = None

    def batch(self, index: int) -> BatchColumns:
        """Record batch *index* of the shard. Raises IntegrityError if it is not what it must be."""
        record_batch = self.record_batch(index)
        return BatchColumns(record_batch, self._schema)

    def record_batch(self, index: int) -> pa.RecordBatch:
        """Record batch *index* as Arrow sees it, over the mapped memory."""
        if self._blocks is None:
            self._blocks = self._read_footer()
        block = self._blocks[index]
        offset, length = int(block["offset"]), int(block["head"]) + int(block["body"])
        try:
            view = self._blob.map(offset, length)
        except InvalidRequest as error:
            raise self._damaged(f"record batch {index} lies outside it: {error}") from error
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(view), self._schema.arrow)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(f"record batch {index} cannot be read: {error}") from error
        if batch.num_rows != self._batch_rows[index]:
            raise self._damaged(
                f"record batch {index} has {batch.num_rows} rows, not {self._batch_rows[index]}"
            )
        return batch

    def _read_footer(self) -> NDArray[np.void]:
        """Where the record batches lie."""
        total = self._blob.num_bytes
        try:
            length, magic = FOOTER_END.unpack(
                self._blob.map(total - FOOTER_END.size, FOOTER_END.size)
            )
            if magic != ARROW_MAGIC or not 0 < length < total - FOOTER_END.size:
                raise self._damaged("it does not end like an Arrow IPC file")
            footer = self._blob.map(total - FOOTER_END.size - length, length)
            blocks = _record_batch_blocks(footer)
        except (InvalidRequest, struct.error, ValueError) as error:
            raise self._damaged(f"its footer cannot be read: {error}") from error
        if len(blocks) != len(self._batch_rows):
            raise self._damaged(f"it has {len(blocks)} batches, not {len(self._batch_rows)}")
        return blocks

    def _damaged(self, reason: str) -> IntegrityError:
        return IntegrityError(
            f"the shard is not what its manifest says ({self._where}): {reason}; "
            "write the dataset version again"
        )


def _record_batch_blocks(footer: memoryview) -> NDArray[np.void]:
    """The vector of blocks in a footer (a flatbuffer table, see the module's docstring)."""
    (table,) = struct.unpack_from("<I", footer, 0)
    (to_vtable,) = struct.unpack_from("<i", footer, table)
    vtable = table - to_vtable
    (vtable_bytes,) = struct.unpack_from("<H", footer, vtable)
    slot = 4 + 2 * RECORD_BATCHES_FIELD
    if slot >= vtable_bytes:
        return np.empty(0, dtype=BLOCK)
    (field,) = struct.unpack_from("<H", footer, vtable + slot)
    if field == 0:
        return np.empty(0, dtype=BLOCK)
    (to_vector,) = struct.unpack_from("<I", footer, table + field)
    vector = table + field + to_vector
    (count,) = struct.unpack_from("<I", footer, vector)
    return np.frombuffer(footer, dtype=BLOCK, count=count, offset=vector + 4).copy()


class BatchColumns:
    """The columns of one record batch, each turned into its readable form at first use."""

    def __init__(self, batch: pa.RecordBatch, schema: Schema) -> None:
        self._batch = batch
        self._schema = schema
        self._arrays: dict[str | tuple[str, str], NDArray[Any]] = {}
        self.copied_bytes = 0
        """Of columns that do not lie in Arrow as they are read: unpacked, once."""
        self.on_copy: Callable[[BatchColumns, int], object] = lambda columns, num_bytes: None
        """Told of bytes that were added to them."""
        self.num_rows: int = batch.num_rows
        self.num_bytes: int = batch.get_total_buffer_size()  # `nbytes` allocates: see forking

    def numbers(self, column: Column) -> NDArray[Any]:
        """A column of numbers or arrays: ``(rows, *shape)``, over the mapped memory.

        Booleans lie in Arrow as bits: they are unpacked once. Of a column of "bounds": the address
        of the first element of each list, and how many it has.
        """
        found = self._arrays.get(column.name)
        if found is None:
            # Where two threads do this once each, both get the same one: its address is handed out.
            make = self._bounds if column.kind == "bounds" else self._numbers
            made = make(column)
            found = self._arrays.setdefault(column.name, made)
            if found is made and not self._is_mapped(column, made):
                self.copied_bytes += made.nbytes
                self.on_copy(self, made.nbytes)
        return found

    def _is_mapped(self, column: Column, made: NDArray[Any]) -> bool:
        """Whether *made* lies in the record batch's own memory."""
        address = made.__array_interface__["data"][0]
        buffers = [one for one in self.arrow(column).buffers() if one is not None]
        return any(one.address <= address < one.address + one.size for one in buffers)

    def _numbers(self, column: Column) -> NDArray[Any]:
        return _as_numbers(self.arrow(column), column)

    def _bounds(self, column: Column) -> NDArray[np.int64]:
        values = self.arrow(column)
        refuse_missing(values.values, column)
        # Kept, and by the same rule: it may be a copy, and its address is handed out.
        elements = self._arrays.setdefault(
            (column.name, "elements"), np.ascontiguousarray(as_array(values.values))
        )
        offsets = np.from_dlpack(values.offsets).astype(np.int64)
        found = np.empty((len(values), 2), dtype=np.int64)
        begin: int = elements.__array_interface__["data"][0]
        found[:, 0] = begin + offsets[:-1] * elements.itemsize
        found[:, 1] = offsets[1:] - offsets[:-1]
        if values.null_count:
            found[~_bits(values.buffers()[0], values), 1] = 0
        return found

    def address(self, column: Column) -> int:
        """Where :meth:`numbers` of *column* begin, which lie in line; for as long as this lives."""
        address: int = self.numbers(column).__array_interface__["data"][0]
        return address

    def objects(self, column: Column, rows: NDArray[np.int64]) -> list[Any]:
        """The values of other columns in the given *rows*: str, bytes, arrays or Python objects."""
        # Not `pa.array`: it takes the lock of a thread that is just importing pandas.
        wanted = pa.py_buffer(np.ascontiguousarray(rows, np.int64))
        indices = pa.Array.from_buffers(pa.int64(), len(rows), [None, wanted])
        taken = self.arrow(column).take(indices)
        if column.kind == "list":
            return _as_lists(taken, column)
        values: list[Any] = taken.to_pylist()
        return values

    def value(self, column: Column, row: int) -> memoryview | None:
        """One value of a column of bytes or text, over the mapped memory."""
        values = self.arrow(column)
        if values.null_count and not values[row].is_valid:
            return None
        _, offsets, data = values.buffers()
        is_large = pa.types.is_large_binary(values.type) or pa.types.is_large_string(values.type)
        ends = np.frombuffer(offsets, np.int64 if is_large else np.int32)
        start, stop = ends[values.offset + row : values.offset + row + 2].tolist()
        return memoryview(b"" if data is None else data)[start:stop]

    def arrow(self, column: Column) -> pa.Array:
        """A column as it lies in the record batch."""
        return self._batch.column(self._schema.names.index(column.name))


def _as_numbers(values: pa.Array, column: Column) -> NDArray[Any]:
    if column.kind == "array":
        values = values.storage.values
    refuse_missing(values, column)
    return as_array(values).reshape(-1, *column.shape)


def refuse_missing(values: pa.Array, column: Column) -> None:
    if values.null_count and not pa.types.is_floating(values.type):
        raise SchemaMismatch(
            f"column {column.name!r} of {column.text} has missing values, which no number stands "
            "for: write the file without, or import it with a column that may have them"
        )


def as_array(values: pa.Array) -> NDArray[Any]:
    """Numbers or booleans; NaN where one is missing. Without a copy where that is possible.

    ``to_numpy`` would import pandas: 0.4 s before the first batch, and a worker that is forked
    while another thread imports waits for that thread for ever.
    """
    validity, data = values.buffers()[:2]
    if pa.types.is_boolean(values.type):
        return _bits(data, values)
    if not values.null_count:
        flat: NDArray[Any] = np.from_dlpack(values)
        return flat
    dtype = np.dtype(values.type.to_pandas_dtype())
    flat = np.frombuffer(data, dtype)[values.offset : values.offset + len(values)].copy()
    flat[~_bits(validity, values)] = np.nan
    return flat


def is_present(values: pa.Array) -> NDArray[np.bool_] | None:
    """Of each value whether it is there; None if all are."""
    return _bits(values.buffers()[0], values) if values.null_count else None


def _bits(data: pa.Buffer, values: pa.Array) -> NDArray[Any]:
    """The bits of a buffer of *values* as booleans, one for each."""
    num_bits = values.offset + len(values)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=num_bits, bitorder="little")
    return bits[values.offset :].view(np.bool_)


def _as_lists(values: pa.ListArray, column: Column) -> list[Any]:
    refuse_missing(values.values, column)
    # A copy: the rows belong to the user, who may write to them.
    flat = np.array(as_array(values.values), dtype=column.dtype)
    offsets = np.from_dlpack(values.offsets)
    pieces: list[Any] = np.split(flat, offsets)[1:-1]
    if values.null_count:
        missing = ~_bits(values.buffers()[0], values)
        pieces = [None if gone else piece for piece, gone in zip(pieces, missing, strict=True)]
    return pieces
