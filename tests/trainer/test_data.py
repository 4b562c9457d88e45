"""The loaders that a configuration builds, of a dataset of a real daemon."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_trainer.data import DataConfig
from forebay_trainer.parallel import ParallelConfig

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
    data = config.build(client, ParallelConfig(backend="gloo").build(), SEED)
    try:
        found = [data.prepare(batch).ids for batch in data.train_loader]
        assert len(found) == data.steps_per_epoch
    finally:
        data.close()
    own = forebay.DataLoader(dataset, global_batch_size=8, seed=SEED, include_ids=True, **order)
    with own:
        wanted = [batch["_ids"].tolist() for batch in own]
    assert found == wanted
    assert sorted(sum(found, [])) == list(range(NUM_SAMPLES))  # noqa: RUF017 - a few batches
