"""One update of the weights: unscale, measure, clip, step, and on to the next learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import SGD, AdamW, Optimizer

from forebay_trainer.averaging import Average
from forebay_trainer.config import setting
from forebay_trainer.parallel import Parallel
from forebay_trainer.precision import LossScaler
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = setting("adamw", "which optimizer")
    learning_rate: float = setting(1e-3, "the highest learning rate")
    weight_decay: float = setting(0.01, "decay of the weights")
    momentum: float = setting(0.9, "of sgd")
    betas: tuple[float, ...] = setting((0.9, 0.999), "of adamw: decay of its two averages")
    max_norm: float | None = setting(
        None, "gradients are scaled down to this norm over all weights; none: never"
    )
    warmup_steps: int = setting(0, "steps in which the learning rate grows from near 0")
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt"] = setting(
        "cosine", "after the warm-up; linear and cosine end near final_share at the last step"
    )
    final_share: float = setting(0.0, "of the learning rate, where linear and cosine end")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise InvalidRequest(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.warmup_steps < 0:
            raise InvalidRequest(f"warmup_steps must be at least 0, not {self.warmup_steps}")
        if len(self.betas) != 2:
            raise InvalidRequest(f"betas needs 2 numbers, not {self.betas}")
        if self.max_norm is not None and self.max_norm <= 0:
            raise InvalidRequest(f"max_norm must be above 0, not {self.max_norm}")
        if not 0 <= self.final_share <= 1:
            raise InvalidRequest(f"final_share must be between 0 and 1, not {self.final_share}")

    def build(self, weights: Iterable[Any]) -> Optimizer:
        """*weights*: parameters, or groups of them with their own settings, as torch takes them."""
        weights = list(weights)
        foreach = None if laid_out_alike(weights) else False
        if self.name == "sgd":
            return SGD(
                weights,
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                foreach=foreach,
            )
        return AdamW(
            weights,
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            weight_decay=self.weight_decay,
            foreach=foreach,
        )

    def share(self, step: int, num_steps: int) -> float:
        """The share of the learning rate that step ``step`` (counted from 0) of all uses."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "inverse_sqrt":
            return math.sqrt(max(1, self.warmup_steps) / max(1, step))
        done = min(1.0, (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps))
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final_share + (1 - self.final_share) * left


def laid_out_alike(weights: Iterable[Any]) -> bool:
    """Whether all weights, or all of all groups, lie on one mesh, or none of them on any: kernels
    that take many tensors at once (torch's choice on GPUs) refuse others."""
    groups = (each["params"] if isinstance(each, dict) else [each] for each in weights)
    flat = [weight for group in groups for weight in group]
    return len({each.device_mesh if isinstance(each, DTensor) else None for each in flat}) <= 1


class Optimization:
    """The optimizers of a run, by the names of their modules, and what belongs to an update.

    A learning rate is a pure function of the step, so that there is no schedule to be saved, and a
    changed setting counts from the next start on.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        optimizers: Mapping[str, Optimizer],
        *,
        num_steps: int,
        parallel: Parallel,
        scaler: LossScaler,
        average: Average,
    ) -> None:
        self.optimizers = dict(optimizers)
        self.scaler = scaler
        self.average = average
        self._config = config
        self._num_steps = num_steps
        self._parallel = parallel
        self._rates = {
            name: [group["lr"] for group in optimizer.param_groups]
            for name, optimizer in optimizers.items()
        }

    @property
    def loss_factor(self) -> float:
        """What a rank's share of the loss is multiplied by: gradients are averaged over the ranks,
        where shares have to be added up, and fp16 needs large ones."""
        return self._parallel.shape.num_data * self.scaler.scale

    def learning_rate(self, step: int) -> float:
        """That of the first optimizer in step *step*, counted from 0."""
        rates = next(iter(self._rates.values()))
        return float(rates[0] * self._config.share(step, self._num_steps))

    def update(self, name: str, step: int) -> float:
        """Applies the gradients of one optimizer and clears them; their norm before clipping.

        A norm that is not finite under fp16 means that the scale was too large: nothing is applied.
        """
        optimizer = self.optimizers[name]
        weights = [w for g in optimizer.param_groups for w in g["params"] if w.grad is not None]
        norm_scaled = gradient_norm(weights, self._parallel)
        norm = norm_scaled / self.scaler.scale
        scale = self.scaler.scale
        if self.scaler.accepts(norm_scaled):
            limit = self._config.max_norm
            factor = 1.0 if limit is None or norm <= limit else limit / norm
            if factor / scale != 1.0:
                for weight in weights:
                    weight.grad.mul_(factor / scale)
            share = self._config.share(step, self._num_steps)
            for group, rate in zip(optimizer.param_groups, self._rates[name], strict=True):
                group["lr"] = rate * share
            optimizer.step()
        optimizer.zero_grad()
        return norm


def gradient_norm(weights: Iterable[nn.Parameter], parallel: Parallel) -> float:
    """The 2-norm of all gradients together, the same on every rank; a collective on a mesh."""
    alike: dict[object, list[Tensor]] = {}
    for weight in weights:
        grad = weight.grad
        assert grad is not None
        cut = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        alike.setdefault(cut, []).append(grad)
    square = torch.zeros((), dtype=torch.float64, device=parallel.device)
    for grads in alike.values():
        norm = get_total_norm(grads)
        square += (norm.full_tensor() if isinstance(norm, DTensor) else norm).double() ** 2
    if parallel.shape.stages > 1:  # each stage has weights of its own
        assert parallel.mesh is not None
        dist.all_reduce(square, group=parallel.mesh["stage"].get_group())
    return math.sqrt(float(square))
