"""The map-style dataset: rows in any order, splits, pickles, and what torch's own loader sees."""

import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch.utils.data

import forebay
from forebay.testing.numbered import NUM_SAMPLES, numbered_sample

# Workers are forked beside threads on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def assert_is_sample(found, number):
    for column, value in numbered_sample(number).items():
        assert np.array_equal(found[column], value), (column, number)


def test_every_sample_is_where_it_was_written(numbered):
    assert len(numbered) == NUM_SAMPLES
    for number in (0, 1, NUM_SAMPLES // 2, NUM_SAMPLES - 1):
        assert_is_sample(numbered[number], number)
    assert_is_sample(numbered[-1], NUM_SAMPLES - 1)


def test_any_rows_in_any_order_come_as_one_batch(numbered):
    picks = np.random.default_rng(0).integers(0, NUM_SAMPLES, 500)
    batch = numbered.take(picks)
    for position, number in enumerate(picks.tolist()):
        assert_is_sample({name: values[position] for name, values in batch.items()}, number)


def test_only_the_wanted_columns_are_read(numbered):
    assert list(numbered.take([1, 2], ["text", "number"])) == ["text", "number"]
    with pytest.raises(forebay.InvalidRequest, match="no column 'nope'"):
        numbered.take([1], ["nope"])


@pytest.mark.parametrize("index", [NUM_SAMPLES, -NUM_SAMPLES - 1])
def test_rows_outside_are_an_index_error(numbered, index):
    with pytest.raises(IndexError):
        numbered[index]


def test_iteration_ends(train):
    assert sum(1 for _ in train) == len(train)


def test_batches_belong_to_the_caller(numbered):
    batch = numbered.take(range(10))
    batch["image"][:] = 0
    batch["number"] += 1000
    assert_is_sample(numbered[5], 5)


def test_a_dataset_says_what_it_is(numbered, train):
    assert "numbered v1: 211 rows" in repr(numbered)
    assert "split train: 169 rows" in repr(train)
    assert (train.name, train.version, train.split, numbered.split) == (
        "numbered",
        1,
        "train",
        None,
    )


# Splits.


def test_splits_share_out_every_row_once(client, numbered, train):
    test = client.dataset("numbered", split="test")
    numbers = [split.take(range(len(split)))["number"] for split in (train, test)]
    assert (len(train), len(test)) == (169, 42)
    assert sorted(np.concatenate(numbers).tolist()) == list(range(NUM_SAMPLES))
    assert sorted(numbers[0].tolist()) != numbers[0].tolist()


def test_defining_the_same_splits_again_changes_nothing(numbered, train):
    numbered.define_splits({"test": 0.2, "train": 0.8}, seed=3)
    with pytest.raises(forebay.AlreadyExists):
        numbered.define_splits({"train": 0.7, "test": 0.3}, seed=3)
    assert len(train) == 169


def test_folds_test_every_row_once_and_train_on_the_others(client, numbered):
    names = numbered.define_folds(3, seed=5)
    assert names == numbered.define_folds(3, seed=5)
    tested = []
    for train, test in names:
        parts = [client.dataset("numbered", split=part) for part in (train, test)]
        numbers = [part.take(range(len(part)), ["number"])["number"].tolist() for part in parts]
        assert sorted(numbers[0] + numbers[1]) == list(range(NUM_SAMPLES))
        tested += numbers[1]
    assert sorted(tested) == list(range(NUM_SAMPLES))
    assert tested != list(range(NUM_SAMPLES))
    differing = r"fold0-train already: 140 rows by .*seed 5; asked for: 140 rows by .*seed 6"
    with pytest.raises(forebay.AlreadyExists, match=differing):
        numbered.define_folds(3, seed=6)
    with pytest.raises(forebay.InvalidRequest, match="at least 2"):
        numbered.define_folds(1)
    numbered.define_folds(2, seed=6, prefix="half")


def test_a_split_stays_what_it_was_when_the_dataset_grows(client, name):
    for writer in (client.create_dataset(name), None):
        with writer or client.append_dataset(name) as open_writer:
            for number in range(50):
                open_writer.write(number=number)
        if writer is not None:
            client.dataset(name).define_splits({"train": 0.5}, seed=1)
            before = client.dataset(name, split="train").table()
    after = client.dataset(name, split="train")
    assert (after.version, client.dataset(name).version) == (1, 2)
    assert after.table().equals(before)


def test_an_unknown_split_or_version_names_those_that_exist(client, numbered):
    with pytest.raises(forebay.NotFound, match=r"no split 'valid'.*train"):
        client.dataset("numbered", split="valid")
    with pytest.raises(forebay.NotFound, match="no version 9"):
        client.dataset("numbered", version=9)
    with pytest.raises(forebay.NotFound, match="nothing-here"):
        client.dataset("nothing-here")


def test_a_table_of_a_split_is_in_its_order(train):
    table = train.table()
    assert isinstance(table, pa.Table)
    assert table["number"].to_pylist() == train.take(range(len(train)))["number"].tolist()
    with pytest.raises(forebay.InvalidRequest, match=r"use table\(\)"):
        next(train.iter_batches())


# Other processes.


def test_a_pickle_is_small_reads_by_itself_and_has_no_client(numbered, train):
    copy = pickle.loads(pickle.dumps(train))  # noqa: S301 - our own
    assert len(pickle.dumps(train)) < 6000
    assert copy.take([3])["number"].tolist() == train.take([3])["number"].tolist()
    with pytest.raises(forebay.InvalidRequest, match="pickle"):
        copy.define_splits({"a": 0.5})


READER = """
import pickle, sys
dataset = pickle.load(sys.stdin.buffer)
print(dataset.take(range(len(dataset)))["number"].sum())
assert not any(name.startswith(("grpc", "torch")) for name in sys.modules), "heavy imports"
"""


def test_another_process_reads_without_grpc_and_torch(numbered):
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=pickle.dumps(numbered),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) == sum(range(NUM_SAMPLES))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_torchs_own_loader_reads_it_in_its_own_order(numbered, num_workers):
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(numbered, range(0, NUM_SAMPLES, 3)),
        batch_size=10,
        num_workers=num_workers,
        collate_fn=lambda samples: [sample["number"] for sample in samples],
        multiprocessing_context="fork" if num_workers else None,
    )
    assert [number for batch in loader for number in batch] == list(range(0, NUM_SAMPLES, 3))


def test_torchs_default_collation_works(numbered):
    wanted = ["number", "image", "half", "even", "text"]
    loader = torch.utils.data.DataLoader(
        [{name: numbered[i][name] for name in wanted} for i in range(4)], batch_size=4
    )
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 16, 32)
    assert batch["number"].tolist() == [0, 1, 2, 3]


def test_waiting_for_the_object_tier(numbered):
    numbered.wait("remote", timeout=60)
    with pytest.raises(forebay.InvalidRequest):
        numbered.wait("for ever")


@pytest.mark.parametrize("rows", [[-1], [NUM_SAMPLES], [0, -(10**9)], [2**62]])
def test_rows_that_the_version_does_not_have_are_refused_cold_and_warm(numbered, rows):
    for _ in range(2):
        with pytest.raises(IndexError, match="are outside"):
            numbered.read(np.array(rows), ["number"])
        numbered.take(range(NUM_SAMPLES))


@pytest.mark.parametrize("kind", ["int8", "int16", "uint16", "int32", "uint64"])
def test_row_numbers_of_any_width(numbered, kind):
    rows = np.arange(0, 120, 3).astype(kind)
    for _ in range(2):
        found = numbered.read(rows, ["number", "image"])
        assert found["number"].tolist() == rows.tolist()
        assert found["image"][:, 3, 3].tolist() == [row % 256 for row in rows.tolist()]
    with pytest.raises(forebay.InvalidRequest, match="whole numbers"):
        numbered.read(rows.astype("float32"), ["number"])


@pytest.mark.parametrize("index", ["1", 1.9, slice(0, 2)])
def test_what_is_no_index_is_a_type_error(numbered, index):
    with pytest.raises(TypeError):
        numbered[index]
