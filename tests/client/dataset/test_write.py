"""Writing versions: all or nothing, strict about samples, appended to, open to any Arrow reader."""

import gc
import signal
import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

import forebay
from forebay.methods import Blobs
from forebay_wire.limits import KIB
from forebay_wire.v1.blobs_pb2 import AbortRequest

TWO_COLUMNS = {"image": forebay.Array("float32", (2, 2)), "label": "int64"}


def sample(label: int) -> dict:
    return {"image": np.full((2, 2), label, np.float32), "label": label}


def write_samples(client, name, labels, **options):
    with client.create_dataset(name, schema=TWO_COLUMNS, **options) as writer:
        for label in labels:
            writer.write(**sample(label))
    return writer


def write_then_fail(writer) -> None:
    for label in range(10_000):
        writer.write(**sample(label))
    raise ZeroDivisionError


def labels_of(dataset) -> list[int]:
    return dataset.take(range(len(dataset)))["label"].tolist()


def lease_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in ("forebay-lease", "forebay-seal")]


def test_what_was_written_is_read_back(client, name):
    writer = write_samples(client, name, range(10))
    assert writer.version == 1
    dataset = client.dataset(name)
    assert (dataset.version, len(dataset)) == (1, 10)
    batch = dataset.take([7, 0, -1])
    assert batch["label"].tolist() == [7, 0, 9]
    assert batch["image"][:, 1, 1].tolist() == [7.0, 0.0, 9.0]


def test_every_kind_of_column_survives(client, name):
    schema = {
        **{kind: kind for kind in ("bool", "int8", "uint64", "float16", "float64")},
        "flags": forebay.Array("bool", (3,)),
        "halves": forebay.Array("float16", (2, 2)),
        "text": "string",
        "photo": "image",
        "tokens": "list[uint16]",
    }
    rows = [
        {
            "bool": number % 3 == 0,
            "int8": -number,
            "uint64": 2**64 - 1 - number,
            "float16": number / 2,
            "float64": number / 3,
            "flags": np.array([True, False, number % 2 == 0]),
            "halves": np.full((2, 2), number, np.float16),
            "text": "ä" * number,
            "photo": bytes([number]) * number,
            "tokens": np.arange(number, dtype=np.uint16),
        }
        for number in range(9)
    ]
    with client.create_dataset(name, schema=schema, batch_bytes=200) as writer:
        for row in rows:
            writer.write(**row)
    picks = [8, 0, 3, 3, 1]
    batch = client.dataset(name).take(picks)
    for position, number in enumerate(picks):
        for column, value in rows[number].items():
            assert np.array_equal(batch[column][position], value), (column, number)
    assert batch["flags"].dtype == np.bool_
    assert batch["halves"].dtype == np.float16


def test_a_schema_is_inferred_from_the_first_sample(client, name):
    with client.create_dataset(name) as writer:
        writer.write(x=torch.ones(2, 3), y=1, z="a")
        writer.write(x=torch.zeros(2, 3), y=2, z="b")
    dataset = client.dataset(name)
    assert str(dataset.schema) == "x: float32 array of shape (2, 3), y: int64, z: string"
    assert dataset[0]["x"].tolist() == [[1.0] * 3] * 2


def test_values_are_copied_when_they_are_written(client, name):
    reused = np.zeros((2, 2), np.float32)
    with client.create_dataset(name, schema=TWO_COLUMNS) as writer:
        for label in range(5):
            reused[:] = label
            writer.write(image=reused, label=label)
    assert client.dataset(name).take(range(5))["image"][:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_many_shards_and_batches_keep_the_order(client, name):
    write_samples(client, name, range(5000), shard_bytes=64 * KIB, batch_bytes=KIB)
    dataset = client.dataset(name)
    assert len(dataset.manifest.shards) > 1
    assert all(shard.num_bytes <= 64 * KIB for shard in dataset.manifest.shards)
    assert labels_of(dataset) == list(range(5000))
    assert [label for batch in dataset.iter_batches() for label in batch["label"].to_pylist()] == (
        list(range(5000))
    )
    assert dataset.table()["label"].to_pylist() == list(range(5000))


def test_the_threads_of_a_writer_end_with_it(client, name):
    write_samples(client, name, range(10))
    assert lease_threads() == []


# Wrong samples.


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"label": "three"}, r"sample number 3, column 'label': expected int64, got str 'three'"),
        ({"label": 2.5}, r"'label': expected int64, got float 2.5"),
        ({"label": True}, r"'label': expected int64, got bool True"),
        ({"label": None}, r"'label': expected int64, got NoneType None"),
        ({"label": 2**63}, r"'label': expected int64, got int"),
        ({"label": np.uint64(1)}, r"'label': expected int64, got uint64"),
        ({"image": np.zeros((2, 3), np.float32)}, r"got float32 array of shape \(2, 3\)"),
        ({"image": np.zeros((2, 2))}, r"float32 array of shape \(2, 2\), got float64 array"),
        ({"image": [[1, 2], [3]]}, r"column 'image': expected float32 array"),
        ({"image": torch.zeros(2, 2, dtype=torch.bfloat16)}, r"torch.bfloat16"),
    ],
)
def test_a_wrong_third_sample_is_named_and_the_others_stay(client, name, bad, message):
    with client.create_dataset(name, schema=TWO_COLUMNS) as writer:
        writer.write(**sample(0))
        writer.write(**sample(1))
        with pytest.raises(forebay.SchemaMismatch, match=message):
            writer.write(**{**sample(2), **bad})
        writer.write(**sample(3))
    assert labels_of(client.dataset(name)) == [0, 1, 3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": 1}, r"sample number 1 lacks 'image'; the schema's columns are 'image', 'label'"),
        ({**sample(1), "extra": 1}, r"sample number 1 has unknown 'extra'"),
    ],
)
def test_missing_and_unknown_columns_are_named(client, name, columns, message):
    with (
        pytest.raises(forebay.SchemaMismatch, match=message),
        client.create_dataset(name, schema=TWO_COLUMNS) as writer,
    ):
        writer.write(**columns)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ("string", "a", b"a"),
        ("binary", bytearray(b"a"), "a"),
        ("list[int8]", [1, 2], [1, 200]),
        ("list[float32]", [1, 2.5], ["a"]),
        ("list[int64]", [], [[1]]),
        ("bool", np.bool_(True), 1),
        ("float32", 3, "3"),
        ("uint8", 255, -1),
        ("list[int32]", np.arange(3, dtype=np.int16), np.arange(3, dtype=np.int64)),
    ],
)
def test_other_columns_are_strict_too(client, name, schema, good, bad):
    with client.create_dataset(name, schema={"x": schema}) as writer:
        writer.write(x=good)
        with pytest.raises(forebay.SchemaMismatch, match="sample number 2, column 'x'"):
            writer.write(x=bad)
        with pytest.raises(forebay.SchemaMismatch, match="sample number 2, column 'x'"):
            writer.write(x=None)
    assert len(client.dataset(name)) == 1


def test_narrower_single_numbers_fit_a_wider_column(client, name):
    with client.create_dataset(name, schema={"x": "int64", "y": "float32"}) as writer:
        writer.write(x=np.int8(-3), y=1)
        writer.write(x=torch.tensor(4, dtype=torch.int32), y=np.float16(0.5))
    assert client.dataset(name).take([0, 1])["x"].tolist() == [-3, 4]


def test_a_sample_larger_than_a_shard_is_refused_with_its_size(client, name):
    with client.create_dataset(name, schema={"x": "binary"}, shard_bytes=64 * KIB) as writer:
        writer.write(x=b"small")
        with pytest.raises(forebay.SampleTooLarge, match=r"sample number 2 .* has 100004 bytes"):
            writer.write(x=bytes(100_000))
        with pytest.raises(forebay.SampleTooLarge, match="raise shard_bytes"):
            writer.write(x=bytes(64 * KIB))
        writer.write(x=bytes(60 * 1000 - 3000))
    assert [len(x) for x in client.dataset(name).take([0, 1])["x"]] == [5, 57_000]


@pytest.mark.parametrize("options", [{"shard_bytes": 1}, {"batch_bytes": 0}])
def test_impossible_sizes_are_refused(client, name, options):
    with pytest.raises(forebay.InvalidRequest, match="at least"):
        client.create_dataset(name, schema=TWO_COLUMNS, **options)


# All or nothing.


def test_an_exception_in_the_block_leaves_nothing(client, name):
    before = client.status().num_uploads
    with (
        pytest.raises(ZeroDivisionError),
        client.create_dataset(name, schema=TWO_COLUMNS, shard_bytes=64 * KIB) as writer,
    ):
        write_then_fail(writer)
    assert name not in client.datasets()
    assert client.status().num_uploads == before
    assert lease_threads() == []
    with pytest.raises(forebay.InvalidRequest, match="has ended"):
        writer.write(**sample(0))


def test_nothing_is_visible_before_the_end_of_the_block(client, name):
    with client.create_dataset(name, schema=TWO_COLUMNS, shard_bytes=64 * KIB) as writer:
        for label in range(5000):
            writer.write(**sample(label))
        assert name not in client.datasets()
        assert writer.version is None
    assert name in client.datasets()


def test_a_taken_name_is_refused_before_anything_is_uploaded(client, name):
    write_samples(client, name, range(3))
    with (
        pytest.raises(forebay.AlreadyExists, match=f"append_dataset\\('{name}'\\)"),
        client.create_dataset(name, schema=TWO_COLUMNS),
    ):
        pytest.fail("the block must not run")
    assert labels_of(client.dataset(name)) == [0, 1, 2]


def test_of_two_writers_of_one_name_one_commits(client, name):
    first = client.create_dataset(name, schema=TWO_COLUMNS)
    second = client.create_dataset(name, schema=TWO_COLUMNS)
    first.write(**sample(1))
    second.write(**sample(2))
    assert first.commit() == 1
    with pytest.raises(forebay.AlreadyExists):
        second.commit()
    assert labels_of(client.dataset(name)) == [1]


@pytest.mark.parametrize("bad_name", ["", "a/b", "../x", "x" * 200])
def test_a_bad_dataset_name_is_refused(client, bad_name):
    with pytest.raises(forebay.InvalidRequest, match="name"):
        client.create_dataset(bad_name, schema=TWO_COLUMNS)


def test_no_sample_and_no_schema_is_no_dataset(client, name):
    with (
        pytest.raises(forebay.InvalidRequest, match="no sample was written"),
        client.create_dataset(name),
    ):
        pass
    assert name not in client.datasets()


def test_a_schema_without_samples_is_an_empty_dataset(client, name):
    write_samples(client, name, [])
    dataset = client.dataset(name)
    assert len(dataset) == 0
    assert dataset.table().num_rows == 0
    assert dataset.take([])["image"].shape == (0, 2, 2)


def test_a_round_of_renewals_does_not_grow_with_the_shards(client, name, monkeypatch):
    writer = client.create_dataset(name, schema=TWO_COLUMNS)
    uploads = writer._uploads
    for _ in range(3):
        uploads.seal(uploads.begin(4096), 16, [16])
    renewed = []
    renew = uploads._renew
    monkeypatch.setattr(
        uploads, "_renew", lambda session: (renewed.append(session), renew(session))
    )
    opened = uploads.begin(4096)
    uploads.renew_all()
    assert len(renewed) == 2
    assert opened.session in renewed
    uploads.check()
    writer.abort()


def test_a_shard_lands_while_it_is_filled(client, name, monkeypatch):
    table = pa.table({"x": np.random.default_rng(5).integers(0, 1 << 60, 200_000)})
    schema = {"x": "int64"}
    options = {"schema": schema, "batch_bytes": 32 * KIB}
    with client.create_dataset(f"{name}-at-once", **options) as writer:
        writer.write_table(table)
    monkeypatch.setattr("forebay.dataset.uploads.LAND_BYTES", 200 * KIB)
    with client.create_dataset(name, **options) as writer:
        for row in range(0, len(table), 4096):
            writer.write_table(table.slice(row, 4096))
        upload, builder = writer._shard
        assert upload.landing is not None
        upload.landing.result(30)
        for row in range(0, len(table), 4096):
            writer.write_table(table.slice(row, 4096))
        assert upload.num_pieces >= 2
        assert upload.landed_bytes <= builder.settled_bytes
    assert client.dataset(name).table()["x"].equals(pa.concat_tables([table, table])["x"])
    [whole] = client.dataset(f"{name}-at-once").manifest.shards
    monkeypatch.setattr("forebay.dataset.uploads.LAND_BYTES", 64 * KIB)
    with client.create_dataset(f"{name}-in-pieces", **options) as writer:
        writer.write_table(table)
    [pieced] = client.dataset(f"{name}-in-pieces").manifest.shards
    assert pieced.blob == whole.blob


def write_in_slices(writer, table) -> None:
    with writer:
        for row in range(0, len(table), 4096):
            writer.write_table(table.slice(row, 4096))


def test_a_landing_that_failed_is_told_by_the_end(client, name, monkeypatch):
    monkeypatch.setattr("forebay.dataset.uploads.LAND_BYTES", 200 * KIB)
    table = pa.table({"x": np.arange(200_000)})
    writer = client.create_dataset(name, schema={"x": "int64"}, batch_bytes=32 * KIB)
    writer.write_table(table)
    writer.write_table(table.slice(0, 8192))
    upload, _ = writer._shard
    upload.landing.result(30)
    client.channel.call(Blobs.Abort, AbortRequest(session=upload.session))
    with pytest.raises(forebay.NotFound, match="has ended"):
        write_in_slices(writer, table)
    assert name not in client.datasets()


def test_two_writers_share_no_owner(client, name):
    first, second = (client.create_dataset(name, schema=TWO_COLUMNS) for _ in range(2))
    assert first._uploads._owner != second._uploads._owner
    assert name in first._uploads._owner
    first.abort()
    second.abort()


def test_a_writer_that_is_forgotten_stops_renewing(client, name):
    writer = client.create_dataset(name, schema=TWO_COLUMNS)
    writer.write(**sample(1))
    writer._flush_rows()
    uploads, stop = writer._uploads, writer._uploads._stop
    uploads.renew_all()
    assert "forebay-lease" in lease_threads()
    stop.set()
    writer._uploads._renewer.join(20)
    del writer, uploads
    gc.collect()
    assert lease_threads() == []


SCRIPT = """
import sys, numpy as np, forebay
client = forebay.connect(sys.argv[1])
with client.create_dataset(sys.argv[2], shard_bytes=65536) as writer:
    for label in range(20000):
        writer.write(label=label)
"""


@pytest.mark.parametrize("failpoint", ["client.write.after_shard", "client.write.before_commit"])
def test_a_killed_writer_leaves_nothing_visible(daemon, client, name, failpoint, warm_torch):
    done = warm_torch.run(["-c", SCRIPT, daemon.data, name], {"FOREBAY_FAILPOINTS": failpoint})
    assert done.returncode == -signal.SIGKILL
    assert name not in client.datasets()
    write_samples(client, name, range(3))
    assert labels_of(client.dataset(name)) == [0, 1, 2]


# Versions.


def test_appending_makes_a_new_version_and_leaves_the_old_one(client, name):
    write_samples(client, name, range(5))
    with client.append_dataset(name) as writer:
        for label in range(5, 8):
            writer.write(**sample(label))
    assert writer.version == 2
    assert labels_of(client.dataset(name)) == list(range(8))
    assert labels_of(client.dataset(name, version=1)) == list(range(5))
    assert client.dataset(name).manifest.parent == client.dataset(name, version=1).manifest_id


def test_appending_another_schema_is_refused(client, name):
    write_samples(client, name, range(2))
    with (
        pytest.raises(forebay.SchemaMismatch, match="'label'"),
        client.append_dataset(name) as writer,
    ):
        writer.write(image=np.zeros((2, 2), np.float32), label="x")
    assert client.dataset(name).version == 1


def test_of_two_appends_to_one_version_one_commits(client, name):
    write_samples(client, name, range(2))
    first, second = client.append_dataset(name), client.append_dataset(name)
    first.write(**sample(2))
    second.write(**sample(3))
    assert first.commit() == 2
    with pytest.raises(forebay.Conflict):
        second.commit()
    assert labels_of(client.dataset(name)) == [0, 1, 2]


def test_an_append_to_a_dataset_made_anew_is_a_conflict(client, name):
    write_samples(client, name, range(2))
    writer = client.append_dataset(name)
    writer.write(**sample(2))
    client.delete_dataset(name)
    write_samples(client, name, range(5, 8))
    with pytest.raises(forebay.Conflict, match="of a dataset that was deleted since"):
        writer.commit()
    assert labels_of(client.dataset(name)) == [5, 6, 7]


def test_metadata_travels_with_the_version(client, name):
    write_samples(client, name, range(2), metadata={"source": "made up"})
    assert client.dataset(name).manifest.metadata == {"source": "made up"}


# Tables.


def test_a_table_is_written_and_read_back(client, name):
    table = pa.table(
        {
            "number": pa.array(range(3000)),
            "text": pa.array([f"row {n}" for n in range(3000)]).dictionary_encode(),
            "vector": pa.array([[n, n + 1] for n in range(3000)], pa.list_(pa.float32(), 2)),
            "when": pa.array(range(3000), pa.timestamp("s")),
        }
    )
    with client.create_dataset(name, shard_bytes=64 * KIB, batch_bytes=4096) as writer:
        writer.write_table(table.slice(0, 7))
        writer.write_table(table.slice(7, 1000))
        writer.write_table(table.slice(1007).combine_chunks().to_batches()[0])
    dataset = client.dataset(name)
    assert writer.num_rows == len(dataset) == 3000
    batch = dataset.take([2999, 0, 1500])
    assert batch["number"].tolist() == [2999, 0, 1500]
    assert batch["text"] == ["row 2999", "row 0", "row 1500"]
    assert batch["vector"].tolist() == [[2999, 3000], [0, 1], [1500, 1501]]
    assert batch["when"] == table["when"].take([2999, 0, 1500]).to_pylist()
    assert dataset.table()["when"].equals(table["when"])


def test_rows_and_tables_may_alternate(client, name):
    with client.create_dataset(name, schema={"x": "int32", "y": "string"}) as writer:
        writer.write(x=0, y="a")
        writer.write_table(pa.table({"y": ["b", "c"], "x": pa.array([1, 2], pa.int16())}))
        writer.write(x=3, y="d")
        writer.write_table(pa.table({"y": ["e"], "x": pa.array([4], pa.int32())}))
    batch = client.dataset(name).take(range(5))
    assert batch == {"x": batch["x"], "y": ["a", "b", "c", "d", "e"]}
    assert batch["x"].tolist() == [0, 1, 2, 3, 4]


def test_missing_floats_become_nan_and_missing_text_none(client, name):
    table = pa.table({"x": pa.array([1.0, None]), "t": pa.array([None, "a"])})
    with client.create_dataset(name) as writer:
        writer.write_table(table)
        writer.write(x=3.0, t=None)
    batch = client.dataset(name).take([0, 1, 2])
    assert np.array_equal(batch["x"], [1.0, np.nan, 3.0], equal_nan=True)
    assert batch["t"] == [None, "a", None]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, None]), r"column 'x' \(int64\): row 1 is missing"),
        (pa.array([1.5, 2.0]), r"expected int64, got double"),
        (pa.array(["a", "b"]), r"expected int64, got string"),
        (pa.array([1, 2], pa.uint64()), r"expected int64, got uint64"),
        (pa.array([True, False]), r"expected int64, got bool"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_column(client, name, column, message):
    with client.create_dataset(name, schema={"x": "int64"}) as writer:
        with pytest.raises(forebay.SchemaMismatch, match=message):
            writer.write_table(pa.table({"x": column}))
        with pytest.raises(forebay.SchemaMismatch, match="columns"):
            writer.write_table(pa.table({"z": [1]}))
        writer.write_table(pa.table({"x": [7]}))
    assert client.dataset(name).take([0])["x"].tolist() == [7]


def test_an_element_missing_in_a_list_is_refused(client, name):
    with (
        pytest.raises(forebay.SchemaMismatch, match="element of a list"),
        client.create_dataset(name, schema={"x": "list[int64]"}) as writer,
    ):
        writer.write_table(pa.table({"x": [[1, None]]}))


def test_something_else_than_a_table_is_refused(client, name):
    with (
        pytest.raises(forebay.SchemaMismatch, match="not dict"),
        client.create_dataset(name) as writer,
    ):
        writer.write_table({"x": [1]})


def test_a_row_of_a_table_larger_than_a_shard_is_refused(client, name):
    with (
        pytest.raises(forebay.SampleTooLarge),
        client.create_dataset(name, schema={"x": "binary"}, shard_bytes=64 * KIB) as writer,
    ):
        writer.write_table(pa.table({"x": [b"a", bytes(100_000), b"b"]}))


def test_uneven_rows_of_a_table_are_put_where_they_fit(client, name):
    sizes = [10, 60_000, 20, 60_000, 5, 5, 40_000, 3]
    with client.create_dataset(name, schema={"x": "binary"}, shard_bytes=64 * KIB) as writer:
        writer.write_table(pa.table({"x": [bytes(size) for size in sizes]}))
    dataset = client.dataset(name)
    assert [len(x) for x in dataset.take(range(8))["x"]] == sizes
    assert all(shard.num_rows for shard in dataset.manifest.shards)


def test_batches_above_a_segment_are_cut_and_read(client, name):
    big = np.random.default_rng(0).integers(0, 256, (3, 5_000_000), dtype=np.uint8)
    with client.create_dataset(name, schema={"x": forebay.Array("uint8", (5_000_000,))}) as writer:
        for row in big:
            writer.write(x=row)
    assert np.array_equal(client.dataset(name).take([2, 0])["x"], big[[2, 0]])
