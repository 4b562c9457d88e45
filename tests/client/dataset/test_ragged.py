"""Lists of numbers of different lengths as tensors: padded or nested, the same as one by one."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

import forebay
from forebay.dataset import addresses, lists
from forebay.dataset.schema import Schema
from forebay.dataset.shard import BatchColumns
from forebay.testing.numbered import NUM_SAMPLES, write_numbered
from forebay_wire.limits import KIB


@pytest.fixture
def way():
    """Reading has its own tests."""
    return "local"


def rows_of(batch, name="ragged"):
    """The lists of a batch, whatever they came as."""
    values = batch[name]
    if isinstance(values, torch.Tensor) and not values.is_nested:
        lengths = batch[f"{name}_lengths"].tolist()
        assert values.shape == (len(lengths), max(lengths, default=0))
        return [row[:size].tolist() for row, size in zip(values, lengths, strict=True)]
    values = values.unbind(0) if isinstance(values, torch.Tensor) else values
    return [None if row is None else row.tolist() for row in values]


def options(**changes):
    return {"global_batch_size": 16, "shuffle": "full", "seed": 5, "include_ids": True, **changes}


def read(dataset, **changes):
    with forebay.DataLoader(dataset, **options(**changes)) as loader:
        return list(loader) + list(loader)  # the second epoch finds all in memory


@pytest.mark.parametrize("style", ["pad", "nested"])
def test_lists_are_those_of_the_samples(numbered, style):
    batches = read(numbered, ragged=style)
    assert sum(len(batch["_ids"]) for batch in batches) == 2 * NUM_SAMPLES
    for batch in batches:
        assert isinstance(batch["ragged"], torch.Tensor)
        assert batch["ragged"].dtype == torch.int32
        assert rows_of(batch) == [list(range(row % 4)) for row in batch["_ids"].tolist()]
        assert batch["text"] == [f"sample {row}" for row in batch["_ids"].tolist()]


def test_what_is_behind_a_list_is_the_pad_value(numbered):
    for batch in read(numbered, ragged="pad", pad_value=-1):
        behind = torch.arange(batch["ragged"].shape[1]) >= batch["ragged_lengths"][:, None]
        assert bool((batch["ragged"][behind] == -1).all())
        assert bool((batch["ragged"][~behind] >= 0).all())


ARROW_ROWS = {
    "float": (pa.float32(), [[1.5, np.nan], None, [], [2.0] * 300, [3.0]] * 40),
    "bool": (pa.bool_(), [[True, False], None, [], [True] * 300, [False]] * 40),
    "large": (pa.uint16(), [[65535], None, [], list(range(300)), [7, 8, 9]] * 40),
}


@pytest.fixture
def holey(client, name):
    """Missing lists, empty ones and long ones."""
    table = pa.table(
        {
            key: pa.array(rows, (pa.large_list if key == "large" else pa.list_)(kind))
            for key, (kind, rows) in ARROW_ROWS.items()
        }
    )
    with client.create_dataset(name, batch_bytes=8 * KIB) as writer:
        writer.write_table(table)
    return client.dataset(name)


@pytest.mark.parametrize("style", ["pad", "nested"])
@pytest.mark.parametrize("size", [3, 64])
def test_missing_lists_are_empty(holey, style, size):
    for batch in read(holey, ragged=style, global_batch_size=size):
        for key, (_, rows) in ARROW_ROWS.items():
            wanted = [rows[row] or [] for row in batch["_ids"].tolist()]
            found = rows_of(batch, key)
            assert [len(one) for one in found] == [len(one) for one in wanted]
            for one, other in zip(found, wanted, strict=True):
                assert np.array_equal(one, np.array(other, np.float64), equal_nan=True)


def columns_of(values):
    """A record batch as a file in place has it: its lists may miss elements."""
    batch = pa.record_batch({"a": values})
    schema = Schema.from_arrow(batch.schema)
    return BatchColumns(batch, schema), schema["a"]


def test_what_lies_behind_a_missing_list_does_not_count():
    values = pa.ListArray.from_arrays(
        pa.array([0, 2, 5, 6], pa.int32()),
        pa.array(range(6), pa.int32()),
        mask=pa.array([False, True, False]),
    )
    columns, column = columns_of(values)
    bounds = columns.numbers(replace(column, kind="bounds", dtype=np.dtype(np.int64), shape=(2,)))
    assert bounds[:, 1].tolist() == [2, 0, 1]
    found = addresses.gather_runs(bounds[:, 0], bounds[:, 1], 4).view(np.int32)
    assert found.tolist() == [0, 1, 5]


def test_missing_elements_are_nan():
    columns, column = columns_of(pa.array([[1.5, None], None, [2.0]], pa.list_(pa.float32())))
    bounds = columns.numbers(replace(column, kind="bounds", dtype=np.dtype(np.int64), shape=(2,)))
    assert bounds[:, 1].tolist() == [2, 0, 1]
    found = addresses.gather_runs(bounds[:, 0], bounds[:, 1], 4).view(np.float32)
    assert np.array_equal(found, [1.5, np.nan, 2.0], equal_nan=True)


def test_missing_elements_of_whole_numbers_are_refused():
    columns, column = columns_of(pa.array([[1, None]], pa.list_(pa.int64())))
    with pytest.raises(forebay.SchemaMismatch, match="missing values"):
        columns.objects(column, np.array([0]))
    with pytest.raises(forebay.SchemaMismatch, match="missing values"):
        columns.numbers(replace(column, kind="bounds", dtype=np.dtype(np.int64), shape=(2,)))


def test_ranks_without_samples_get_empty_tensors(numbered):
    for style, shape in (("pad", (0, 0)), ("nested", (0,))):
        given = options(ragged=style, rank=7, world_size=8, global_batch_size=105)
        with forebay.DataLoader(numbered, **given) as loader:
            last = list(loader)[-1]  # one sample, which rank 0 gets
        assert last["ragged"].shape[: len(shape)] == shape
        assert rows_of(last) == []


@pytest.mark.parametrize("style", ["pad", "nested"])
def test_workers_hand_them_over(numbered, style):
    stream = forebay.StreamingDataset(numbered, **options(ragged=style))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    seen = []
    for batch in loader:
        seen += batch["_ids"].tolist()
        assert rows_of(batch) == [list(range(row % 4)) for row in batch["_ids"].tolist()]
    assert sorted(seen) == list(range(NUM_SAMPLES))


@pytest.mark.parametrize("style", ["pad", "nested"])
def test_a_mixture_puts_them_in_its_own_order(client, numbered, name, style):
    write_numbered(client, name, 50)
    mixture = forebay.Mixture(
        {"a": numbered, "b": client.dataset(name)}, {"a": 0.5, "b": 0.5}, num_samples=80
    )
    for batch in read(mixture, ragged=style):
        assert rows_of(batch) == [list(range(row % 4)) for row in batch["_ids"].tolist()]


@pytest.mark.parametrize("style", ["pad", "nested"])
def test_holes_are_empty(numbered, style, monkeypatch):
    """Some rows raise what damaged ones raise; damage itself has its own tests."""
    with forebay.DataLoader(numbered, **options(ragged=style, on_error="mask")) as loader:
        order = loader._source.order(0)
        whole = order.source.read

        def read_some(rows, *rest):
            if (rows < 40).any():
                raise forebay.IntegrityError("damaged")
            return whole(rows, *rest)

        monkeypatch.setattr(order.source, "read", read_some)
        seen = 0
        for batch in loader:
            rows = batch["_ids"].tolist()
            there = batch["_mask"].tolist()
            assert all(ok == (row >= 40) or not ok for row, ok in zip(rows, there, strict=True))
            wanted = [
                list(range(row % 4)) if ok else [] for row, ok in zip(rows, there, strict=True)
            ]
            assert rows_of(batch) == wanted
            seen += there.count(False)
    assert 40 <= seen < NUM_SAMPLES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ragged": "stack"}, "ragged='stack'"),
        ({"ragged": "nested", "pad_value": 1}, "pad_value belongs"),
        ({"ragged": "pad", "pad_value": 2**31}, "is no int32"),
        ({"ragged": "pad", "pad_value": 0.5}, "is no int32"),
    ],
)
def test_what_makes_no_sense_is_refused(numbered, given, message):
    with pytest.raises(forebay.InvalidRequest, match=message):
        forebay.DataLoader(numbered, global_batch_size=1, **given)


def test_a_column_in_the_way_of_the_lengths_is_named(client, name):
    with client.create_dataset(name, {"a": "list[int8]", "a_lengths": "int64"}) as writer:
        writer.write(a=[1], a_lengths=1)
    with pytest.raises(forebay.InvalidRequest, match="a_lengths"):
        forebay.DataLoader(client.dataset(name), batch_size=1, ragged="pad")
    assert read(client.dataset(name), ragged="pad", columns=["a"])


@pytest.mark.parametrize("item", [1, 2, 4, 8])
@pytest.mark.parametrize("longest", [3, 600])
@pytest.mark.parametrize("shift", [0, 1])
def test_runs_are_copied_from_their_addresses(item, longest, shift):
    rng = np.random.default_rng(longest)
    memory = rng.integers(0, 256, 200_000, dtype=np.uint8)
    sizes = rng.integers(0, longest, 50)
    starts = rng.integers(0, 20_000, 50) * item + shift
    begin = memory.__array_interface__["data"][0]
    found = addresses.gather_runs(begin + starts, sizes, item)
    wanted = [memory[at : at + size * item] for at, size in zip(starts, sizes, strict=True)]
    assert np.array_equal(found, np.concatenate(wanted))


def test_parts_are_merged_where_they_stand():
    parts = [
        (np.array([2, 0]), lists.Lists(np.array([5, 6, 7]), np.array([1, 2]))),
        (np.array([1, 4]), lists.Lists(np.array([8, 9]), np.array([2, 0]))),
    ]
    found = lists.merged(parts, 5)
    assert found.lengths.tolist() == [2, 2, 1, 0, 0]
    assert found.values.tolist() == [6, 7, 8, 9, 5]
