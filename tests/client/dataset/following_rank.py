"""One rank of a job whose loader follows a dataset: run as a program by test_following.py.

    python following_rank.py DATA_FOLDER DATASET SCRATCH_FOLDER WORKERS NUM_EPOCHS

Rank 0 says when it begins an epoch; the others begin theirs once something was appended since then.
Prints one line of JSON: of each epoch its version, number of steps and the samples that came.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.utils.data

import forebay

HANG_SECONDS = 120.0
OPTIONS: dict[str, Any] = {
    "global_batch_size": 8,
    "shuffle": "full",
    "seed": 5,
    "follow": "latest",
}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.01)


class Rank:
    def __init__(self, dataset: Any, scratch: Path, rank: int, num_workers: int) -> None:
        self.scratch, self.rank = scratch, rank
        self.saved = scratch / "state.json"
        if num_workers < 0:
            self.own = forebay.DataLoader(dataset, **OPTIONS)
            self.batches: Any = self.own
        else:
            self.own = forebay.StreamingDataset(dataset, **OPTIONS)
            self.batches = torch.utils.data.DataLoader(
                self.own,
                batch_size=None,
                num_workers=num_workers,
                multiprocessing_context="fork" if num_workers else None,
                persistent_workers=num_workers > 0,
            )

    def state(self, batch: Any) -> dict[str, Any]:
        if isinstance(self.own, forebay.DataLoader):
            return self.own.state_dict()
        return self.own.state_dict(after=batch)

    def epoch(self, number: int) -> Iterator[Any]:
        if self.rank or number:
            wait_for(self.scratch / f"appended {number if self.rank else number - 1}")
        batches = iter(self.batches)
        first = next(batches)
        if self.rank == 0:
            (self.scratch / f"begun {number}").touch()
        yield first
        yield from batches

    def read(self, number: int) -> dict[str, Any]:
        samples, steps, state = [], 0, {}
        for batch in self.epoch(number):
            samples += batch["number"].tolist()
            steps += 1
            state = self.state(batch)
            if steps == 3 and self.rank == 0:
                (self.scratch / f"state {number}.json").write_text(json.dumps(state))
        return {
            "epoch": number,
            "version": state["version"],
            "steps": steps,
            "samples": samples,
            "reads": self.own.report().reads,
        }


def main() -> None:
    folder, name, scratch, num_workers, num_epochs = sys.argv[1:]
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=HANG_SECONDS))
    with forebay.connect(folder) as client:
        if dist.get_rank() == 0:  # evaluates, and makes loaders that the others do not make
            forebay.DataLoader(client.dataset(name), **OPTIONS, columns=["number"]).close()
            # And some of the same kind, one of which it reads from.
            forebay.DataLoader(client.dataset(name), **OPTIONS).close()
            with forebay.DataLoader(client.dataset(name), **OPTIONS) as peek:
                assert peek.remaining_steps() == 3
        rank = Rank(client.dataset(name), Path(scratch), dist.get_rank(), int(num_workers))
        found = [rank.read(number) for number in range(int(num_epochs))]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    dist.barrier()  # the store of rank 0 lives until all are done
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)
