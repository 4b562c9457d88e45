"""Our loaders inside Accelerate and Lightning, two ranks with gloo in processes of their own: every
sample once, or a refusal that names the setting."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import forebay
from forebay.testing import numbered

NUM_RANKS = 2


@pytest.fixture
def way() -> str:
    """One way of bytes is enough for what is about frameworks."""
    return "local"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(scenario, dataset, folder: Path) -> list[dict]:
    """What each rank printed."""
    pickled = folder / "dataset"
    pickled.write_bytes(pickle.dumps(dataset))
    port = free_port()
    ranks = []
    for rank in range(NUM_RANKS):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(NUM_RANKS),
            "LOCAL_WORLD_SIZE": str(NUM_RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",  # or Lightning starts ranks of its own
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        }
        program = Path(__file__).parent / "framework_ranks.py"
        command = [sys.executable, str(program), scenario, str(pickled), str(folder)]
        with (folder / f"rank{rank}.log").open("wb") as log:
            ranks.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)
            )
    try:
        printed = [process.communicate(timeout=170)[0].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(NUM_RANKS))
    assert [process.returncode for process in ranks] == [0] * NUM_RANKS, logs
    return [json.loads(text.splitlines()[-1]) for text in printed]


def joined(found: list[dict], key: str, epoch: int | None = None) -> list[list[int]]:
    """The global batches of both ranks."""
    parts = [one[key] if epoch is None else one[key][epoch] for one in found]
    return [a + b for a, b in zip(*parts, strict=True)]


def expected_batches(dataset, **options):
    return numbered.expected_batches(dataset, 24, seed=5, **options)


@pytest.mark.timeout(200)
def test_accelerate_reads_each_sample_once_or_is_refused_by_name(train, tmp_path):
    found = run_ranks("accelerate", train, tmp_path)
    assert [one["ranks"] for one in found] == [2, 2]
    assert [one["is untouched"] for one in found] == [True, True]
    assert joined(found, "loader") == expected_batches(train)
    assert joined(found, "next epoch") == expected_batches(train, epoch=1)
    assert joined(found, "torch") == expected_batches(train)
    refused = {key: [one[key] for one in found] for key in found[0] if key.startswith("prepared ")}
    assert len(refused) == 6
    for key, answers in refused.items():
        setting = "split_batches" if "split_batches" in key else "dispatch_batches"
        assert all(answer != "it read" and setting in answer for answer in answers), (key, answers)
    seen = [number for one in found for batch in one["map style"] for number in batch]
    assert sorted(seen) == sorted(number for batch in expected_batches(train) for number in batch)


class Grown:
    """What Lightning read of a dataset that grows after each of its epochs."""

    def __init__(self, client, name: str, make, save_to=None) -> None:
        from lightning.pytorch import LightningModule, Trainer

        read: list[list[int]] = [[], [], []]
        refused = []

        class Reader(LightningModule):
            def training_step(self, batch, _):
                read[self.current_epoch] += batch["x"].tolist()

            def on_train_batch_end(self, _, __, number):
                if number == 1 and save_to is not None:
                    with pytest.raises(forebay.InvalidRequest, match="Save at the end of epochs"):
                        self.trainer.save_checkpoint(save_to)
                    refused.append(number)

            def configure_optimizers(self):
                return None

            def on_train_epoch_end(self):
                grow(client, name)

        grow(client, name)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Reader(), make(client.dataset(name)))
        self.read = read
        self.num_refused = len(refused)


def grow(client, name: str) -> None:
    exists = name in client.datasets()
    start = len(client.dataset(name)) if exists else 0
    with (
        client.append_dataset(name)
        if exists
        else client.create_dataset(name, {"x": "int64"}) as writer
    ):
        for number in range(start, start + 16):
            writer.write(x=number)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["loader", "torch", "torchdata"])
def test_lightning_reads_all_of_each_version_that_is_followed(client, name, kind, tmp_path):
    from torch.utils.data import DataLoader
    from torchdata.stateful_dataloader import StatefulDataLoader

    options = {"global_batch_size": 4, "shuffle": "full", "follow": "latest"}

    def make(dataset):
        if kind == "loader":
            return forebay.DataLoader(dataset, **options)
        wrap = DataLoader if kind == "torch" else StatefulDataLoader
        return wrap(forebay.StreamingDataset(dataset, **options), batch_size=None)

    grown = Grown(client, name, make, tmp_path / "mid.ckpt" if kind == "loader" else None)
    assert grown.num_refused == (3 if kind == "loader" else 0)
    assert [sorted(epoch) for epoch in grown.read] == [list(range(16 * n)) for n in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_lightning_reads_each_sample_once_and_resumes(train, tmp_path):
    found = run_ranks("lightning", train, tmp_path)
    epochs = [expected_batches(train, epoch=epoch) for epoch in range(2)]
    for key in ("loader", "loader to step 3", "torch", "torchdata"):
        assert [joined(found, key, epoch) for epoch in range(2)] == epochs, key
    for key in ("loader from step 3", "torchdata from step 3"):
        assert joined(found, key, 0) == epochs[0][3:], key
        assert joined(found, key, 1) == epochs[1], key
    assert joined(found, "loader from the last step", 1) == epochs[1]
