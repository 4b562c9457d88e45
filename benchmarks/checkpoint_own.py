"""Forebay and a plain copy as contenders of the checkpoints' benchmark, and who has the state."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from checkpoint_child import Child
from checkpoint_state import SharedState, Training, transformer_of

import forebay

RUN = "benchmark"
WAIT_SECONDS = 600.0

NODE_JOBS = {"collect", "compact", "fingerprint", "retain"}
"""Background work on this node."""


def settle(client: forebay.Client) -> None:
    """Return when the daemon's work in the background is done: it belongs to the save before, not
    to what is measured next. What is for the object tier waits for ever where there is none."""
    deadline = time.monotonic() + WAIT_SECONDS
    while any(job.kind in NODE_JOBS for job in client.jobs()):
        if time.monotonic() > deadline:
            raise TimeoutError("the daemon's background work does not end")
        time.sleep(0.02)


class Copy:
    """Each tensor into memory that was written to before: what a save cannot do without."""

    def __init__(self, training: Training, folder: Path, address: str) -> None:
        del folder, address
        pinned = training.device.type == "cuda"
        self.training = training
        self.copies = [
            torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            for tensor in training.tensors()
        ]

    def begin(self, step: int) -> None:
        del step
        for copy, tensor in zip(self.copies, self.training.tensors(), strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.training.synchronize()

    def finish(self, begun: None) -> None:
        """It never is."""

    def forget(self, step: int) -> None:
        """Nothing to forget."""

    def back(self) -> dict[str, Any]:
        """Seconds of the copy in the other direction."""
        start = time.perf_counter()
        for copy, tensor in zip(self.copies, self.training.tensors(), strict=True):
            tensor.copy_(copy, non_blocking=True)
        self.training.synchronize()
        return {"seconds": time.perf_counter() - start}


class Forebay:
    """The Checkpointer; a daemon of its own runs beside it."""

    def __init__(self, training: Training, folder: Path, address: str) -> None:
        del folder
        self.training = training
        self.kept: list[int] = []
        self._totals: dict[str, int] = {}
        """Of what was kept, by attempt and step."""
        self._connect(address)
        self.checkpointer.restore(missing_ok=True)  # as every training does that may be resumed

    def _connect(self, address: str) -> None:
        self.client = forebay.connect(address)
        self.checkpointer = forebay.Checkpointer(
            self.client, RUN, model=self.training.model, optimizer=self.training.optimizer
        )

    def begin(self, step: int) -> forebay.checkpoint.Saved:
        return self.checkpointer.save(step)

    def begin_overlapped(self, step: int) -> forebay.checkpoint.Saved:
        return self.checkpointer.save_overlapped(step)

    def wait_snapshot(self) -> None:
        self.checkpointer.wait_snapshot()

    def finish(self, begun: forebay.checkpoint.Saved) -> None:
        begun.wait("local", timeout=WAIT_SECONDS)

    def forget(self, step: int) -> None:
        """Delete those before: the newest one stays, as in a training."""
        for old in self.kept:
            self.client.delete_checkpoints(
                RUN, attempt=self.checkpointer.attempt, step=old, now=True
            )
        self.kept = [step]
        settle(self.client)

    def keep(self, step: int) -> dict[str, Any]:
        """Save one that is to be restored."""
        self.training.change()
        self.checkpointer.save(step).wait("local", timeout=WAIT_SECONDS)
        self._totals[f"{self.checkpointer.attempt}/{step}"] = self.training.total()
        settle(self.client)
        return {}

    def reconnect(self, address: str) -> dict[str, Any]:
        """Have a connection that knows nothing yet."""
        self.checkpointer.close()
        self.client.close()
        self._connect(address)
        return {}

    def restore(self, number: int, durability: str) -> dict[str, Any]:
        """Bring one of those back, bit for bit, into tensors that hold something else."""
        name = list(self._totals)[number]
        self.training.clear()
        start = time.perf_counter()
        self.checkpointer.restore(name, durability=durability)
        self.training.synchronize()
        seconds = time.perf_counter() - start
        if self.training.total() != self._totals[name]:
            raise AssertionError("what was restored is not what was saved")
        return {"seconds": seconds}


class StateHolder:
    """Has the memory of the state that all save."""

    def fill(self, state_bytes: int) -> dict[str, Any]:
        """Make it, with values like those of a training."""
        self.state = SharedState(transformer_of(state_bytes))
        self.state.fill()
        return {"state": str(self.state.path), "num_bytes": self.state.num_bytes}


def make(name: str) -> object:
    if name == "state":
        return StateHolder()
    if name == "ranks":
        from checkpoint_ranks import Ranks

        return Ranks()
    if name == "frozen":
        from checkpoint_frozen import Frozen

        return Frozen()
    return Child({"forebay": Forebay, "copy": Copy}[name])


forebay.Checkpointer  # noqa: B018 - its imports are dear: they are done before the fork
