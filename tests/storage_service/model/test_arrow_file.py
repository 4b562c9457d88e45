"""Arrow IPC files, looked at by small ranges."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay_server.model.arrow_file import TAIL_BYTES, inspect
from forebay_wire.errors import InvalidRequest


def make(num_rows: int, batch_rows: int, width: int = 1) -> tuple[bytes, pa.Schema]:
    values = pa.FixedSizeListArray.from_arrays(np.arange(num_rows * width), width)
    table = pa.table({"x": values, "s": [str(number) for number in range(num_rows)]})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return sink.getvalue(), table.schema


@given(st.integers(1, 300), st.integers(1, 100))
def test_rows_and_schema_are_those_of_arrow(num_rows: int, batch_rows: int) -> None:
    data, schema = make(num_rows, batch_rows)
    found = inspect(lambda offset, length: data[offset : offset + length], len(data), "f")
    reader = pa.ipc.open_file(data)
    rows = [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]
    assert list(found.batch_rows) == rows
    assert pa.ipc.read_schema(pa.py_buffer(found.schema)).equals(schema)
    assert not found.has_dictionaries


def test_only_the_ends_and_heads_are_read() -> None:
    data, _ = make(4000, 1000, width=512)  # batches of 4 MiB
    reads: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    assert inspect(read, len(data), "f").batch_rows == (1000,) * 4
    assert len(reads) == 2 + 4  # the ends, and the head of each batch
    assert sum(length for _, length in reads) < 2 * TAIL_BYTES + 4 * 4096


@given(st.data())
def test_damaged_files_are_refused_or_read_within_bounds(data: st.DataObject) -> None:
    good, _ = make(50, 10)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(len(good) - 600, len(good) - 1))
        damaged[position] = data.draw(st.integers(0, 255))

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(damaged)
        return bytes(damaged[offset : offset + length])

    with contextlib.suppress(InvalidRequest):
        inspect(read, len(damaged), "f")


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"x" * 100, b"ARROW1\0\0" + b"\0" * 100])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="f is no Arrow IPC file"):
        inspect(lambda offset, length: data[offset : offset + length], len(data), "f")
