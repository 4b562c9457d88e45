"""A model of two blocks that every mesh can cut, and faults on demand. B samples, W width."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

from forebay_trainer.config import setting
from forebay_trainer.task import Batch, Task, keep_only, layers_of_stage


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int = setting(8, "of each layer")
    dropout: float = setting(0.2, "share of activations dropped in training")
    fault: Literal["none", "raise", "hang", "nan"] = setting("none", "what happens")
    fault_step: int = setting(0, "forward in which it happens, from 1")
    fault_rank: int = setting(0, "rank in which it happens")


def build(config: Config) -> Task:
    return Tiny(config)


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 2 * config.width)
        self.down = nn.Linear(2 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BW: Tensor) -> Tensor:
        return x_BW + self.dropout(self.down(F.relu(self.up(x_BW))))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.first = nn.Linear(4, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(2))
        self.head = nn.Linear(config.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tiny(Task):
    def __init__(self, config: Config) -> None:
        super().__init__(Model(config))
        self._config = config
        self._num_forwards = 0

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        config = self._config
        self._num_forwards += self.modules["model"].training
        is_here = os.environ.get("RANK", "0") == str(config.fault_rank)
        if is_here and self._num_forwards == config.fault_step:
            if config.fault == "raise":
                raise RuntimeError("the fault that was asked for")
            if config.fault == "hang":
                time.sleep(1000)
            if config.fault == "nan":
                return (batch["x"] * math.nan,)
        return (batch["x"],)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["label"], reduction="none")

    def evaluate(self, outputs: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        hits_B = (outputs.argmax(dim=1) == batch["label"]) * batch["weight"]
        return {"hits": hits_B.sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"accuracy": sums["hits"] / sums["weight"]}

    def tensor_plan(self, model: nn.Module) -> Mapping[str, Any]:
        return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}

    def split(self, model: nn.Module, stage: int, num_stages: int) -> nn.Module:
        layers = layers_of_stage(2, stage, num_stages)
        ends = ["first"] * (stage == 0) + ["head"] * (stage == num_stages - 1)
        return keep_only(model, [*ends, *(f"blocks.{layer}" for layer in layers)])
