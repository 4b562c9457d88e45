"""One contender of the stall benchmark: the same loop over the same data, saving in its own way.

Shape letters: N samples of the data, B of a batch, C, H and W of a picture, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from checkpoint_own import settle
from checkpoint_peers import DcpThread, TorchSave
from checkpoint_state import SharedState, Training, keep_freed_memory
from torch import nn
from torch.nn import functional

import forebay

RUN = "benchmark"
DATASET = "pictures"
NUM_CLASSES = 10
DEPTH = 4
"""Wide layers between the pictures and the classes."""

BYTES_PER_PARAMETER = 12
"""A weight and AdamW's two moments, 4 bytes each."""

WAIT_SECONDS = 120.0
WARM_UP_STEPS = 3


class Model(nn.Module):
    """Wide layers: much state, and work that grows with the batch."""

    def __init__(self, num_pixels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_pixels, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(DEPTH))
        self.last = nn.Linear(width, NUM_CLASSES)

    def forward(self, pictures_BCHW: torch.Tensor) -> torch.Tensor:
        x = self.first(pictures_BCHW.flatten(1).float() / 255)
        for layer in self.layers:
            x = x + functional.relu(layer(x))
        scores_BK: torch.Tensor = self.last(x)
        return scores_BK


def width_of(state_bytes: int, num_pixels: int) -> int:
    """So wide that weights and moments take about *state_bytes*; a multiple of 64."""
    parameters = state_bytes // BYTES_PER_PARAMETER
    root = (num_pixels**2 + 4 * DEPTH * parameters) ** 0.5
    return max(64, int((root - num_pixels) / (2 * DEPTH)) // 64 * 64)


def model_of(state_bytes: int, num_pixels: int) -> Model:
    """Without memory of its own."""
    with torch.device("meta"):
        return Model(num_pixels, width_of(state_bytes, num_pixels))


class Saving(Protocol):
    """How a contender keeps its state."""

    def save(self, step: int) -> None:
        """On return the state may change."""

    def finish(self) -> None:
        """Returns when the newest save is durable, and nothing of it goes on; not timed."""


class NoSaving:
    """The limit."""

    def save(self, step: int) -> None:
        pass

    def finish(self) -> None:
        pass


class PeerSaving:
    """One of the checkpoint benchmark's peers; of its saves the newest is kept."""

    def __init__(self, peer: TorchSave | DcpThread) -> None:
        self._peer = peer
        self._begun: Any = None
        self._saved: list[int] = []

    def save(self, step: int) -> None:
        self._end()  # what is under way has to end first: that counts
        self._begun = self._peer.begin(step)
        self._saved.append(step)

    def finish(self) -> None:
        self._end()
        for old in self._saved[:-1]:
            self._peer.forget(old)
        del self._saved[:-1]

    def _end(self) -> None:
        if self._begun is not None:
            self._peer.finish(self._begun)
            self._begun = None


class Forebay:
    """The Checkpointer."""

    def __init__(
        self, client: forebay.Client, model: nn.Module, optimizer: Any, durability: str
    ) -> None:
        self._client = client
        self._durability = durability
        self._checkpointer = forebay.Checkpointer(
            client, RUN, model=model, optimizer=optimizer, keep=forebay.Keep(last=1)
        )
        self._checkpointer.restore(missing_ok=True)  # as every training does that may be resumed
        self._saved: forebay.checkpoint.Saved | None = None

    def save(self, step: int) -> None:
        self._saved = self._checkpointer.save(step)

    def finish(self) -> None:
        if self._saved is not None:
            self._saved.wait(self._durability, timeout=WAIT_SECONDS)
        settle(self._client)


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """The data as peers have them: two files that numpy maps."""

    def __init__(self, folder: Path) -> None:
        self._images = np.load(folder / "images.npy", mmap_mode="r")
        self._labels = np.load(folder / "labels.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self._images[number].copy()), int(self._labels[number])


def of_torch(folder: Path, batch_size: int) -> Batches:
    """torch's loader with a worker that stays."""
    loader = torch.utils.data.DataLoader(
        Pictures(folder),
        batch_size=batch_size,
        shuffle=True,
        num_workers=1,
        prefetch_factor=4,
        persistent_workers=True,
        drop_last=True,
    )
    while True:
        yield from loader


def of_forebay(client: forebay.Client, batch_size: int) -> Batches:
    loader = forebay.DataLoader(
        client.dataset(DATASET),
        global_batch_size=batch_size,
        shuffle="full",
        seed=0,
        last_batch="drop",
        num_threads=1,
        rank=0,
        world_size=1,
    )
    for epoch in loader.epochs(1 << 30):
        for batch in epoch:
            yield batch["image"], batch["label"]


def of_memory(folder: Path, batch_size: int) -> Batches:
    """The same batch again and again."""
    images = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="r")[:batch_size].copy())
    labels = torch.from_numpy(np.load(folder / "labels.npy", mmap_mode="r")[:batch_size].copy())
    while True:
        yield images, labels


class Loop:
    """Answers the lines; see ``children.py``."""

    def __init__(self, name: str, data: str, folder: str, num_threads: int) -> None:
        keep_freed_memory()
        torch.set_num_threads(num_threads)
        torch.manual_seed(0)
        self._name = name
        self._data = Path(data)
        self._folder = Path(folder) / name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._step = 0
        self._saving: Saving = NoSaving()
        self._batches: Batches = iter(())

    def fill(self, state_bytes: int) -> dict[str, Any]:
        """Make the state that all have."""
        self._shared = SharedState(model_of(state_bytes, self._num_pixels()))
        self._shared.fill()
        return {"state": str(self._shared.path), "num_bytes": self._shared.num_bytes}

    def open(self, state: str, state_bytes: int, address: str) -> dict[str, Any]:
        """Get ready to train and save the state that another process has at *state*."""
        shared = SharedState(model_of(state_bytes, self._num_pixels()), Path(state))
        training = Training(shared, "cpu")
        self._model, self._optimizer = training.model, training.optimizer
        if address:
            self._client = forebay.connect(address)
            durability = "remote" if self._name == "forebay_object" else "local"
            self._saving = Forebay(self._client, self._model, self._optimizer, durability)
        elif self._name == "torch":
            self._saving = PeerSaving(TorchSave(training, self._folder, ""))
        elif self._name == "dcp":
            self._saving = PeerSaving(DcpThread(training, self._folder, ""))
        return {}

    def load(self, batch_size: int) -> dict[str, Any]:
        """Read batches of so many samples from here on."""
        if self._name.startswith("forebay"):
            self._batches = of_forebay(self._client, batch_size)
        elif self._name == "limit":
            self._batches = of_memory(self._data, batch_size)
        else:
            self._batches = of_torch(self._data, batch_size)
        for _ in range(WARM_UP_STEPS):
            self._train()
        return {}

    def time_steps(self, batch_size: int, num_steps: int) -> dict[str, Any]:
        """Seconds of each step on a batch in memory: to find the size of a batch."""
        self._batches = of_memory(self._data, batch_size)
        return {"steps": [self._train()[0] for _ in range(num_steps)]}

    def time_save(self) -> dict[str, Any]:
        """Seconds of a save, until it is durable."""
        started = time.perf_counter()
        self._step += 1
        self._saving.save(self._step)
        self._saving.finish()
        return {"seconds": time.perf_counter() - started}

    def run(self, num_steps: int, saves: list[int]) -> dict[str, Any]:
        """So many steps, with a save behind those of these numbers: seconds of each step, the save
        included, of what it waited for its batch, and of each save's stall."""
        steps, waits, stalls = [], [], []
        started = time.perf_counter()
        for number in range(num_steps):
            before = time.perf_counter()
            _, wait = self._train()
            if number in saves:
                begun = time.perf_counter()
                self._step += 1
                self._saving.save(self._step)
                stalls.append(time.perf_counter() - begun)
            steps.append(time.perf_counter() - before)
            waits.append(wait)
        seconds = time.perf_counter() - started
        self._saving.finish()
        late = time.perf_counter() - started - seconds
        return {"seconds": seconds, "steps": steps, "waits": waits, "stalls": stalls, "late": late}

    def _num_pixels(self) -> int:
        return int(np.load(self._data / "images.npy", mmap_mode="r")[0].size)

    def _train(self) -> tuple[float, float]:
        """One step; its seconds, and those of waiting for its batch."""
        started = time.perf_counter()
        images, labels = next(self._batches)
        wait = time.perf_counter() - started
        functional.cross_entropy(self._model(images), labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - started, wait


def make(name: str, **arguments: Any) -> Loop:
    return Loop(name, **arguments)


forebay.Checkpointer  # noqa: B018 - its imports are dear: they are done before the fork
forebay.DataLoader  # noqa: B018
