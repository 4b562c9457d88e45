"""The loaders that a configuration builds, of a dataset of a real daemon."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_trainer.data import DataConfig, real_ids
from forebay_trainer.parallel import ParallelConfig
from forebay_trainer.recipe import load
from forebay_wire.errors import InvalidRequest

NUM_SAMPLES = 200
SEED = 3


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[forebay.Client]:
    """Of a daemon with a dataset of several shards."""
    images = np.zeros((NUM_SAMPLES, 32, 32), dtype=np.uint8)
    table = pa.table(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
            "label": np.arange(NUM_SAMPLES) % 3,
        }
    )
    with (
        DaemonProcess(tmp_path_factory.mktemp("trainer") / "data") as process,
        forebay.connect(process.data) as connected,
    ):
        with connected.create_dataset("tiny", shard_bytes=65536, batch_bytes=8192) as writer:
            writer.write_table(table)
        yield connected


def opened(client, config):
    task = load("mnist_cnn", ["model.image_shape=[32,32]"]).build({})
    parallel = ParallelConfig(backend="gloo").build()
    return config.build(client, parallel, task, seed=SEED, run="r")


@pytest.mark.parametrize(
    "order",
    [
        {"shuffle": "none"},
        {"shuffle": "full"},
        {"shuffle": "block"},
        {"shuffle": "block", "window_blocks": 2, "block_rows": 7},
    ],
)
def test_samples_come_in_the_order_that_is_configured(client, order):
    dataset = client.dataset("tiny")
    assert len(dataset.manifest.shards) > 1
    config = DataConfig(
        dataset="tiny", train_split=None, test_split=None, global_batch_size=8, **order
    )
    data = opened(client, config)
    try:
        found = [list(real_ids(batch)) for epoch in data.epochs(1) for batch in epoch]
        assert len(found) == data.steps_per_epoch
    finally:
        data.close()
    own = forebay.DataLoader(dataset, global_batch_size=8, seed=SEED, include_ids=True, **order)
    with own:
        wanted = [batch["_ids"].tolist() for batch in own]
    assert found == wanted
    assert sorted(sum(found, [])) == list(range(NUM_SAMPLES))  # noqa: RUF017 - a few batches


@pytest.mark.parametrize(("last_batch", "steps"), [("keep", 7), ("pad", 7), ("drop", 6)])
def test_the_short_last_batch_counts_as_the_loader_counts_it(client, last_batch, steps):
    config = DataConfig(
        dataset="tiny",
        train_split=None,
        test_split=None,
        global_batch_size=32,
        last_batch=last_batch,
    )
    with closing(opened(client, config)) as data:
        assert data.steps_per_epoch == steps
        ends = [data.is_epoch_over for epoch in data.epochs(1) for _ in epoch]
        assert ends == [False] * (steps - 1) + [True]


def test_folds_share_out_the_training_data(client):
    tested = []
    for fold in range(3):
        config = DataConfig(
            dataset="tiny", train_split=None, num_folds=3, fold=fold, global_batch_size=50
        )
        with closing(opened(client, config)) as data:
            trained = [each for epoch in data.epochs(1) for b in epoch for each in real_ids(b)]
            held_out = [each for batch in data.test_batches() for each in real_ids(batch)]
        assert sorted(trained + held_out) == list(range(NUM_SAMPLES))
        tested += held_out
    assert sorted(tested) == list(range(NUM_SAMPLES))


def test_micro_batches_have_at_most_the_rows_that_are_set(client):
    config = DataConfig(
        dataset="tiny",
        train_split=None,
        test_split=None,
        global_batch_size=64,
        micro_batch_size=20,
        shuffle="none",
    )
    with closing(opened(client, config)) as data:
        parts = [data.parts(batch, 0, 0) for epoch in data.epochs(1) for batch in epoch]
    assert {len(each) for each in parts} == {data.num_parts} == {4}
    assert max(len(part["id"]) for each in parts for part in each) <= 20
    rows = [each for step in parts for part in step for each in real_ids(part)]
    assert rows == list(range(NUM_SAMPLES))


def test_rows_that_are_appended_are_a_new_version(client):
    with client.create_dataset("grows") as writer:
        writer.write_table(pa.table({"x": [1, 2, 3]}))
    config = DataConfig(dataset="grows", train_split=None, test_split=None, follow=True)
    with closing(opened(client, config)) as data:
        lengths = []
        for epoch in data.epochs(3):
            lengths.append(sum(len(real_ids(batch)) for batch in epoch))
            data.append({"x": [4, 5]})
    assert lengths == [3, 5, 7]


def test_rows_that_renew_the_data_are_the_training_split_alone(client):
    with client.create_dataset("renewed") as writer:
        writer.write_table(pa.table({"x": [1, 2, 3, 4]}))
    first = client.dataset("renewed")
    first.define_selection("train", rows=[0, 1, 3])
    first.define_selection("test", rows=[2])
    config = DataConfig(dataset="renewed", follow=True, shuffle="none", global_batch_size=2)
    with closing(opened(client, config)) as data:
        seen = []
        for epoch in data.epochs(3):
            number = epoch.number
            data.renew(lambda: {"x": [10 * number, 10 * number + 1, 10 * number + 2]})  # noqa: B023
            for batch in epoch:
                seen.append((number, batch["x"].tolist()))
                data.renew(lambda: {"x": [-1]})  # an epoch that has begun stays as it is
    assert seen == [(0, [0, 1]), (0, [2]), (1, [10, 11]), (1, [12]), (2, [20, 21]), (2, [22])]
    assert client.dataset("renewed", split="test").table()["x"].to_pylist() == [3]
    assert len(client.dataset("renewed")) == 4 + 3 * 3


def test_rows_that_an_attempt_made_before_it_was_killed_are_not_made_again(client):
    with client.create_dataset("made") as writer:
        writer.write_table(pa.table({"x": [1, 2, 3]}))
    first = client.dataset("made")
    first.define_selection("train", rows=[0, 1])
    first.define_selection("test", rows=[2])
    config = DataConfig(dataset="made", follow=True, shuffle="none", global_batch_size=2)

    def train(num_epochs, made):
        with closing(opened(client, config)) as data:
            for epoch in data.epochs(num_epochs):
                data.renew(lambda: made.append(epoch.number) or {"x": [10 * epoch.number]})  # noqa: B023
                yield from (batch["x"].tolist() for batch in epoch)

    made = []
    assert list(train(2, made)) == [[0], [10]]
    version = client.dataset("made").version
    assert list(train(3, made)) == [[0], [10], [20]]
    assert made == [0, 1, 2]
    assert client.dataset("made").version == version + 1


def test_data_that_do_not_follow_are_not_renewed(client):
    config = DataConfig(dataset="tiny", train_split=None, test_split=None)
    with closing(opened(client, config)) as data, pytest.raises(InvalidRequest, match="follow"):
        data.renew(dict)
