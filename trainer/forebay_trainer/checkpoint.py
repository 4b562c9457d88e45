"""When this trainer saves, what, and how long each save held it up. One of the two files that know
the service."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

import forebay
import forebay.checkpoint
from forebay.checkpoint import Resumed, Saved
from forebay.checkpoint.advise import advise
from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest, NotFound


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = setting(20, "optimizer steps between saves; 0: only at the end")
    resume: str | None = setting("latest", "generation to start from; none: start afresh")
    fork_from: str | None = setting(
        None, "RUN or RUN@STEP that a run without a generation of its own begins from"
    )
    overlapped: bool = setting(
        False, "large tensors are copied while forward and backward go on: for GPUs and idle cores"
    )
    keep_last: int | None = setting(None, "generations that are kept; none: all")
    keep_best: str | None = setting(
        None, "with keep_last: also the best by this metric, as test_loss; none: no other"
    )
    keep_mode: Literal["min", "max"] = setting("min", "of keep_best: smallest or largest is best")
    wait_seconds: float = setting(120.0, "how long the end waits for the last save to be local")

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise InvalidRequest(f"every_steps must be at least 0, not {self.every_steps}")
        if self.keep_best is not None and self.keep_last is None:
            raise InvalidRequest("keep_best keeps all generations without keep_last: give both")

    def build(
        self,
        client: forebay.Client,
        run: str,
        note: Mapping[str, Any],
        own_names: Sequence[str] | None = None,
        **state: Any,
    ) -> Checkpoints:
        """*note*: kept with every generation. *own_names*: in a pipeline, what of a generation
        belongs to this rank's stage. *state*: what `forebay.Checkpointer` takes (modules,
        optimizers, and what has ``state_dict`` and ``load_state_dict``), None for what is not."""
        keep = None
        if self.keep_last is not None:
            keep = forebay.Keep(last=self.keep_last, best=self.keep_best or "", mode=self.keep_mode)
        checkpointer = forebay.Checkpointer(
            client, run=run, keep=keep, fork_from=self.fork_from, **state
        )
        return Checkpoints(self, client, checkpointer, note, own_names)


def kept_by(note: Mapping[str, Any]) -> tuple[Any, Any]:
    """The mesh of a generation, and how its gradients were compressed."""
    parallel = note.get("config", {}).get("parallel", {})
    return note.get("mesh"), parallel.get("compression", {}).get("method")


def advised_seconds(mtbf_seconds: float, cost_seconds: float) -> float:
    """The time between two saves that loses the least, if the run fails every *mtbf_seconds* and
    a save holds it up for *cost_seconds*."""
    return advise(mtbf_seconds, [cost_seconds]).interval_seconds


def weights_of(address: str | None, run: str, module: str) -> dict[str, Tensor]:
    """The weights of a module in the newest generation of a run, by their names in it; of the
    average, where one is kept. NotFound if there is no such generation or module."""
    with (
        forebay.connect(address) as client,
        closing(forebay.checkpoint.open(client, run, "latest")) as found,
    ):
        for prefix in (f"average.weights.{module}.", f"{module}."):
            names = [name for name in found if name.startswith(prefix)]
            if names:
                return {name.removeprefix(prefix): found[name].read() for name in names}
    raise NotFound(f"run {run} has no module {module!r} in its newest generation")


class Checkpoints:
    """The generations of this attempt; used from the thread that trains."""

    def __init__(
        self,
        config: CheckpointConfig,
        client: forebay.Client,
        checkpointer: forebay.Checkpointer,
        note: Mapping[str, Any],
        own_names: Sequence[str] | None,
    ) -> None:
        self._config = config
        self._client = client
        self._own_names = own_names
        self._checkpointer = checkpointer
        self._note = dict(note)
        self._last: Saved | None = None
        self._good: str | None = None
        self.last_step = 0
        self.parent_attempt = 0
        self.skipped: tuple[str, ...] = ()

    @property
    def attempt(self) -> int:
        """This attempt's number; known after `restore`."""
        return self._checkpointer.attempt

    @property
    def last_good(self) -> str:
        """Where a next start goes on, as far as this rank knows; for messages."""
        if self._good is None:
            return f"run {self._checkpointer.run} has no generation yet"
        return f"the last good generation is {self._good}"

    def restore(self) -> Resumed | None:
        """Loads the generation to start from, if there is one, into the state."""
        if self._config.resume is None:
            self._checkpointer.start()
            return None
        missing_ok = self._config.resume == "latest"
        resumed = self._checkpointer.restore(
            self._config.resume, missing_ok=missing_ok, **self._choice(self._config.resume)
        )
        if resumed is not None:
            self.last_step = resumed.step
            self.parent_attempt = resumed.attempt
            self.skipped = tuple(str(each) for each in resumed.skipped)
            self._good = f"{resumed.run}@{resumed.attempt}/{resumed.step}"
        return resumed

    def _choice(self, selector: str) -> dict[str, Any]:
        """What is restored. A pipeline's stage has weights of its own, so the optimizers' groups of
        parameters are those of one stage, and stay as they are here. What compression keeps is of
        use to the same method on the same mesh only, and as large as all gradients of all ranks.
        """
        if self._own_names is not None:
            return {"only": self._own_names}
        try:
            note = self._client.run(self._checkpointer.run).get(selector).note
        except NotFound:
            return {}
        ignore = [] if kept_by(note) == kept_by(self._note) else ["compression.kept"]
        if note.get("config", {}).get("parallel", {}).get("num_stages", 1) > 1:
            ignore.append("*optimizer.param_groups")
        return {"ignore": ignore} if ignore else {}

    def is_due(self, step: int) -> bool:
        return self._config.every_steps > 0 and step % self._config.every_steps == 0

    def before_update(self) -> float:
        """Called before the weights change; returns the seconds that it took."""
        start = time.perf_counter()
        self._checkpointer.wait_snapshot()
        return time.perf_counter() - start

    def save(self, step: int, metrics: Mapping[str, float]) -> float:
        """Saves, asynchronously after one copy; returns the seconds for which training stood."""
        start = time.perf_counter()
        save = self._checkpointer.save
        if self._config.overlapped:
            save = self._checkpointer.save_overlapped
        self._last = save(step, metrics=dict(metrics), note=self._note)
        self._last.on("local", self._landed)
        self.last_step = step
        return time.perf_counter() - start

    def _landed(self, saved: Saved) -> None:
        self._good = str(saved.generation)

    def finish(self) -> None:
        """Waits until the last save is on disk: DeadlineExceeded if that takes too long."""
        if self._last is not None:
            self._last.wait("local", timeout=self._config.wait_seconds)

    def close(self) -> None:
        self._checkpointer.close()
