"""How well the run does on data that it does not train on: when to look, and when to stop early."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from forebay_trainer.averaging import Average
from forebay_trainer.config import setting
from forebay_trainer.data import Data
from forebay_trainer.parallel import Parallel
from forebay_trainer.placement import Placement
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every_steps: int = setting(
        0, "optimizer steps between evaluations on the test data; 0: at the end of each epoch"
    )
    at_start: bool = setting(False, "also before the first step of each attempt")
    metric: str = setting("test_loss", "of the evaluation: what is best, and what stops early")
    mode: Literal["min", "max"] = setting("min", "whether the smallest or the largest is best")
    patience: int | None = setting(
        None, "stop after so many evaluations without a better one; none: train to the end"
    )

    def __post_init__(self) -> None:
        if self.every_steps < 0:
            raise InvalidRequest(f"every_steps must be at least 0, not {self.every_steps}")
        if self.patience is not None and self.patience < 1:
            raise InvalidRequest(f"patience must be at least 1, not {self.patience}")


class Progress:
    """The evaluations so far; a part of the checkpoint."""

    def __init__(self, config: EvaluationConfig) -> None:
        self._config = config
        self._best: float | None = None
        self._best_step = 0
        self._since_best = 0
        self.last: dict[str, float] = {}
        """What the last evaluation found."""

    def is_due(self, step: int, *, is_end: bool) -> bool:
        """*is_end*: the step was the last one of an epoch, or of the run."""
        every = self._config.every_steps
        return step % every == 0 if every else is_end

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the outcome of an evaluation. InvalidRequest if it lacks the metric to go by."""
        if not metrics:
            return
        self.last = dict(metrics)
        name = self._config.metric
        if name not in metrics:
            raise InvalidRequest(
                f"evaluation.metric={name}: the evaluation has {', '.join(sorted(metrics))}"
            )
        value = metrics[name] if self._config.mode == "max" else -metrics[name]
        if not math.isnan(value) and (self._best is None or value > self._best):
            self._best, self._best_step, self._since_best = value, step, 0
        else:
            self._since_best += 1

    @property
    def is_stuck(self) -> bool:
        """Whether patience has run out."""
        return self._config.patience is not None and self._since_best >= self._config.patience

    @property
    def best(self) -> tuple[float, int] | None:
        """The best value of the metric, and its step."""
        if self._best is None:
            return None
        return self._best if self._config.mode == "max" else -self._best, self._best_step

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self._best,
            "best_step": self._best_step,
            "since_best": self._since_best,
            "last": self.last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._best_step = state["best"], state["best_step"]
        self._since_best = state["since_best"]
        self.last = dict(state["last"])


class Evaluation:
    """The task's metrics on the test data, with the average of the weights where one is kept."""

    def __init__(
        self, task: Task, data: Data, placement: Placement, average: Average, parallel: Parallel
    ) -> None:
        self._task = task
        self._data = data
        self._placement = placement
        self._average = average
        self._parallel = parallel

    @torch.no_grad()
    def run(self, alive: Callable[[], None]) -> dict[str, float]:
        """``test_loss``, ``test_samples`` and ``test_…`` for each metric, over all ranks; nothing
        without test data. A collective; *alive* is called for every batch."""
        sums: dict[str, Tensor] = {}
        for module in self._placement.modules.values():
            module.eval()
        with self._average.in_place():
            for batch in self._data.test_batches():
                alive()
                with self._placement.autocast():
                    answer = self._placement.outputs(batch)
                    if answer is None:
                        continue
                    for name, value in self._sums(*answer).items():
                        so_far = sums.get(name, 0.0)
                        sums[name] = so_far + value.detach().to("cpu", torch.float64)
            self._placement.settle()
        totals = self._over_ranks(sums)
        if not totals:
            return {}
        metrics = {
            "loss": totals["loss"] / max(1.0, totals["weight"]),
            "samples": int(totals["samples"]),
        }
        metrics |= self._task.metrics(totals)
        return {f"test_{name}": value for name, value in metrics.items()}

    def _sums(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        losses, weights = self._task.losses(outputs, batch), self._task.weights(batch)
        found = dict(self._task.evaluate(outputs, batch))
        found |= {"loss": (losses * weights).sum(), "weight": weights.sum()}
        return {**found, "samples": (batch["id"] >= 0).sum()}

    def _over_ranks(self, sums: Mapping[str, Tensor]) -> dict[str, Any]:
        """Numbers as floats, all else as float64 tensors of their shapes. A collective."""
        shapes = self._shapes(sums)
        if not shapes:
            return {}
        own = [sums[name] if name in sums else torch.zeros(shape) for name, shape in shapes.items()]
        flat = [value for each in own for value in each.flatten().tolist()]
        left = torch.tensor(self._parallel.sum_parts(flat), dtype=torch.float64)
        totals: dict[str, Any] = {}
        for name, shape in shapes.items():
            size = math.prod(shape)
            totals[name] = left[:size].view(shape) if shape else float(left[0])
            left = left[size:]
        return totals

    def _shapes(self, sums: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """What is summed, on ranks too whose stage of a pipeline has no part in it."""
        own = {name: list(value.shape) for name, value in sums.items()}
        if self._parallel.shape.stages == 1:
            return own
        said = self._parallel.gather(list(json.dumps(own).encode()))
        return max((json.loads(bytes(shapes)) for shapes in said), key=len)
