"""Columns added, replaced and dropped: a new version, whose other columns lie where they lay."""

import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forebay
from forebay.dataset.cache import shard_cache
from forebay.testing.numbered import NUM_SAMPLES

ROWS = 3000
SMALL = {"shard_bytes": 1 << 16, "batch_bytes": 1 << 12}


@pytest.fixture
def made(client, name):
    """A dataset of several shards, whose columns tell their row."""
    schema = {"x": "int64", "y": "float32", "text": "string", "tokens": "list[int32]"}
    with client.create_dataset(name, schema, **SMALL) as writer:
        writer.write_table(rows_of(0, ROWS))
    found = client.dataset(name)
    assert len(found.manifest.shards) > 1
    return found


def rows_of(start, stop, **more):
    n = np.arange(start, stop)
    table = {
        "x": n,
        "y": (n / 2).astype(np.float32),
        "text": [f"row {one}" for one in n],
        "tokens": pa.array([np.arange(one % 4) for one in n], pa.list_(pa.int32())),
    }
    return pa.table({**table, **more})


def blobs(dataset):
    return [shard.blob for shard in dataset.manifest.shards]


def test_a_column_is_added_and_the_others_stay_where_they_are(client, made):
    with client.write_columns(made.name, {"z": forebay.Array("int16", (2,))}, **SMALL) as writer:
        for n in range(ROWS):
            writer.write(z=np.array([n, -n], np.int16))
    found = client.dataset(made.name)
    assert found.version == writer.version == 2
    assert found.schema.names == ["x", "y", "text", "tokens", "z"]
    assert blobs(found) == blobs(made)
    added = sum(shard.num_bytes for shard in found.manifest.layers[0].shards)
    assert found.num_bytes == made.num_bytes + added
    picks = np.random.default_rng(0).integers(0, ROWS, 300)
    batch = found.take(picks)
    assert np.array_equal(batch["x"], picks)
    assert np.array_equal(batch["z"], np.stack([picks, -picks], 1).astype(np.int16))
    assert batch["text"] == [f"row {n}" for n in picks]
    assert all(len(t) == n % 4 for t, n in zip(batch["tokens"], picks, strict=True))
    assert list(found.take([5], ["z", "x"])) == ["z", "x"]
    assert found[7]["z"].tolist() == [7, -7]
    assert made.schema.names == ["x", "y", "text", "tokens"]  # the version before has none
    assert client.dataset(made.name, 1).take([1]).keys() == made.take([1]).keys()


def test_a_column_is_replaced_only_if_that_is_said(client, made):
    with pytest.raises(forebay.AlreadyExists, match=r"has 'y' already: .*replace=True"):
        client.write_columns(made.name, {"y": "int8"})
    with client.write_columns(made.name, {"y": "int8", "new": "string"}, replace=True) as writer:
        writer.write_table(
            pa.table(
                {"y": pa.array([n % 100 for n in range(ROWS)], pa.int8()), "new": ["a"] * ROWS}
            )
        )
    found = client.dataset(made.name)
    assert found.schema.names == ["x", "y", "text", "tokens", "new"]
    assert found.schema["y"].text == "int8"
    assert found.take([250])["y"].tolist() == [50]
    assert made.take([250])["y"].tolist() == [125.0]


def test_rows_are_appended_to_a_version_of_several_places(client, made):
    made.add_columns(lambda rows: {"double": rows["x"] * 2}, columns=["x"])
    with client.append_dataset(made.name, **SMALL) as writer:
        writer.write_table(rows_of(ROWS, ROWS + 700, double=np.arange(ROWS, ROWS + 700) * 2))
    client.dataset(made.name).add_columns(lambda rows: {"triple": rows["x"] * 3}, columns=["x"])
    client.drop_columns(made.name, ["y", "double"])
    with client.append_dataset(made.name, **SMALL) as writer:
        writer.write_table(
            rows_of(5000, 5010)
            .select(["x", "text", "tokens"])
            .append_column("triple", pa.array(np.arange(5000, 5010) * 3))
        )
    found = client.dataset(made.name)
    table = found.table()
    assert table.column_names == ["x", "text", "tokens", "triple"]
    assert table.num_rows == len(found) == ROWS + 710
    assert pc.all(pc.equal(pc.multiply(table["x"], 3), table["triple"])).as_py()
    assert table["text"].to_pylist() == [f"row {n}" for n in table["x"].to_pylist()]
    assert found.verify().damaged == {}
    third = client.dataset(made.name, 3).take([0, ROWS, ROWS + 699])
    assert third["double"].tolist() == [2 * n for n in third["x"].tolist()]


def test_every_row_has_one_value(client, made):
    writer = client.write_columns(made.name, {"z": "int8"})
    for _ in range(10):
        writer.write(z=1)
    with pytest.raises(forebay.InvalidRequest, match=rf"each of its {ROWS} rows.*10 were written"):
        writer.commit()
    writer = client.write_columns(made.name)
    with pytest.raises(forebay.InvalidRequest, match=f"{ROWS + 1} were written"):
        writer.write_table(pa.table({"z": np.zeros(ROWS + 1)}))
    writer.abort()
    assert client.dataset(made.name).version == 1


def test_the_daemon_counts_the_rows_itself(client, made, monkeypatch):
    """A client that does not is refused."""
    from forebay.dataset.write_columns import ColumnsWriter

    monkeypatch.setattr(ColumnsWriter, "_check_rows", lambda self, *counts: None)
    writer = client.write_columns(made.name, {"z": "int8"})
    for _ in range(10):
        writer.write(z=1)
    with pytest.raises(forebay.InvalidRequest, match=rf"have 10 rows and version 1 has {ROWS}"):
        writer.commit()


def test_somebody_else_was_faster(client, made):
    writer = client.write_columns(made.name, {"z": "int64"})
    writer.write_table(pa.table({"z": np.arange(ROWS)}))
    client.drop_columns(made.name, ["y"])
    with pytest.raises(forebay.Conflict, match="has version 2 by now"):
        writer.commit()
    assert client.dataset(made.name).schema.names == ["x", "text", "tokens"]


def test_columns_that_are_none(client, made):
    with pytest.raises(forebay.InvalidRequest, match="no column 'nope'"):
        client.drop_columns(made.name, ["nope"])
    with pytest.raises(forebay.InvalidRequest, match="no column left"):
        client.drop_columns(made.name, made.schema.names)
    with pytest.raises(forebay.InvalidRequest, match="no column to write and none to drop"):
        client.drop_columns(made.name, [])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"z": [1]}, "gave 1 values for 100 rows"),
        ({}, "a dict of column names"),
        ({"z": ["a"] * 100}, "are not int64"),
        ({"other": np.arange(100)}, "expected: z"),
    ],
)
def test_a_function_that_gives_something_else_leaves_nothing(client, made, answer, message):
    with pytest.raises(forebay.SchemaMismatch, match=message):
        made.add_columns(lambda rows: answer, {"z": "int64"}, batch_rows=100)
    assert client.dataset(made.name).version == 1


def test_a_function_may_give_tensors_text_and_lists(client, made):
    import torch

    told = []
    version = made.add_columns(
        lambda rows: {
            "wide": torch.from_numpy(rows["x"])[:, None].repeat(1, 3).float(),
            "upper": [text.upper() for text in rows["text"]],
            "twice": [np.concatenate([one, one]) for one in rows["tokens"]],
        },
        {"wide": forebay.Array("float32", (3,)), "upper": "string", "twice": "list[int32]"},
        columns=["x", "text", "tokens"],
        batch_rows=999,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (ROWS, ROWS)
    found = client.dataset(made.name, version).take([8, 3])
    assert found["wide"].tolist() == [[8.0] * 3, [3.0] * 3]
    assert found["upper"] == ["ROW 8", "ROW 3"]
    assert found["twice"][1].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("shuffle", ["none", "full", "block"])
def test_a_loader_reads_every_sample_once_in_the_order_of_the_version(client, made, shuffle):
    made.add_columns(lambda rows: {"double": rows["x"] * 2}, columns=["x"])
    found = client.dataset(made.name)
    options = {"global_batch_size": 128, "shuffle": shuffle, "include_ids": True}
    with forebay.DataLoader(found, **options, columns=["x", "double", "tokens"]) as loader:
        batches = list(loader)
    ids = np.concatenate([batch["_ids"].numpy() for batch in batches])
    assert sorted(ids.tolist()) == list(range(ROWS))
    for batch in batches:
        assert batch["x"].tolist() == batch["_ids"].tolist()
        assert batch["double"].tolist() == (2 * batch["_ids"]).tolist()
        assert [len(one) for one in batch["tokens"]] == (batch["_ids"] % 4).tolist()


def test_splits_and_folds_keep_their_rows(client, made):
    made.define_splits({"train": 0.7, "test": 0.3}, seed=4)
    made.define_folds(3)
    made.define_selection("low", rows=[5, 6, 9])
    made.define_selection("small", filter=pc.field("x") < 10)
    made.define_selection("flat", filter=pc.field("y") < 10)
    before = {
        split: client.dataset(made.name, 1, split=split).take(range(3))["x"].tolist()
        for split in ("train", "test", "fold1-test", "low", "small", "flat")
    }
    with client.write_columns(made.name, {"y": "float32"}, replace=True) as writer:
        writer.write_table(pa.table({"y": np.zeros(ROWS, np.float32)}))
    for split in ("train", "test", "fold1-test", "low", "small"):
        found = client.dataset(made.name, split=split)
        assert found.version == 2, split
        assert found.take(range(3))["x"].tolist() == before[split], split
        assert not found.take(range(3))["y"].any()
    with pytest.raises(forebay.NotFound, match="no split 'flat'"):  # by a column that changed
        client.dataset(made.name, 2, split="flat")
    client.dataset(made.name).define_splits({"train": 0.7, "test": 0.3}, seed=4)  # a repeat
    with client.append_dataset(made.name) as writer:  # other rows: other splits
        writer.write_table(rows_of(ROWS, ROWS + 1))
    with pytest.raises(forebay.NotFound, match="no split 'train'"):
        client.dataset(made.name, 3, split="train")
    client.drop_columns(made.name, ["y"])
    assert client.dataset(made.name, split="train").version == 2


def test_splits_keep_their_rows_through_two_versions(client, made):
    made.define_splits({"train": 0.5, "test": 0.5}, seed=1)
    expected = client.dataset(made.name, split="test").take(range(ROWS // 2), ["x"])["x"]
    client.drop_columns(made.name, ["y"])
    client.drop_columns(made.name, ["text"])
    found = client.dataset(made.name, split="test")
    assert found.version == 3
    assert np.array_equal(found.take(range(ROWS // 2), ["x"])["x"], expected)


def test_lists_and_text_of_added_columns(client, made):
    made.add_columns(
        lambda rows: {"more": [np.arange(n % 3) for n in rows["x"]]}, {"more": "list[int64]"}
    )
    found = client.dataset(made.name)
    rows = np.array([0, 1, 2, ROWS - 1])
    assert found.list_lengths(rows, "more").tolist() == [0, 1, 2, (ROWS - 1) % 3]
    assert bytes(found.value(3, "text")) == b"row 3"
    packed = forebay.Packed(found, "more", 16)
    with forebay.DataLoader(packed, batch_size=10) as loader:
        tokens = sum(batch["more"].numel() for batch in loader)
    assert tokens >= found.total_length("more")


def test_statistics_are_those_of_the_version(client, made):
    made.add_columns(lambda rows: {"double": rows["x"] * 2}, columns=["x"])
    found = client.dataset(made.name).statistics(["double", "x"])
    assert (found["double"].max, found["x"].max) == (2.0 * (ROWS - 1), ROWS - 1)


def test_statistics_of_an_added_column_read_its_shards_alone(client, made):
    made.add_columns(lambda rows: {"half": rows["x"] / 2}, columns=["x"])
    found = client.dataset(made.name)
    (layer,) = found.manifest.layers
    added = {shard.blob for shard in layer.shards}
    read = set()
    cache = shard_cache(found.endpoint)
    original = type(cache).open

    def spy(self, places):
        read.update(place.ref.blob for place in places)
        return original(self, places)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache), "open", spy)
        alone = found.statistics(["half"])
        assert read == added
        assert found.recompute_statistics(["x", "half"])["half"] == alone["half"]


def test_workers_and_pickles_read_it(client, made):
    import pickle

    from torch.utils.data import DataLoader

    made.add_columns(lambda rows: {"double": rows["x"] * 2}, columns=["x"])
    found = pickle.loads(pickle.dumps(client.dataset(made.name)))  # noqa: S301
    stream = forebay.StreamingDataset(
        found, batch_size=100, shuffle="full", columns=["x", "double"]
    )
    seen = []
    for batch in DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork"):
        assert batch["double"].tolist() == (2 * batch["x"]).tolist()
        seen += batch["x"].tolist()
    assert sorted(seen) == list(range(ROWS))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_history_of_versions_is_what_its_writers_wrote(client, data):
    """Each version against a table that is kept beside it."""
    name = f"history-{os.getpid()}-{os.urandom(4).hex()}"
    draw = data.draw
    sizes = {"shard_bytes": 1 << 16, "batch_bytes": draw(st.sampled_from([256, 4096]))}
    columns = {"c0": pa.int64(), "c1": pa.string()}
    history = [_values(draw, columns, draw(st.integers(1, 60)))]
    with client.create_dataset(name, history[0].schema, **sizes) as writer:
        writer.write_table(history[0])
    for _ in range(draw(st.integers(1, 5))):
        now = history[-1]
        step = draw(st.sampled_from(["append", "write", "drop"]))
        if step == "append":
            more = _values(draw, dict(zip(now.schema.names, now.schema.types, strict=True)), 7)
            with client.append_dataset(name, **sizes) as writer:
                writer.write_table(more)
            history.append(pa.concat_tables([now, more]))
        elif step == "write":
            wanted = draw(st.sets(st.sampled_from(["c0", "c1", "c2", "c3"]), min_size=1))
            types = {
                one: draw(st.sampled_from([pa.int64(), pa.string()])) for one in sorted(wanted)
            }
            made = _values(draw, types, now.num_rows)
            with client.write_columns(name, made.schema, replace=True, **sizes) as writer:
                writer.write_table(made)
            for column in types:
                place = now.schema.get_field_index(column)
                now = (
                    now.append_column(column, made[column])
                    if place < 0
                    else now.set_column(place, column, made[column])
                )
            history.append(now)
        elif len(now.column_names) > 1:
            gone = draw(st.sampled_from(now.column_names))
            client.drop_columns(name, [gone])
            history.append(now.drop_columns([gone]))
    for number, expected in enumerate(history):
        found = client.dataset(name, number + 1)
        assert found.schema.names == expected.column_names
        assert found.table().to_pylist() == expected.to_pylist()
        picks = draw(st.lists(st.integers(0, expected.num_rows - 1), min_size=1, max_size=9))
        batch = found.take(picks)
        taken = expected.take(pa.array(picks))
        assert {key: list(values) for key, values in batch.items()} == taken.to_pydict()
        assert found.verify().damaged == {}
    client.delete_dataset(name, now=True)


def _values(draw, columns, num_rows):
    seed = draw(st.integers(0, 1000))
    values = np.random.default_rng(seed).integers(0, 1000, num_rows)
    return pa.table(
        {
            name: pa.array(values) if kind == pa.int64() else pa.array([f"t{n}" for n in values])
            for name, kind in columns.items()
        }
    )


KILLED = """
import os, signal, sys
import numpy as np, pyarrow as pa, forebay
client = forebay.connect(sys.argv[1])
writer = client.write_columns(sys.argv[2], {"z": "int64"})
writer.write_table(pa.table({"z": np.arange(int(sys.argv[3]))}))
writer._seal_all()
print("sealed", flush=True)
signal.pause()
"""


def test_a_writer_that_is_killed_leaves_nothing(client, daemon, made):
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(
        [*command, str(daemon.data), made.name, str(ROWS)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "sealed\n"
        process.send_signal(signal.SIGKILL)
    assert client.dataset(made.name).version == 1
    made.add_columns(lambda rows: {"z": rows["x"]}, columns=["x"])
    assert client.dataset(made.name).take([9])["z"].tolist() == [9]


def test_whoever_plans_rows_of_added_columns_alone_reads_nothing_else(client, numbered):
    """The other columns' shards are neither planned nor opened."""
    name = f"{numbered.name}-{os.urandom(4).hex()}"
    with client.create_dataset(name, {"n": "int64"}, **SMALL) as writer:
        writer.write_table(pa.table({"n": np.arange(NUM_SAMPLES)}))
    client.dataset(name).add_columns(lambda rows: {"m": rows["n"]})
    found = client.dataset(name)
    own = {shard.blob for shard in found.manifest.layers[0].shards}
    opened = []
    transfer = type(client.transfer)
    original = transfer.open
    try:
        transfer.open = lambda self, ids, context: (
            opened.extend(ids) or original(self, ids, context)
        )
        with forebay.DataLoader(found, batch_size=64, columns=["m"]) as loader:
            assert sum(len(batch["m"]) for batch in loader) == NUM_SAMPLES
        with found.plan(range(NUM_SAMPLES), columns=["m"]) as plan:
            plan.advance(NUM_SAMPLES)
    finally:
        transfer.open = original
    assert set(opened) <= own


def test_filters_and_buckets_look_at_every_row(client, name):
    """However the shards of the columns that they name are cut."""
    with client.create_dataset(name, {"x": "int64"}, shard_bytes=1 << 16) as writer:
        writer.write_table(pa.table({"x": range(ROWS)}))
    client.dataset(name).define_splits({"train": 0.5, "test": 0.5}, seed=2)
    with client.write_columns(name, {"label": "int64"}, **SMALL) as writer:
        writer.write_table(pa.table({"label": [n % 10 for n in range(ROWS)]}))
    found = client.dataset(name)
    assert found.define_selection("ones", filter=pc.field("label") == 1) == ROWS // 10
    assert (
        found.define_selection("last", filter=pc.field("label") * 0 + pc.field("x") >= 2990) == 10
    )
    assert found.define_buckets("label", [5]) == {"bucket0": ROWS // 2, "bucket1": ROWS // 2}
    ones = client.dataset(name, split="ones").take(range(ROWS // 10), ["x"])["x"]
    assert ones.tolist() == list(range(1, ROWS, 10))
    train = client.dataset(name, split="train")
    rows = train.take(range(ROWS // 2), ["x"])["x"]
    few = train.define_selection("train-ones", filter=pc.field("label") == 1)
    assert few == int((rows % 10 == 1).sum())


def test_a_filter_names_its_columns(client, made):
    with pytest.raises(forebay.InvalidRequest, match="by number"):
        made.define_selection("second", filter=pc.field(1) >= 50)
    assert made.define_selection("odd", filter=pc.field("text") != "FieldPath(1)") == ROWS


def test_whatever_names_added_columns_alone_reads_nothing_else(client, made):
    """Not a byte of the others' shards: they may be far away."""
    made.add_columns(lambda rows: {"m": rows["x"]}, columns=["x"])
    found = client.dataset(made.name)
    own = {shard.blob for shard in found.manifest.layers[0].shards}
    transfer, opened = type(client.transfer), []
    original = transfer.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            transfer,
            "open",
            lambda self, ids, context="": opened.extend(ids) or original(self, ids, context),
        )
        assert found.define_selection("few", filter=pc.field("m") < 3) == 3
        assert found.define_buckets("m", [10], prefix="by") == {"by0": 10, "by1": ROWS - 10}
        assert sum(len(batch) for batch in found.iter_batches(["m"])) == ROWS
    chosen = {
        s.blob for one in ("few", "by0", "by1") for s in selection_of(client, made, one).shards
    }
    assert set(opened) <= own | chosen


def selection_of(client, made, split):
    return client.dataset(made.name, split=split).selection


def test_equal_rows_have_equal_splits_whenever_they_are_defined(client, made):
    """What is held out of one version is in no training split of another one of the same rows."""
    client.drop_columns(made.name, ["y"])
    made.define_splits({"train": 0.8, "test": 0.2}, seed=7)
    client.dataset(made.name, 2).define_splits({"train": 0.8, "test": 0.2}, seed=7)
    client.dataset(made.name, 2).define_folds(4, seed=2)
    client.drop_columns(made.name, ["text"])
    made.define_folds(4, seed=2)
    both = [client.dataset(made.name, v, split="test").take(range(600), ["x"])["x"] for v in (1, 3)]
    assert np.array_equal(*both)
    both = [client.dataset(made.name, v, split="fold2-test").take(range(750))["x"] for v in (1, 3)]
    assert np.array_equal(*both)


def test_a_column_keeps_its_type_unless_another_one_is_given(client, name):
    with client.create_dataset(name, {"a": "int8", "t": "string", "b": "float32"}) as writer:
        writer.write_table(
            pa.table(
                {
                    "a": pa.array([1, 2], pa.int8()),
                    "t": ["x", "y"],
                    "b": pa.array([1, 2], pa.float32()),
                }
            )
        )
    client.dataset(name).add_columns(
        lambda rows: {"a": [3, 4], "b": np.float32([5, 6])}, replace=True
    )
    with client.write_columns(name, replace=True) as writer:
        writer.write(t="z", a=5)
        writer.write(t="w", a=6)
    found = client.dataset(name)
    assert [found.schema[one].text for one in ("a", "t", "b")] == ["int8", "string", "float32"]
    with pytest.raises(forebay.SchemaMismatch, match=r"are not int8 .*add_columns\(schema="):
        found.add_columns(lambda rows: {"a": [300, 4]}, replace=True)
    found.add_columns(lambda rows: {"a": [300, 4]}, {"a": "int64"}, replace=True)
    assert client.dataset(name).take([0])["a"].tolist() == [300]


def test_what_cannot_be_asked_for_is_said(client, made, name):
    assert client.dataset(made.name, client.drop_columns(made.name, "text")).version == 2
    for wrong, message in ((0, "batch_rows=0"), (-1, "batch_rows=-1")):
        with pytest.raises(forebay.InvalidRequest, match=message):
            made.add_columns(lambda rows: {}, batch_rows=wrong)
    with pytest.raises(forebay.SchemaMismatch, match=r"'u': the function gave no values"):
        client.dataset(made.name).add_columns(lambda rows: {"u": 5})
    made.define_splits({"a": 0.5, "b": 0.5})
    with pytest.raises(forebay.InvalidRequest, match="a value for every row of a version"):
        client.dataset(made.name, split="a").add_columns(lambda rows: {})
    other = f"{made.name}-empty"
    with client.create_dataset(other, {"x": "int8"}):
        pass
    with pytest.raises(forebay.InvalidRequest, match="no rows to tell types by"):
        client.dataset(other).add_columns(lambda rows: {})
    client.dataset(other).add_columns(lambda rows: {}, {"y": "string"})
    assert client.dataset(other).table().column_names == ["x", "y"]


def test_a_zarr_store_has_no_columns_to_change(client, name):
    with client.create_dataset(
        name, {"key": "string", "value": "binary"}, metadata={"zarr": 3}
    ) as writer:
        writer.write(key="zarr.json", value=b"{}")
    for change in (
        lambda: client.write_columns(name),
        lambda: client.drop_columns(name, ["value"]),
        lambda: client.write_session(name, columns=True),
    ):
        with pytest.raises(forebay.InvalidRequest, match="is a zarr store"):
            change()
