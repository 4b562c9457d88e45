"""Optimizers and learning rate schedules that a recipe can name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = setting("adamw", "which optimizer")
    learning_rate: float = setting(1e-3, "the highest learning rate")
    weight_decay: float = setting(0.01, "decay of the weights")
    momentum: float = setting(0.9, "of sgd")
    warmup_steps: int = setting(0, "steps in which the learning rate grows from near 0")
    schedule: Literal["constant", "cosine"] = setting(
        "cosine", "after the warm-up; cosine ends near 0 at the last step"
    )

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise InvalidRequest(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.warmup_steps < 0:
            raise InvalidRequest(f"warmup_steps must be at least 0, not {self.warmup_steps}")

    def build(self, model: nn.Module) -> Optimizer:
        if self.name == "sgd":
            return SGD(
                model.parameters(),
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        return AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def build_schedule(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        """``num_steps`` counts all optimizer steps of the run, those before a resume included."""
        return LambdaLR(optimizer, lambda step: self.share(step, num_steps))

    def share(self, step: int, num_steps: int) -> float:
        """The share of the learning rate that step ``step`` (counted from 0) uses."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
