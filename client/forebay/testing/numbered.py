"""A dataset whose samples carry their number, so that repeats and gaps are seen at once."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from forebay.client import Client
from forebay.dataset.dataset import Dataset
from forebay.dataset.schema import Array
from forebay_wire.limits import KIB
from forebay_wire.order import Order, Shuffle

NUM_SAMPLES: Final = 211
"""A prime: no batch size and no number of ranks divides it by chance."""

SCHEMA: Final = {
    "number": "int64",
    "image": Array("uint8", (16, 32)),
    "half": Array("float16", (2,)),
    "even": "bool",
    "text": "string",
    "ragged": "list[int32]",
}


def numbered_sample(number: int) -> dict[str, Any]:
    """The sample with this *number*: every column follows from it."""
    return {
        "number": number,
        "image": np.full((16, 32), number % 256, np.uint8),
        "half": np.array([number, -number], np.float16),
        "even": number % 2 == 0,
        "text": f"sample {number}",
        "ragged": list(range(number % 4)),
    }


def write_numbered(client: Client, name: str, num_samples: int = NUM_SAMPLES) -> None:
    """Create dataset *name* of the samples 0 … *num_samples* - 1: small batches, several shards."""
    with client.create_dataset(
        name, schema=SCHEMA, shard_bytes=64 * KIB, batch_bytes=8 * KIB
    ) as writer:
        for number in range(num_samples):
            writer.write(**numbered_sample(number))


def expected_batches(
    dataset: Dataset,
    size: int,
    *,
    shuffle: Shuffle = "full",
    seed: int = 0,
    epoch: int = 0,
    position: int = 0,
) -> list[list[int]]:
    """The rows of each global batch of *size* from *position* on, by definition: no loader runs."""
    order = Order(len(dataset), shuffle, seed, epoch, dataset.identity)
    rows = dataset.rows_at(order.between(position, len(dataset))).tolist()
    return [rows[start : start + size] for start in range(0, len(rows), size)]
