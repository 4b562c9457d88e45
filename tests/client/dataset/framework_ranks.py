"""One rank of a job inside Accelerate or Lightning: run as a program by test_frameworks.py.

    python framework_ranks.py SCENARIO DATASET_PICKLE SCRATCH_FOLDER

prints one line of JSON: what this rank read, scenario by scenario.
"""

from __future__ import annotations

import faulthandler
import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.utils.data

import forebay

HANG_SECONDS = 150.0
OPTIONS: dict[str, Any] = {
    "global_batch_size": 24,
    "shuffle": "full",
    "seed": 5,
    "columns": ["number"],
}


def numbers(batches: Any) -> list[list[int]]:
    return [batch["number"].tolist() for batch in batches]


def torch_loader(dataset: Any, num_workers: int = 0) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)


def refusal(prepare: Any) -> str:
    """What the first batch of a prepared loader is answered with."""
    try:
        next(iter(prepare()))
    except (forebay.InvalidRequest, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "it read"


def accelerate(dataset: Any, scratch: Path) -> dict[str, Any]:
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(cpu=True)
    found: dict[str, Any] = {"ranks": accelerator.num_processes}

    loader = forebay.DataLoader(dataset, **OPTIONS)
    found["is untouched"] = accelerator.prepare(loader) is loader
    accelerator.register_for_checkpointing(loader)
    batches = iter(loader)
    found["loader"] = numbers(next(batches) for _ in range(3))
    accelerator.save_state(str(scratch / "state"))
    accelerator.wait_for_everyone()  # what the first rank saves, the others load
    next(batches)
    accelerator.load_state(str(scratch / "state"))
    found["loader"] += numbers(loader)
    found["next epoch"] = numbers(loader)
    loader.close()

    streaming = forebay.StreamingDataset(dataset, **OPTIONS)
    found["torch"] = numbers(torch_loader(streaming, 1))

    def prepared(**configuration: Any) -> Any:
        other = forebay.StreamingDataset(dataset, **OPTIONS)
        accelerator.dataloader_config = DataLoaderConfiguration(**configuration)
        return accelerator.prepare(torch_loader(other))

    for configuration in (
        {},
        {"dispatch_batches": True},
        {"dispatch_batches": False},
        {"dispatch_batches": False, "even_batches": False},
        {"split_batches": True},
        {"use_stateful_dataloader": True},
    ):
        found[f"prepared {configuration}"] = refusal(lambda made=configuration: prepared(**made))

    accelerator.dataloader_config = DataLoaderConfiguration(even_batches=False)
    map_style = torch.utils.data.DataLoader(dataset, batch_size=16, collate_fn=list)
    found["map style"] = [
        [int(sample["number"]) for sample in batch] for batch in accelerator.prepare(map_style)
    ]
    accelerator.end_training()
    return found


def lightning(dataset: Any, scratch: Path) -> dict[str, Any]:
    from lightning.pytorch import LightningModule, Trainer
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Reader(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.read: dict[int, list[list[int]]] = {}
            self.save_at: tuple[int, int] | None = None

        def training_step(self, batch: Any, index: int) -> Any:
            self.read.setdefault(self.current_epoch, []).append(batch["number"].tolist())
            return (self.weight * 0).sum()

        def on_train_batch_end(self, *_: Any) -> None:
            place = (self.current_epoch, len(self.read[self.current_epoch]))
            if place == self.save_at:
                self.trainer.save_checkpoint(scratch / "mid.ckpt")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(loader: Any, save_at: tuple[int, int] | None = None, path: Any = None) -> Any:
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=scratch,
        )
        reader = Reader()
        reader.save_at = save_at
        trainer.fit(reader, loader, ckpt_path=path, weights_only=False)
        if save_at is None and path is None:
            trainer.save_checkpoint(scratch / "end.ckpt")
        return [reader.read.get(epoch, []) for epoch in range(2)]

    def ours() -> Any:
        return forebay.DataLoader(dataset, **OPTIONS)

    def stateful(num_workers: int = 0) -> Any:
        return StatefulDataLoader(
            forebay.StreamingDataset(dataset, **OPTIONS),
            batch_size=None,
            num_workers=num_workers,
        )

    found: dict[str, Any] = {}
    mid = scratch / "mid.ckpt"
    found["loader"] = fit(ours())
    found["loader to step 3"] = fit(ours(), save_at=(0, 3))
    found["loader from step 3"] = fit(ours(), path=mid)
    fit(ours(), save_at=(0, 8))
    found["loader from the last step"] = fit(ours(), path=mid)
    found["torch"] = fit(torch_loader(forebay.StreamingDataset(dataset, **OPTIONS), 1))
    found["torchdata"] = fit(stateful(1), save_at=(0, 3))
    found["torchdata from step 3"] = fit(stateful(1), path=mid)
    return found


def main() -> None:
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    warnings.simplefilter("ignore")
    scenario, pickled, scratch = sys.argv[1:]
    dataset = pickle.loads(Path(pickled).read_bytes())  # noqa: S301 - the test's own
    work = {"accelerate": accelerate, "lightning": lightning}[scenario]
    sys.stdout.write(f"{json.dumps(work(dataset, Path(scratch)))}\n")


if __name__ == "__main__":
    main()
