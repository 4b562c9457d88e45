"""When this trainer saves, and how long each save held it up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import forebay
from forebay.checkpoint import Saved
from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = setting(20, "optimizer steps between saves; 0: only at the end")
    resume: str | None = setting("latest", "generation to start from; none: start afresh")
    wait_seconds: float = setting(120.0, "how long the end waits for the last save to be local")

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise InvalidRequest(f"every_steps must be at least 0, not {self.every_steps}")

    def build(self, client: forebay.Client, run: str, **state: Any) -> Checkpoints:
        """``state``: what `forebay.Checkpointer` takes (model, optimizer, loader, …)."""
        return Checkpoints(self, forebay.Checkpointer(client, run=run, **state))


class Checkpoints:
    """The generations of this attempt; used from the thread that trains."""

    def __init__(self, config: CheckpointConfig, checkpointer: forebay.Checkpointer) -> None:
        self._config = config
        self._checkpointer = checkpointer
        self._last: Saved | None = None
        self.last_step = 0
        self.parent_attempt = 0
        self.skipped: tuple[str, ...] = ()

    @property
    def attempt(self) -> int:
        """This attempt's number; known after `restore`."""
        return self._checkpointer.attempt

    def restore(self) -> int:
        """Loads the generation to start from, if there is one, into the state; returns its step."""
        if self._config.resume is None:
            self._checkpointer.start()
            return 0
        missing_ok = self._config.resume == "latest"
        resumed = self._checkpointer.restore(self._config.resume, missing_ok=missing_ok)
        if resumed is not None:
            self.last_step = resumed.step
            self.parent_attempt = resumed.attempt
            self.skipped = tuple(str(each) for each in resumed.skipped)
        return self.last_step

    def is_due(self, step: int) -> bool:
        return self._config.every_steps > 0 and step % self._config.every_steps == 0

    def before_update(self) -> float:
        """Called before the optimizer changes the state; returns the seconds that it took."""
        start = time.perf_counter()
        self._checkpointer.wait_snapshot()
        return time.perf_counter() - start

    def save(self, step: int, metrics: Mapping[str, float]) -> float:
        """Saves, asynchronously after one copy; returns the seconds for which training stood."""
        start = time.perf_counter()
        self._last = self._checkpointer.save(step, metrics=dict(metrics))
        self.last_step = step
        return time.perf_counter() - start

    def finish(self) -> None:
        """Waits until the last save is on disk: DeadlineExceeded if that takes too long."""
        if self._last is not None:
            self._last.wait("local", timeout=self._config.wait_seconds)

    def close(self) -> None:
        self._checkpointer.close()
