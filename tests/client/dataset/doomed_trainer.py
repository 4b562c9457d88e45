"""A trainer that does a little of everything and is then killed: run as a program, by
test_left_behind.py.

    python doomed_trainer.py DAEMON_ADDRESS DATASET

says "ready" once everything runs.
"""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Any

import torch.utils.data

import forebay

ROWS_WRITTEN = 20_000
"""More than one shard."""


def main() -> None:
    warnings.simplefilter("ignore")
    address, name = sys.argv[1:]
    client = forebay.connect(address)
    dataset = client.dataset(name)

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        client.datasets()  # in a worker: by a process of its own
        return batch

    ready = threading.Barrier(4)

    def read(loader: Any) -> None:
        started = False
        while True:
            for _ in loader:
                if not started:
                    ready.wait()
                    started = True

    def write() -> None:
        with client.create_dataset(
            "half", schema={"x": "int64"}, shard_bytes=64 * 1024, batch_bytes=8 * 1024
        ) as writer:
            for number in range(ROWS_WRITTEN):
                writer.write(x=number)
            ready.wait()
            threading.Event().wait()

    def workers(transform: Any) -> Any:
        streaming = forebay.StreamingDataset(dataset, global_batch_size=8, transform=transform)
        return torch.utils.data.DataLoader(
            streaming, batch_size=None, num_workers=2, multiprocessing_context="fork"
        )

    threads = [
        threading.Thread(target=read, args=(forebay.DataLoader(dataset, global_batch_size=8),)),
        threading.Thread(target=read, args=(workers(call),)),
        threading.Thread(target=write),
    ]
    for thread in threads:
        thread.start()
    ready.wait()
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
