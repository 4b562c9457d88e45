"""One attempt of a training run, from its configuration: build the parts, train, close them."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

import forebay
from forebay_trainer.checkpoint import CheckpointConfig, Checkpoints
from forebay_trainer.config import setting
from forebay_trainer.data import Data, DataConfig
from forebay_trainer.loop import Reason, StepLength, Trainer
from forebay_trainer.memory import keep_freed_memory
from forebay_trainer.metrics import MetricsWriter, NullMetrics
from forebay_trainer.models import ModelConfig
from forebay_trainer.optim import OptimizerConfig
from forebay_trainer.parallel import Parallel, ParallelConfig
from forebay_trainer.records import RecordWriter
from forebay_trainer.stop import StopSignal
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    folder: str = setting("training-logs", "folder of metrics.jsonl and of the ranks' records")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything about a run; what is not here does not influence it."""

    run: str = setting("default", "name of the run: its generations are saved under it")
    address: str | None = setting(
        None, "daemon: a folder, unix:/…, grpc://host:port; none: as forebay.connect() finds it"
    )
    num_epochs: int = setting(1, "epochs in all, those before a resume included")
    seed: int = setting(0, "of the order of samples and of the first weights")
    num_compute_threads: int = setting(0, "of each rank for torch; 0: as torch decides")
    min_step_seconds: float = setting(
        0.0, "a step takes at least this long: gives a toy model the pace of a real one"
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise InvalidRequest(f"num_epochs must be at least 1, not {self.num_epochs}")


def train(config: TrainConfig) -> Reason:
    """Trains on this rank, from the newest generation of the run if there is one.

    On return the last generation is committed and on disk (``local``). Returns "done" after the
    last epoch and "terminated" after SIGTERM. Raises what forebay raises.
    """
    keep_freed_memory()
    if config.num_compute_threads:
        torch.set_num_threads(config.num_compute_threads)
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        parallel = stack.enter_context(config.parallel.build())
        client = stack.enter_context(forebay.connect(config.address))
        data = stack.enter_context(closing(config.data.build(client, parallel, config.seed)))
        model = parallel.wrap(config.model.build())
        optimizer = config.optimizer.build(model)
        num_steps = data.steps_per_epoch * config.num_epochs
        scheduler = config.optimizer.build_schedule(optimizer, num_steps)
        checkpoints = config.checkpoint.build(
            client,
            config.run,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=data.train_loader,
        )
        stack.enter_context(closing(checkpoints))
        step = checkpoints.restore()
        metrics = stack.enter_context(closing(open_metrics(config, parallel, checkpoints)))
        records = stack.enter_context(closing(open_records(config, parallel, checkpoints)))
        announce(config, parallel, data, checkpoints, metrics)
        trainer = Trainer(
            parallel=parallel,
            data=data,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            checkpoints=checkpoints,
            metrics=metrics,
            records=records,
            stop=stop,
            step=step,
            step_length=StepLength(config.min_step_seconds),
        )
        return trainer.run(config.num_epochs)


def open_metrics(
    config: TrainConfig, parallel: Parallel, checkpoints: Checkpoints
) -> MetricsWriter:
    if not parallel.is_main:
        return NullMetrics()
    return MetricsWriter.open(Path(config.output.folder) / "metrics.jsonl", checkpoints.attempt)


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
    metrics: MetricsWriter,
) -> None:
    """Says on rank 0 what starts, and from where."""
    metrics.write(
        "start",
        step=checkpoints.last_step,
        num_ranks=parallel.num_ranks,
        num_epochs=config.num_epochs,
        steps_per_epoch=data.steps_per_epoch,
        skipped=list(checkpoints.skipped),
    )
    if parallel.is_main:
        origin = f"from step {checkpoints.last_step}" if checkpoints.last_step else "afresh"
        print(
            f"run {config.run}, attempt {checkpoints.attempt}: {origin}, "
            f"{parallel.num_ranks} rank(s) on {parallel.device.type}, "
            f"{data.num_samples} samples, {data.steps_per_epoch} steps an epoch, "
            f"{config.num_epochs} epochs",
            flush=True,
        )
