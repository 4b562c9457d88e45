"""One attempt of a training run, from its recipe: build the parts, train, close them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import torch

from forebay_trainer import config as configuration
from forebay_trainer.averaging import Average, NoAverage
from forebay_trainer.checkpoint import Checkpoints
from forebay_trainer.data import Data, connect
from forebay_trainer.dropout import Draws, drops, replace_dropout
from forebay_trainer.evaluation import Evaluation, Progress
from forebay_trainer.loop import Reason, Trainer
from forebay_trainer.memory import keep_freed_memory
from forebay_trainer.metrics import Metrics
from forebay_trainer.metrics.meter import Meter
from forebay_trainer.optim import Optimization
from forebay_trainer.parallel import Parallel
from forebay_trainer.placement import Placement, unwrapped, use_deterministic_kernels
from forebay_trainer.precision import LossScaler, Precision
from forebay_trainer.random_state import RandomState
from forebay_trainer.recipe import Recipe
from forebay_trainer.records import RecordWriter
from forebay_trainer.settings import TrainConfig
from forebay_trainer.stop import StopSignal
from forebay_trainer.task import Task
from forebay_trainer.watch import Watch
from forebay_wire.errors import InvalidRequest

SIGNAL_SECONDS: Final = 1.0
"""Ranks that are told to end together get to know within so long."""


def train(recipe: Recipe, parallel: Parallel) -> tuple[Reason, dict[str, float]]:
    """Trains on this rank, from the newest generation of the run if there is one; answers why it
    ended, and what the last evaluation of this run found. "left": other ranks were told to end,
    and this one was not, so it may go on with those that stay.

    On return the last generation is committed and on disk (``local``). Raises what forebay raises,
    LossNotFinite, and RankLost if another rank failed.
    """
    config = recipe.config
    set_up_process(config)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        client = stack.enter_context(connect(config.address))
        random = RandomState(parallel.ranks, parallel.device)
        random.seed(config.seed)
        draws = Draws(config.seed)
        task = build_task(recipe, recipe.about(client), parallel, draws)
        precision = Precision(config.precision, parallel.device)
        meter = stack.enter_context(closing(open_meter(config, parallel, task)))
        placement = Placement(
            task,
            parallel,
            precision,
            is_compiled=config.compile,
            is_deterministic=config.deterministic,
            num_pieces=config.parallel.num_microbatches,
            compression=config.parallel.compression,
        )
        data = stack.enter_context(
            closing(config.data.build(client, parallel, task, seed=config.seed, run=config.run))
        )
        if placement.pipeline is not None:
            placement.pipeline.fit(data.part_rows)
        optimization = build_optimization(config, task, placement, data, parallel)
        compression = placement.compression
        compression.attach(placement.modules, optimization.scaler, config.seed)
        progress = Progress(config.evaluation)
        checkpoints = config.checkpoint.build(
            client,
            config.run,
            note={"config": configuration.as_dict(config), "mesh": str(parallel.shape)},
            own_names=None if placement.pipeline is None else own_names(placement),
            **state_of(placement, optimization),
            progress=progress,
            random=random,
            compression=compression,
            loader=data.train_loader,
        )
        stack.enter_context(closing(checkpoints))
        watch = stack.enter_context(Watch(config.watch, parallel, lambda: checkpoints.last_good))
        step = resume(checkpoints, random, config.seed, parallel.data_rank)
        metrics = stack.enter_context(closing(open_metrics(config, parallel, checkpoints, meter)))
        records = stack.enter_context(closing(open_records(config, parallel, checkpoints)))
        announce(config, parallel, data, checkpoints, metrics, compression.resume_note)
        trainer = Trainer(
            config=config,
            task=task,
            parallel=parallel,
            data=data,
            placement=placement,
            optimization=optimization,
            evaluation=Evaluation(task, data, placement, optimization.average, parallel),
            progress=progress,
            checkpoints=checkpoints,
            metrics=metrics,
            records=records,
            watch=watch,
            draws=draws,
            stop=stop,
            step=step,
        )
        reason = trainer.run()
        if reason == "terminated" and not stop.wait(SIGNAL_SECONDS):
            reason = "left"
        parallel.sum([0.0])  # nobody leaves, and takes the meeting point along, before all are done
    return reason, progress.last


def set_up_process(config: TrainConfig) -> None:
    keep_freed_memory()
    if config.num_compute_threads:
        torch.set_num_threads(config.num_compute_threads)
    if config.deterministic:
        use_deterministic_kernels()


def build_task(recipe: Recipe, known: Mapping[str, Any], parallel: Parallel, draws: Draws) -> Task:
    """The recipe's task, its dropout by sample if the run is deterministic."""
    task = recipe.build(known)
    if not recipe.config.deterministic:
        return task
    number = 0
    for module in task.modules.values():
        number = replace_dropout(module, draws, number)
    if parallel.shape.stages > 1 and any(drops(module) for module in task.modules.values()):
        raise InvalidRequest(
            "deterministic: the stages of a pipeline do not know whose samples they see, for "
            "dropout by sample: set dropout to 0, or parallel.num_stages=1"
        )
    return task


def resume(checkpoints: Checkpoints, random: RandomState, seed: int, data_rank: int) -> int:
    """Restores, if there is what to restore; the steps that were taken."""
    random.seed(seed, data_rank)
    resumed = checkpoints.restore()
    if resumed is None:
        return 0
    if random.is_fresh:  # another number of ranks saved it
        random.seed(seed, data_rank, resumed.step)
    return resumed.step


def build_optimization(
    config: TrainConfig, task: Task, placement: Placement, data: Data, parallel: Parallel
) -> Optimization:
    num_steps = data.steps_per_epoch * config.num_epochs
    decay = config.average.decay
    return Optimization(
        config.optimizer,
        task.optimizers(placement.modules, config.optimizer),
        num_steps=num_steps if config.max_steps is None else min(num_steps, config.max_steps),
        parallel=parallel,
        scaler=LossScaler(is_used=config.precision == "fp16"),
        average=NoAverage() if decay is None else Average(decay, placement.weights()),
    )


def state_of(placement: Placement, optimization: Optimization) -> dict[str, Any]:
    """What a generation holds of weights and optimizers, by its name there."""
    state: dict[str, Any] = dict(placement.modules)
    for name, optimizer in optimization.optimizers.items():
        state[optimizer_name(name)] = optimizer
    if not isinstance(optimization.average, NoAverage):
        state["average"] = optimization.average
    if optimization.scaler.is_used:
        state["scaler"] = optimization.scaler
    return state


def own_names(placement: Placement) -> list[str]:
    """What of a generation a stage of a pipeline restores, named as it is saved."""
    found = ["progress", "random", "loader", "scaler", "average.num_updates"]
    for name, module in placement.modules.items():
        weights = [each for each, _ in unwrapped(module).named_parameters()]
        buffers = [each for each, _ in unwrapped(module).named_buffers()]
        found += [f"{name}.{each}" for each in (*weights, *buffers)]
        found += [f"average.weights.{name}.{each}" for each in weights]
        found += [f"{optimizer_name(name)}.state.{each}" for each in weights]
    return found


def optimizer_name(module: str) -> str:
    return "optimizer" if module == "model" else f"{module}_optimizer"


def open_meter(config: TrainConfig, parallel: Parallel, task: Task) -> Meter:
    """*task* as it was built: on the mesh its modules are parts."""
    return config.metrics.meter(
        task.flops(),
        parallel.device,
        config.precision,
        num_ranks=parallel.num_ranks,
        is_main=parallel.is_main,
    )


def open_metrics(
    config: TrainConfig, parallel: Parallel, checkpoints: Checkpoints, meter: Meter
) -> Metrics:
    folder = Path(config.output.folder)
    return config.metrics.build(folder, checkpoints.attempt, meter, is_main=parallel.is_main)


def open_records(config: TrainConfig, parallel: Parallel, checkpoints: Checkpoints) -> RecordWriter:
    return RecordWriter.create(
        Path(config.output.folder) / "records",
        attempt=checkpoints.attempt,
        rank=parallel.rank,
        num_ranks=parallel.num_ranks,
        parent_attempt=checkpoints.parent_attempt,
        parent_step=checkpoints.last_step,
    )


def announce(
    config: TrainConfig,
    parallel: Parallel,
    data: Data,
    checkpoints: Checkpoints,
    metrics: Metrics,
    resume_note: str,
) -> None:
    """Says on rank 0 what starts, and from where."""
    metrics.write(
        "start",
        run=config.run,
        step=checkpoints.last_step,
        num_ranks=parallel.num_ranks,
        num_epochs=config.num_epochs,
        steps_per_epoch=data.steps_per_epoch,
        skipped=list(checkpoints.skipped),
    )
    if parallel.is_main:
        origin = f"from step {checkpoints.last_step}" if checkpoints.last_step else "afresh"
        remark = f"; {resume_note}" if resume_note else ""
        print(
            f"run {config.run}, attempt {checkpoints.attempt}: {origin}, "
            f"{parallel.num_ranks} rank(s) on {parallel.device.type} ({parallel.shape}), "
            f"{data.num_samples} samples, {data.steps_per_epoch} steps an epoch, "
            f"{config.num_epochs} epochs{remark}",
            flush=True,
        )
