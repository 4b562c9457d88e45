"""Wave after wave of workers of a forkserver that has torch loaded, beside a busy client and a
loader: run as a program, by test_stream.py.

    python many_workers.py DATA_FOLDER DATASET NUM_WORKERS NUM_WAVES

prints how many workers read, all in all, what they had to.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import threading
import warnings

import torch.utils.data

import forebay

OPTIONS = {"global_batch_size": 4, "shuffle": "full", "seed": 5, "columns": ["number"]}


def main() -> None:
    warnings.simplefilter("ignore")  # of more workers than cores
    multiprocessing.set_forkserver_preload(["torch", "forebay.dataset.stream"])
    folder, name, num_workers, num_waves = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    stop = threading.Event()
    client = forebay.connect(folder)
    dataset = client.dataset(name)
    calls = []

    def keep_calling() -> None:
        while not stop.is_set():
            calls.append(client.status().num_datasets)

    def keep_loading() -> None:
        with forebay.DataLoader(dataset, **OPTIONS) as loader:
            for epoch in itertools.count():
                loader.set_epoch(epoch)
                for _ in loader:
                    if stop.is_set():
                        return

    busy = [threading.Thread(target=work) for work in (keep_calling, keep_loading)]
    for thread in busy:
        thread.start()
    try:
        read = sum(read_once(dataset, num_workers) for _ in range(num_waves))
    finally:
        stop.set()
        for thread in busy:
            thread.join(60)
    assert not any(thread.is_alive() for thread in busy)
    assert len(calls) > num_waves
    sys.stdout.write(f"{read}\n")


def read_once(dataset: forebay.Dataset, num_workers: int) -> int:
    """An epoch, by so many workers."""
    with forebay.DataLoader(dataset, **OPTIONS) as alone:
        expected = [batch["number"].tolist() for batch in alone]
    assert len(expected) >= num_workers, "each is to read something"
    loader = torch.utils.data.DataLoader(
        forebay.StreamingDataset(dataset, **OPTIONS),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="forkserver",
        timeout=120,
    )
    assert [batch["number"].tolist() for batch in loader] == expected
    return num_workers


if __name__ == "__main__":
    main()
