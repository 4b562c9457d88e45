"""One contender of the checkpoints' benchmark, in a process of its own; see ``children.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from checkpoint_state import SharedState, Training, keep_freed_memory, transformer_of


class Contender(Protocol):
    """What each has to be able to do."""

    def begin(self, step: int) -> Any:
        """Save; on return the state may change. What is answered is for ``finish``."""

    def finish(self, begun: Any) -> None:
        """Return when it is durable."""

    def forget(self, step: int) -> None:
        """Delete it."""


class Child:
    """Answers the lines."""

    contender: Any  # a Contender; some can do more
    training: Training

    def __init__(self, make: Callable[[Training, Path, str], Contender]) -> None:
        self._make = make
        self._step = 0

    def open(
        self, state: str, state_bytes: int, device: str, folder: str, address: str
    ) -> dict[str, Any]:
        """Get ready to save the state that another process has at *state*."""
        keep_freed_memory()
        torch.manual_seed(0)
        shared = SharedState(transformer_of(state_bytes), Path(state))
        self.training = Training(shared, device)
        self.contender = self._make(self.training, Path(folder), address)
        return {"num_bytes": self.training.num_bytes}

    def save(self) -> dict[str, Any]:
        """One save of a state that was never saved before, alone on the machine."""
        self.training.change()
        self._step += 1
        start = time.perf_counter()
        begun = self.contender.begin(self._step)
        stall = time.perf_counter() - start
        self.contender.finish(begun)
        durable = time.perf_counter() - start
        self.contender.forget(self._step)
        return {"stall": stall, "durable": durable}

    def train(self, mode: str, steps: int) -> dict[str, Any]:
        """A number of steps; with *mode* ``save`` or ``overlapped`` a save before the first."""
        begun, durations, wait = None, [], lambda: None
        self._step += mode != "none"
        start = time.perf_counter()
        if mode == "save":
            begun = self.contender.begin(self._step)
        elif mode == "overlapped":
            begun = self.contender.begin_overlapped(self._step)
            wait = self.contender.wait_snapshot
        stall = time.perf_counter() - start
        for _ in range(steps):
            before = time.perf_counter()
            self.training.step(wait)
            durations.append(time.perf_counter() - before)
        seconds = time.perf_counter() - start
        if mode != "none":
            self.contender.finish(begun)
        late = time.perf_counter() - start - seconds
        if mode != "none":
            self.contender.forget(self._step)
        return {"seconds": seconds, "stall": stall, "steps": durations, "late": late}

    def call(self, method: str, what: dict[str, Any]) -> dict[str, Any]:
        """What only some can do."""
        answer: dict[str, Any] = getattr(self.contender, method)(**what)
        return answer
