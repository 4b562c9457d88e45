"""A shard is an Arrow IPC file, cut at record batches, of which only what is used is mapped."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.dataset import shard
from forebay.dataset.schema import Array, Schema
from forebay.dataset.shard import ShardBuilder, ShardReader, largest_sample, segment_cuts
from forebay_wire.errors import IntegrityError, InvalidRequest
from forebay_wire.limits import MAX_SEGMENT_BYTES

SCHEMA = Schema.of({"image": Array("float32", (4, 2)), "label": "int64", "text": "string"})


def make_batch(start: int, rows: int) -> pa.RecordBatch:
    numbers = np.arange(start, start + rows)
    images = np.repeat(numbers.astype(np.float32), 8)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(images), 8)
    return pa.RecordBatch.from_arrays(
        [
            pa.ExtensionArray.from_storage(SCHEMA["image"].arrow_type, storage),
            pa.array(numbers),
            pa.array([f"row {number}" for number in numbers]),
        ],
        schema=SCHEMA.arrow,
    )


class Memory:
    """A blob in memory that remembers which of its bytes were mapped."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.num_bytes = len(data)
        self.mapped: list[tuple[int, int]] = []

    def map(self, offset=0, length=None):
        if offset < 0 or length < 0 or offset + length > self.num_bytes:
            raise InvalidRequest("outside")
        self.mapped.append((offset, offset + length))
        return self.data[offset : offset + length]


def make_shard(batch_rows):
    memory = bytearray(1 << 20)
    builder = ShardBuilder(memoryview(memory), SCHEMA.arrow)
    start = 0
    for rows in batch_rows:
        batch = make_batch(start, rows)
        assert builder.fits(batch)
        builder.write(batch)
        start += rows
    content = builder.finish()
    return content, Memory(bytes(memory[: content.num_bytes]))


def test_any_arrow_reader_opens_it():
    _, blob = make_shard([3, 4])
    with pa.ipc.open_file(pa.py_buffer(blob.data)) as reader:
        table = reader.read_all()
    assert table["label"].to_pylist() == list(range(7))
    assert table.schema.metadata == SCHEMA.arrow.metadata


def test_record_batches_come_back_by_number():
    content, blob = make_shard([3, 4, 5])
    reader = ShardReader(blob, SCHEMA, content.batch_rows, "here")
    columns = reader.batch(1)
    assert columns.numbers(SCHEMA["label"]).tolist() == [3, 4, 5, 6]
    assert columns.numbers(SCHEMA["image"]).shape == (4, 4, 2)
    assert columns.numbers(SCHEMA["image"])[2].tolist() == [[5, 5]] * 4
    assert columns.objects(SCHEMA["text"], np.array([3, 0])) == ["row 6", "row 3"]


def test_numbers_are_views_of_the_mapped_memory():
    content, blob = make_shard([50])
    found = ShardReader(blob, SCHEMA, content.batch_rows, "here").batch(0)
    for name in ("image", "label"):
        assert np.shares_memory(found.numbers(SCHEMA[name]), np.frombuffer(blob.data, np.uint8))


def test_only_the_footer_and_the_used_batch_are_mapped():
    content, blob = make_shard([100] * 10)
    reader = ShardReader(blob, SCHEMA, content.batch_rows, "here")
    reader.batch(7)
    used = sum(stop - start for start, stop in blob.mapped)
    assert used < content.num_bytes / 4
    footers = len(blob.mapped)
    reader.batch(7)
    assert len(blob.mapped) == footers + 1  # the footer is read once


def test_segments_are_cut_at_record_batches():
    content, blob = make_shard([3, 4, 5])
    assert sum(content.cuts) == content.num_bytes
    assert len(content.cuts) == 3
    reader = ShardReader(blob, SCHEMA, content.batch_rows, "here")
    for index, start in enumerate(np.cumsum([0, *content.cuts[:-1]])):
        blob.mapped.clear()
        reader.batch(index)
        first, last = blob.mapped[-1]
        assert start <= first
        assert last <= start + content.cuts[index]


@given(st.lists(st.integers(1, 3 * MAX_SEGMENT_BYTES), max_size=6), st.integers(1, 5000))
def test_cuts_are_exact_even_and_never_too_long(sizes, footer):
    ends = np.cumsum(sizes).tolist()
    num_bytes = (ends[-1] if ends else 0) + footer
    cuts = segment_cuts(ends, num_bytes)
    assert sum(cuts) == num_bytes
    assert all(0 < cut <= MAX_SEGMENT_BYTES for cut in cuts)
    assert {*ends[:-1]} <= {0, *np.cumsum(cuts).tolist()}


@given(st.integers(0, 400), st.integers(1, 30))
def test_what_fits_never_runs_over_the_memory(capacity_batches, rows):
    capacity = 2048 + capacity_batches * 97
    builder = ShardBuilder(memoryview(bytearray(capacity)), SCHEMA.arrow)
    batch = make_batch(0, rows)
    while builder.fits(batch) and builder.num_batches < 20:
        builder.write(batch)
    if builder.num_batches:
        assert builder.finish().num_bytes <= capacity
    builder.close()


@given(st.integers(0, 100_000))
def test_the_largest_sample_fits_a_shard(shard_bytes):
    schema = Schema.of({"data": "binary"})
    size = largest_sample(shard_bytes, schema.arrow)
    if size:
        builder = ShardBuilder(memoryview(bytearray(shard_bytes)), schema.arrow)
        assert builder.fits(pa.record_batch([pa.array([bytes(size)])], schema=schema.arrow))
        builder.close()


def test_an_empty_shard_has_no_batches():
    content, blob = make_shard([])
    assert content.num_rows == 0
    assert len(ShardReader(blob, SCHEMA, (), "here")._read_footer()) == 0


def test_memory_that_cannot_be_written_is_refused():
    with pytest.raises(InvalidRequest, match="writable"):
        ShardBuilder(memoryview(b"x" * 1000), SCHEMA.arrow)


@given(st.data())
def test_any_damage_is_an_integrity_error_or_does_not_change_the_shape(data):
    # The digests of the transfer find all damage; here the parser must just never misbehave.
    content, blob = make_shard([3, 4])
    damaged = bytearray(blob.data)
    where = data.draw(st.integers(0, len(damaged) - 1))
    damaged[where] ^= data.draw(st.integers(1, 255))
    reader = ShardReader(Memory(bytes(damaged)), SCHEMA, content.batch_rows, "here")
    try:
        found = [reader.record_batch(index).num_rows for index in range(2)]
    except IntegrityError as error:
        assert "here" in str(error)  # noqa: PT017 - damage in the values goes unseen on purpose
    else:
        assert found == [3, 4]


@pytest.mark.parametrize("length", [0, 5, 10, 100, -1, -10])
def test_a_shard_cut_short_is_an_integrity_error(length):
    content, blob = make_shard([3, 4])
    reader = ShardReader(Memory(bytes(blob.data[:length])), SCHEMA, content.batch_rows, "here")
    with pytest.raises(IntegrityError, match="here"):
        reader.batch(1)


def test_a_shard_with_other_batches_than_the_manifest_says_is_an_integrity_error():
    _content, blob = make_shard([3, 4])
    for batch_rows in [(3,), (3, 4, 5), (4, 3)]:
        with pytest.raises(IntegrityError, match="batch"):
            ShardReader(blob, SCHEMA, batch_rows, "here").batch(0)


def test_threads_share_what_they_unpack_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is handed out, so it must not be replaced by an equal one."""
    schema = Schema.of({"flag": "bool"})
    batch = pa.record_batch([pa.array([True, False])], schema=schema.arrow)
    columns = shard.BatchColumns(batch, schema)
    together = threading.Barrier(2, timeout=30)
    unpack = shard._as_numbers

    def unpack_at_once(*arguments: Any) -> Any:
        together.wait()
        return unpack(*arguments)

    monkeypatch.setattr(shard, "_as_numbers", unpack_at_once)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(columns.numbers, [schema["flag"]] * 2)
    assert one is other
