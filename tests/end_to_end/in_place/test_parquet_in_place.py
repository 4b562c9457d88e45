"""Parquet files as a dataset without being copied: the same rows and batches as imported."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import forebay
from forebay.testing.same import same
from forebay_wire.errors import InvalidRequest, OriginChanged, SchemaMismatch

GROUP_ROWS = 700
NUM_ROWS = 3000


def table(start: int = 0) -> pa.Table:
    rng = np.random.default_rng(start)
    n = np.arange(start, start + NUM_ROWS)
    return pa.table(
        {
            "n": n,
            "x": pa.array([None if row % 50 == 3 else row / 2 for row in n], pa.float32()),
            "flag": n % 3 == 0,
            "text": pa.array([f"row {row % 7}" for row in n]).dictionary_encode(),
            "raw": [bytes(int(row) % 5) for row in n],
            "tokens": pa.array([rng.integers(0, 9, row % 4) for row in n], pa.list_(pa.int16())),
            "fixed": pa.FixedSizeListArray.from_arrays(
                pa.array(rng.normal(size=3 * NUM_ROWS).astype(np.float32)), 3
            ),
            "deep": [{"a": int(row), "b": ["x"]} for row in n],
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("corpus")
    for number, codec in enumerate(("snappy", "zstd")):
        path = made / f"{number}.parquet"
        rows = table(number * NUM_ROWS)
        pq.write_table(rows, path, row_group_size=GROUP_ROWS, compression=codec)
    return made


both_ways = pytest.mark.parametrize("way", ["local", "remote"])


@both_ways
def test_batches_are_those_of_an_import(client: forebay.Client, folder: Path, name: str) -> None:
    placed = client.register_dataset(name, sorted(folder.iterdir()))
    imported = client.import_dataset(f"{name}-copy", folder)
    assert placed.schema.arrow.equals(imported.schema.arrow)
    plain, copied = placed.table(), imported.table()
    assert plain.drop_columns("x").equals(copied.drop_columns("x"))  # x has NaN, which equals none
    options: dict[str, Any] = {"batch_size": 64, "shuffle": "none", "num_threads": 2}
    loaders = forebay.DataLoader(placed, **options), forebay.DataLoader(imported, **options)
    count = 0
    for one, other in zip(*loaders, strict=True):
        assert one.keys() == other.keys()
        assert all(same(one[key], other[key]) for key in one)
        count += 1
    assert count == -(-2 * NUM_ROWS // 64)


def test_shuffled_batches_hold_the_rows_of_an_import(
    client: forebay.Client, folder: Path, name: str
) -> None:
    placed = client.register_dataset(name, sorted(folder.iterdir()))
    imported = client.import_dataset(f"{name}-copy", folder)
    seen: list[int] = []
    # Each version has an order of its own, so the other one is asked for the same rows.
    for batch in forebay.DataLoader(placed, batch_size=100, shuffle="full", include_ids=True):
        ids = batch.pop("_ids").numpy()
        for key, value in imported.read(ids).items():
            found = batch[key].numpy() if isinstance(batch[key], torch.Tensor) else batch[key]
            if isinstance(value, np.ndarray):
                assert value.tobytes() == found.tobytes()
                assert value.dtype == found.dtype
            else:
                pairs = zip(value, found, strict=True)
                assert all(np.array_equal(one, other) for one, other in pairs)
        seen.extend(ids.tolist())
    assert sorted(seen) == list(range(2 * NUM_ROWS))


def test_only_the_columns_that_are_used_are_decoded(
    client: forebay.Client, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forebay.dataset.parquet_shard import ParquetReader

    decoded: list[str] = []
    decode = ParquetReader.decode
    monkeypatch.setattr(
        ParquetReader,
        "decode",
        lambda self, index, schema: decoded.extend(schema.names) or decode(self, index, schema),
    )
    path = folder / f"{name}.parquet"
    pq.write_table(table(), path, row_group_size=GROUP_ROWS)
    dataset = client.register_dataset(name, [path])
    assert dataset.take([0, 5, 2999], ["n"])["n"].tolist() == [0, 5, 2999]
    assert decoded == ["n", "n"], "of two row groups one column"
    path.unlink()


@both_ways
def test_pinned_it_stays_parquet_and_is_read_without_the_file(
    client: forebay.Client, folder: Path, name: str
) -> None:
    path = folder / f"{name}.parquet"
    pq.write_table(table(), path, row_group_size=GROUP_ROWS)
    client.register_dataset(name, [path])
    pinned = client.pin_origins(name)
    path.unlink()
    assert [(one.origin, one.format) for one in pinned.manifest.shards] == [(None, "parquet")]
    assert pinned.table().column("n").to_pylist() == list(range(NUM_ROWS))
    assert pinned.verify().damaged == {}


@both_ways
def test_columns_are_added_to_a_file_that_stays_where_it_is(
    client: forebay.Client, folder: Path, name: str
) -> None:
    path = folder / f"{name}.parquet"
    pq.write_table(table(), path, row_group_size=GROUP_ROWS)
    placed = client.register_dataset(name, [path])
    placed.define_splits({"train": 0.9, "test": 0.1}, seed=2)
    placed.add_columns(
        lambda rows: {"double": rows["n"] * 2, "flag": ~rows["flag"]},
        columns=["n", "flag"],
        replace=True,
    )
    wider = client.dataset(name)
    assert [one.origin for one in wider.manifest.shards] == [
        one.origin for one in placed.manifest.shards
    ]
    for dataset in (wider, client.pin_origins(name)):
        batch = dataset.take(range(0, NUM_ROWS, 7))
        n = np.arange(0, NUM_ROWS, 7)
        assert np.array_equal(batch["double"], 2 * n)
        assert np.array_equal(batch["flag"], n % 3 != 0)
        assert batch["text"] == [f"row {row % 7}" for row in n]
        assert dataset.table().column("double").to_pylist() == list(range(0, 2 * NUM_ROWS, 2))
    tests = [client.dataset(name, version, split="test") for version in (1, 2, 3)]
    rows = [one.take(range(len(one)), ["n"])["n"].tolist() for one in tests]
    assert rows[0] == rows[1] == rows[2]
    path.unlink()
    assert client.dataset(name).verify().damaged == {}


def test_a_file_that_changes_is_refused(client: forebay.Client, folder: Path, name: str) -> None:
    path = folder / f"{name}.parquet"
    pq.write_table(table(), path)
    dataset = client.register_dataset(name, [path])
    pq.write_table(table(1), path)
    with pytest.raises(OriginChanged):
        dataset.table()
    path.unlink()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"PAR1 no parquet PAR1", InvalidRequest, "does not end like a Parquet file"),
        (b"nothing of the kind", InvalidRequest, "is no Parquet file"),
        (pa.table({"n": [1, None]}), SchemaMismatch, "1 values are missing in row group 0"),
        (pa.table({"_n": [1]}), InvalidRequest, "not allowed"),
        (pa.table({"n": pa.array([], pa.int64())}), InvalidRequest, "without rows"),
    ],
)
def test_files_that_will_not_do(
    client: forebay.Client, folder: Path, name: str, content: Any, error: type, message: str
) -> None:
    path = folder / f"{name}.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content, path)
    with pytest.raises(error, match=message):
        client.register_dataset(name, [path])
    path.unlink()


def test_files_of_two_formats_are_no_one_version(
    client: forebay.Client, folder: Path, name: str
) -> None:
    with pytest.raises(InvalidRequest, match="several formats"):
        client.register_dataset(name, [folder / "0.parquet", folder / "1.arrow"])


@pytest.mark.parametrize("ragged", ["pad", "nested"])
def test_lists_come_as_tensors_and_missing_ones_are_empty(
    client: forebay.Client, folder: Path, name: str, ragged: str
) -> None:
    lists = [[1.5, float("nan")], None, [], [2.0, 3.0, 4.0]] * 300
    path = folder / f"{name}.parquet"
    column = pa.array(lists, pa.list_(pa.float32()))
    pq.write_table(pa.table({"x": column}), path, row_group_size=100)
    dataset = client.register_dataset(name, [path])
    options: dict[str, Any] = {"batch_size": 64, "shuffle": "full", "ragged": ragged}
    with forebay.DataLoader(dataset, include_ids=True, **options) as loader:
        for batch in itertools.chain(loader, loader):
            for place, row in enumerate(batch["_ids"].tolist()):
                wanted = np.array(lists[row] or [], np.float32)
                found = batch["x"][place].numpy()
                if ragged == "pad":
                    assert batch["x_lengths"][place] == len(wanted)
                    found = found[: len(wanted)]
                assert np.array_equal(found, wanted, equal_nan=True)
    path.unlink()


def test_lists_of_a_row_group_that_is_held_for_another_column(
    client: forebay.Client, folder: Path, name: str
) -> None:
    path = folder / f"{name}.parquet"
    lists = pa.array([[1.0], [2.0, 3.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"n": [7, 8], "x": lists}), path)
    dataset = client.register_dataset(name, [path])
    assert dataset.take([0, 1], ["n"])["n"].tolist() == [7, 8]
    with forebay.DataLoader(dataset, batch_size=2, ragged="pad", columns=["x"]) as loader:
        [batch] = loader
    assert batch["x"].tolist() == [[1.0, 0.0], [2.0, 3.0]]
    path.unlink()
