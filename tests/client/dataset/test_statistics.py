"""Statistics: exact, computed once, the same for everybody, of what is trained on."""

import datetime
import math
import pickle
import sqlite3
import threading
from contextlib import closing
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import forebay
from forebay import transforms
from forebay.dataset.moments import moments
from forebay_server.catalog import row_digests
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.manifest import KIND_STATISTICS

RNG = np.random.default_rng(3)
NUM_ROWS = 300
IMAGES = RNG.integers(0, 256, (NUM_ROWS, 4, 5, 3), dtype=np.uint8)
FLOATS = RNG.normal(1e6, 1, NUM_ROWS)

INTEGERS = hnp.integer_dtypes(endianness="=") | hnp.unsigned_integer_dtypes(endianness="=")


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(INTEGERS, st.tuples(st.integers(1, 3), st.integers(1, 40))),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_whole_numbers_are_summed_exactly_however_they_come(values, cuts):
    taken = moments(values.dtype, len(values))
    for part in np.split(values, sorted(min(cut, values.shape[1]) for cut in cuts), axis=1):
        taken.add(part)
    for found, row in zip(taken.figures(), values.tolist(), strict=True):
        mean = Fraction(sum(row), len(row))
        variance = sum((one - mean) ** 2 for one in row) / len(row)
        assert (found.num_values, found.min, found.max) == (len(row), min(row), max(row))
        assert (found.mean, found.std) == (float(mean), math.sqrt(variance))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5000), st.lists(st.integers(0, 5000), max_size=4))
def test_floats_in_pieces_are_those_of_the_whole(seed, count, cuts):
    generator = np.random.default_rng(seed)
    values = generator.normal(1e6, 1e-3, (2, count))
    values[generator.random((2, count)) < 0.2] = np.nan
    taken = moments(values.dtype, 2)
    for part in np.split(values, sorted(min(cut, count) for cut in cuts), axis=1):
        taken.add(part)
    for found, row in zip(taken.figures(), values, strict=True):
        there = row[~np.isnan(row)]
        assert (found.num_values, found.num_nan) == (len(there), count - len(there))
        if len(there):
            assert (found.min, found.max) == (there.min(), there.max())
            assert found.mean == pytest.approx(there.mean(), rel=1e-14)
            assert found.std == pytest.approx(there.std(), rel=1e-6, abs=1e-12)
        else:
            assert found.mean is None


@pytest.fixture(scope="module")
def plain(daemon):
    with forebay.connect(daemon.data) as connected:
        yield connected


@pytest.fixture
def made(plain, name):
    """A dataset whose columns are of many kinds, over some record batches."""
    schema = {
        "image": forebay.Array("uint8", IMAGES.shape[1:]),
        "x": "float64",
        "big": "uint64",
        "text": "string",
        "date": pa.date32(),
    }
    with plain.create_dataset(name, schema, batch_bytes=2000) as writer:
        for row in range(NUM_ROWS):
            x = [FLOATS[row], np.nan, np.inf][row % 3 if row < 6 else 0]
            big = 2**64 - 1 - row
            text, date = "ab" * (row % 4), datetime.date(2026, 1, 1)
            writer.write(image=IMAGES[row], x=x, big=big, text=text, date=date)
    dataset = plain.dataset(name)
    dataset.define_splits({"train": 0.5, "test": 0.5}, seed=1)
    return dataset


def times_read(dataset, *arguments, **options):
    """How many record batches a call looked at, and what it found."""
    calls = []
    found = dataset.statistics(*arguments, progress=lambda *done: calls.append(done), **options)
    return len(calls), found


def test_they_are_computed_once_for_everybody(daemon, made):
    first, found = times_read(made)
    assert first > 1
    with forebay.connect(daemon.data) as other:
        for dataset in (made, other.dataset(made.name)):
            assert times_read(dataset) == (0, found)
            assert times_read(dataset, ["text"])[0] == 0
    assert found["big"].min == 2**64 - NUM_ROWS
    assert found["big"].mean == float(2**64 - 1 - Fraction(NUM_ROWS - 1, 2))
    assert (found["x"].num_nan, found["x"].max, found["x"].num_nulls) == (2, math.inf, 0)
    assert (found["x"].mean, found["x"].std) == (None, None)
    with pytest.raises(forebay.InvalidRequest, match="are infinite"):
        transforms.normalize("x", made)
    assert (found["text"].num_nulls, found["text"].max) == (0, 6)
    assert (found["date"].of, found["date"].num_rows) == ("nothing", NUM_ROWS)


def test_only_what_is_missing_is_computed(made):
    assert times_read(made, ["text"])[0] > 0
    assert times_read(made, ["text"])[0] == 0
    more, found = times_read(made, ["text"], along={"image": -1})
    assert more > 0
    assert times_read(made, ["text", "image"], along={"image": 2}) == (0, found)
    (red, *_) = found["image"].channels
    assert red.mean == float(Fraction(int(IMAGES[..., 0].sum(dtype=int)), IMAGES[..., 0].size))
    assert red.std == pytest.approx(IMAGES[..., 0].std(), rel=1e-12)
    of_line = times_read(made, [], along={"image": 0})[1]["image"].channels[3]
    assert (of_line.num_values, of_line.mean) == (300 * 15, IMAGES[:, 3].mean(dtype=float))
    with pytest.raises(forebay.InvalidRequest, match="no dimension"):
        made.statistics(along={"image": 3})
    with pytest.raises(forebay.InvalidRequest, match="no dimension"):
        made.statistics(along={"x": 0})


def test_two_at_once_get_the_same(daemon, made):
    start, found = threading.Barrier(3), []

    def ask():
        with forebay.connect(daemon.data) as client:
            dataset = client.dataset(made.name, split="train")
            start.wait(30)
            found.append(dataset.statistics(["image", "x", "text"]))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    kept = times_read(made.control.dataset(made.name, split="train"), ["image", "text"])
    assert kept[0] == 0
    assert len(found) == 3
    assert all(one["image"] == found[0]["image"] == kept[1]["image"] for one in found)


def test_a_copy_by_pickle_computes_the_same(made):
    copy = pickle.loads(pickle.dumps(made))  # noqa: S301
    reads, found = times_read(copy, ["image"])
    assert reads > 0
    assert times_read(made, ["image"]) == (reads, found)  # the copy kept nothing
    with pytest.raises(forebay.InvalidRequest, match="pickle"):
        copy.recompute_statistics()


def test_they_survive_a_restart_and_damage_is_found(tmp_path, caplog):
    data = tmp_path / "data"
    with DaemonProcess(data) as process:
        with forebay.connect(data) as client:
            with client.create_dataset("d", {"x": "int64"}) as writer:
                for row in range(100):
                    writer.write(x=row)
            expected = client.dataset("d").statistics()
        process.restart().wait_ready()
        with forebay.connect(data) as client:
            assert times_read(client.dataset("d")) == (0, expected)
        process.terminate()
        with closing(sqlite3.connect(data / "catalog.sqlite")) as catalog, catalog:
            row_digests.register(catalog)
            query = "SELECT data FROM manifests WHERE kind = ?"
            ((kept,),) = catalog.execute(query, (KIND_STATISTICS,))
            changed = catalog.execute(
                "UPDATE manifests SET data = ? WHERE kind = ?",
                (kept.replace(b"49.5", b"39.5"), KIND_STATISTICS),
            )
            assert changed.rowcount == 1
        process.start().wait_ready()
        with forebay.connect(data) as client:
            reads, found = times_read(client.dataset("d"))
            assert (reads > 0, found) == (True, expected)
            assert "computed anew" in caplog.text
            assert times_read(client.dataset("d")) == (0, expected)
            assert client.dataset("d").recompute_statistics() == expected
            assert client.delete_dataset("d")
            with client.create_dataset("d", {"x": "int64"}) as writer:
                writer.write(x=7)
            assert client.dataset("d").statistics()["x"].mean == 7


# In a loader.


def loader_of(dataset, *steps, **options):
    given = {"global_batch_size": 50, "transform": list(steps), "columns": ["image"], **options}
    return forebay.DataLoader(dataset, num_threads=0, include_ids=True, **given)


def test_a_loader_takes_those_of_the_training_split(made):
    train = made.control.dataset(made.name, split="train")
    rows = train.rows_at(np.arange(len(train)))
    for split in ("train", "test", None):
        step = transforms.standardize("image", dim=-1)
        with loader_of(made.control.dataset(made.name, split=split), step) as loader:
            batch = next(iter(loader))
        assert step.source == f"{made.name} v1 split train"
        pixels = IMAGES[rows].reshape(-1, 3)
        expected = (IMAGES[batch["_ids"].numpy()] - pixels.mean(0)) / pixels.std(0)
        assert np.abs(batch["image"].numpy() - expected).max() < 1e-4
    copy = pickle.loads(pickle.dumps(step))  # noqa: S301
    assert torch.equal(
        copy({"image": torch.ones(1, 3)})["image"], step({"image": torch.ones(1, 3)})["image"]
    )


def test_without_a_training_split_a_test_split_is_refused(plain, made, name):
    with plain.create_dataset(name + "-b", {"x": "float32"}) as writer:
        for row in range(20):
            writer.write(x=row)
    other = plain.dataset(name + "-b")
    other.define_folds(2)
    other.define_selection("first", rows=range(10))
    whole, fold = transforms.standardize("x"), transforms.normalize("x")
    forebay.DataLoader(other, batch_size=2, transform=whole)
    assert whole.source == f"{other.name} v1"
    test = plain.dataset(other.name, split="fold1-test")
    forebay.DataLoader(test, batch_size=2, transform=fold)
    assert fold.source == f"{other.name} v1 split fold1-train"
    first = plain.dataset(other.name, split="first")
    first.define_folds(2)
    nested = transforms.standardize("x")
    forebay.DataLoader(
        plain.dataset(other.name, split="first-fold0-test"), batch_size=2, transform=nested
    )
    assert nested.source == f"{other.name} v1 split first-fold0-train"
    with pytest.raises(forebay.InvalidRequest, match="no split 'train'"):
        forebay.DataLoader(first, batch_size=2, transform=transforms.standardize("x"))
    with pytest.raises(forebay.InvalidRequest, match="whose it shall have"):
        forebay.DataLoader(made, batch_size=2, transform=whole)
    given = transforms.standardize("x", other)
    forebay.DataLoader(made, batch_size=2, transform=given)
    assert given.source == f"{other.name} v1"
    mixture = forebay.Mixture({"a": other}, {"a": 1.0}, num_samples=10)
    with pytest.raises(forebay.InvalidRequest, match="whose statistics"):
        forebay.DataLoader(mixture, batch_size=2, transform=transforms.standardize("x"))


def test_workers_have_the_figures(made):
    step = transforms.normalize("image")
    stream = forebay.StreamingDataset(
        made, global_batch_size=100, transform=step, columns=["image"]
    )
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)
    found = torch.cat([batch["image"] for batch in loader])
    assert (found.shape[0], step.source) == (NUM_ROWS, f"{made.name} v1 split train")
    assert (found.min().item(), found.max().item()) == (0.0, 1.0)
