"""One contender of the checkpoints' benchmark, in a process of its own: told what to do by lines.

Run as ``python checkpoint_child.py CONTENDER PLACE``, *PLACE* a JSON object; each line in is a JSON
object with ``do``, each line out its answer. Peers run by the interpreter of their own environment.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from checkpoint_state import SharedState, Training, keep_freed_memory, shape_of

CONTENDERS = {
    "forebay": ("checkpoint_own", "Forebay"),
    "copy": ("checkpoint_own", "Copy"),
    "torch": ("checkpoint_peers", "TorchSave"),
    "dcp": ("checkpoint_peers", "DcpSave"),
    "dcp_thread": ("checkpoint_peers", "DcpThread"),
    "dcp_process": ("checkpoint_peers", "DcpProcess"),
    "tcp": ("checkpoint_peers", "TorchCheckpointing"),
}


@dataclass(frozen=True)
class Timed:
    """One save, in seconds from its call."""

    stall: float
    """Until the state may change."""
    durable: float
    """Until all of it is on the disk, its names too."""


class Contender(Protocol):
    """What each has to be able to do."""

    def __init__(self, training: Training, folder: Path, address: str) -> None: ...

    def begin(self, step: int) -> Any:
        """Save; on return the state may change. What is answered is for ``finish``."""

    def finish(self, begun: Any) -> None:
        """Return when it is durable."""

    def forget(self, step: int) -> None:
        """Delete it."""


class Child:
    """Answers the lines."""

    def __init__(self, name: str, place: dict[str, Any]) -> None:
        module, kind = CONTENDERS[name]
        make = getattr(importlib.import_module(module), kind)
        shared = SharedState(shape_of(place["state_bytes"]), Path(place["state"]))
        self.training = Training(shared, place["device"])
        self.contender = make(self.training, Path(place["folder"]), place["address"])
        self._step = 0

    def facts(self) -> dict[str, Any]:
        return {"num_bytes": self.training.num_bytes}

    def save(self) -> dict[str, Any]:
        """One save of a state that was never saved before, alone on the machine."""
        self.training.change()
        timed = self._save()
        self.contender.forget(self._step)
        return {"stall": timed.stall, "durable": timed.durable}

    def _save(self) -> Timed:
        self._step += 1
        start = time.perf_counter()
        begun = self.contender.begin(self._step)
        stall = time.perf_counter() - start
        self.contender.finish(begun)
        return Timed(stall, time.perf_counter() - start)

    def train(self, mode: str, steps: int) -> dict[str, Any]:
        """A number of steps; with *mode* ``save`` or ``overlapped`` a save before the first."""
        if mode == "overlapped" and not hasattr(self.contender, "begin_overlapped"):
            return {"missing": True}
        self._step += mode != "none"
        begun, durations, wait = None, [], lambda: None
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
        if begun is not None:
            self.contender.finish(begun)
            self.contender.forget(self._step)
        return {"seconds": seconds, "stall": stall, "steps": durations}

    def call(self, method: str, what: dict[str, Any]) -> dict[str, Any]:
        """What only some can do."""
        answer: dict[str, Any] = getattr(self.contender, method)(**what)
        return answer


def main() -> None:
    name, place = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    keep_freed_memory()
    torch.manual_seed(0)
    child: Child | None = None
    for line in sys.stdin:
        what = json.loads(line)
        do = what.pop("do")
        try:
            if child is None:
                child = Child(name, place)
            answer = {"pid": os.getpid(), **getattr(child, do)(**what)}
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
