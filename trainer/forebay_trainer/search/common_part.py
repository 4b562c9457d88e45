"""The part that all trials share: one run to a step, whose generation all of them begin from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import nn

from forebay_trainer.metrics.follow import Event
from forebay_trainer.metrics.history import history
from forebay_trainer.recipe import Recipe
from forebay_trainer.records import read_lines
from forebay_trainer.search.job import Base, Job, Slot
from forebay_trainer.search.pool import Running
from forebay_wire.errors import ForebayError, InvalidRequest

NAME: Final = "common"


class CommonPartFailed(ForebayError):
    """The run that all trials begin from ended with an error."""


class CommonPart:
    """The handler of that one run. It has the length and the schedules of the trials, and is told
    to end once it has saved the step."""

    def __init__(self, base: Base, step: int) -> None:
        self.fork = f"{base.recipe.config.run}-{NAME}@{step}"
        """What the trials begin from, as ``checkpoint.fork_from`` takes it."""
        self.is_there = False
        self._base = base
        self._step = step
        self._is_begun = False

    def next(self, slot: Slot) -> Job | None:
        if self._is_begun:
            return None
        self._is_begun = True
        every = self._base.recipe.config.checkpoint.every_steps
        every = every if every and self._step % every == 0 else self._step
        values = [f"checkpoint.every_steps={every}", "evaluation.patience=none"]
        values += ["checkpoint.keep_best=none", "checkpoint.keep_last=none"]
        job = self._base.job(NAME, values, slot)
        if job.metrics.exists():
            self.is_there = self._is_landed(read_lines(job.metrics))
        return None if self.is_there else job

    def progress(self, running: Running, events: Sequence[Event]) -> None:
        if self._is_saved(running.events):
            running.tell()

    def ended(self, running: Running) -> None:
        end = running.end()
        steps = steps_of(running)
        if end.state == "failed":
            raise CommonPartFailed(
                f"run {running.job.run}, which all trials begin from, failed: {end.reason}; see "
                f"{running.job.log}"
            )
        if end.state == "done" and steps <= self._step:
            raise InvalidRequest(
                f"--warm-up {self._step}: a run has {steps} steps in all; take fewer, so that the "
                "trials have steps of their own"
            )
        self.is_there = self._is_landed(running.events)

    def _is_landed(self, events: Sequence[Event]) -> bool:
        # What ended by itself has waited for its saves to be on disk.
        return self._is_saved(events) and events[-1]["event"] == "end"

    def _is_saved(self, events: Sequence[Event]) -> bool:
        if not any(event["event"] == "start" for event in events):
            return False
        return self._step in {save["step"] for save in history(events).saves}


def steps_of(running: Running) -> int:
    taken = [event["step"] for event in running.events if event["event"] == "step"]
    return max(taken, default=0)


def shapes(recipe: Recipe, about: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all that a generation has of the recipe's modules, by name."""
    return {
        f"{name}.{weight}": tuple(tensor.shape)
        for name, module in recipe.build(about).modules.items()
        for weight, tensor in state_of(module).items()
    }


def state_of(module: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in module.state_dict().items() if hasattr(each, "shape")}
