"""A writer in a process of its own, to be killed: ``write_dataset.py ADDRESS``."""

import sys

import numpy as np

import forebay


def main(address: str) -> None:
    schema = {"row": "int64", "noise": forebay.Array("uint8", (1024,))}
    with (
        forebay.connect(address) as client,
        client.create_dataset(
            "killed", schema=schema, shard_bytes=128 * 1024, batch_bytes=32 * 1024
        ) as writer,
    ):
        for row in range(300):
            writer.write(row=row, noise=np.full(1024, row % 251, dtype=np.uint8))


if __name__ == "__main__":
    main(sys.argv[1])
