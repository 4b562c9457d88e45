"""``--dry-run``: what a run would do, read, hold in memory and save, without a step of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from forebay_trainer.checkpoint import advised_seconds
from forebay_trainer.data import connect
from forebay_trainer.parallel import Parallel, Shape
from forebay_trainer.recipe import Recipe
from forebay_trainer.task import Task
from forebay_trainer.units import size

WEIGHT_BYTES: Final = 4
"""Weights, gradients and optimizer states are fp32."""

STATES: Final = {"adamw": 2, "sgd": 1}
"""Numbers that each optimizer keeps for a weight."""

COPY_BYTES_PER_SECOND: Final = 1 << 30
"""A cautious speed of the copy that a save waits for, where none has been measured."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes in bytes, of all ranks together unless it says otherwise."""

    name: str
    run: str
    shape: Shape
    num_ranks: int
    num_weights: dict[str, tuple[int, int]]
    """Module to its weights: all, and those that are trained."""
    num_states: int
    """Numbers kept beside each trained weight, the average's included."""
    num_samples: int
    data_bytes: int
    """Of the dataset version, as it is stored; a split reads its share."""
    num_epochs: int
    steps_per_epoch: int
    num_steps: int
    every_steps: int
    mtbf_seconds: float

    @property
    def num_all(self) -> int:
        return sum(all_ for all_, _ in self.num_weights.values())

    @property
    def num_trained(self) -> int:
        return sum(trained for _, trained in self.num_weights.values())

    @property
    def cut_into(self) -> int:
        """How many ranks share each weight, if all of them can be cut."""
        sharded = self.shape.shards if self.shape.is_sharded else 1
        return sharded * self.shape.tensor * self.shape.stages

    @property
    def rank_bytes(self) -> int:
        """Of weights, gradients and optimizer states on one rank; activations come on top."""
        numbers = self.num_all + (1 + self.num_states) * self.num_trained
        return numbers * WEIGHT_BYTES // self.cut_into

    @property
    def generation_bytes(self) -> int:
        return (self.num_all + self.num_states * self.num_trained) * WEIGHT_BYTES

    @property
    def num_generations(self) -> int:
        every = self.every_steps or self.num_steps
        return -(-self.num_steps // max(1, every))

    def lines(self) -> Iterator[str]:
        yield f"recipe {self.name}, run {self.run}, {self.num_ranks} rank(s): {self.shape}"
        for module, (all_, trained) in self.num_weights.items():
            frozen = "" if trained == all_ else f", {trained:,} of them trained"
            yield f"{module}: {all_:,} weights{frozen}"
        yield (
            f"memory of each rank: {size(self.rank_bytes)} for weights, gradients and optimizer; "
            "activations and a batch come on top"
        )
        yield (
            f"data: {self.num_samples:,} samples an epoch from {size(self.data_bytes)}, "
            f"{self.num_epochs} epoch(s)"
        )
        yield f"steps: {self.steps_per_epoch:,} an epoch, {self.num_steps:,} in all"
        written = size(self.generation_bytes * self.num_generations)
        yield (
            f"checkpoints: {size(self.generation_bytes)} each, {self.num_generations:,} of them, "
            f"one every {self.every_steps or self.num_steps} steps: at most {written} written"
        )
        yield self.advice()

    def advice(self) -> str:
        parts = self.shape.num_data * self.shape.tensor * self.shape.stages
        cost = max(1e-3, self.generation_bytes / parts / COPY_BYTES_PER_SECOND)
        seconds = advised_seconds(self.mtbf_seconds, cost)
        return (
            f"interval: a save would hold the run up by about {cost:.3f} s; with a failure every "
            f"{self.mtbf_seconds / 3600:g} h the least time is lost with one every {seconds:.0f} s"
        )


def plan(recipe: Recipe, num_ranks: int, mtbf_seconds: float) -> Plan:
    """Reads the dataset's description and builds the modules; trains and writes nothing.

    Raises what `train` would raise for a recipe, a mesh or a dataset that is not as it should be.
    """
    config = recipe.config
    shape = config.parallel.shape(num_ranks)
    alone = Parallel(
        rank=0, shape=Shape(), device=torch.device("cpu"), backend="gloo", timeout_seconds=1.0
    )
    with ExitStack() as stack:
        client = stack.enter_context(connect(config.address))
        torch.manual_seed(config.seed)
        task = recipe.build(recipe.about(client))
        check_cuts(task, shape)
        data = stack.enter_context(
            closing(config.data.build(client, alone, task, seed=config.seed, run=config.run))
        )
        steps = data.steps_per_epoch * config.num_epochs
        return Plan(
            name=recipe.name,
            run=config.run,
            shape=shape,
            num_ranks=num_ranks,
            num_weights={name: count(module) for name, module in task.modules.items()},
            num_states=STATES[config.optimizer.name] + (config.average.decay is not None),
            num_samples=data.num_samples,
            data_bytes=data.num_bytes,
            num_epochs=config.num_epochs,
            steps_per_epoch=data.steps_per_epoch,
            num_steps=steps if config.max_steps is None else min(steps, config.max_steps),
            every_steps=config.checkpoint.every_steps,
            mtbf_seconds=mtbf_seconds,
        )


def check_cuts(task: Task, shape: Shape) -> None:
    """InvalidRequest for a mesh that the recipe's model cannot be cut for."""
    for module in task.modules.values():
        if shape.tensor > 1:
            task.tensor_plan(module)
        if shape.stages > 1:
            task.split(copy.deepcopy(module), 0, shape.stages)


def count(module: nn.Module) -> tuple[int, int]:
    """Weights of a module: all, and those that are trained."""
    weights = list(module.parameters())
    return (
        sum(weight.numel() for weight in weights),
        sum(weight.numel() for weight in weights if weight.requires_grad),
    )
