"""All that a recipe or an argument can set; what is not here has no influence on a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from forebay_trainer.averaging import AverageConfig
from forebay_trainer.checkpoint import CheckpointConfig
from forebay_trainer.config import setting
from forebay_trainer.data import DataConfig
from forebay_trainer.evaluation import EvaluationConfig
from forebay_trainer.metrics import MetricsConfig
from forebay_trainer.optim import OptimizerConfig
from forebay_trainer.parallel import ParallelConfig
from forebay_trainer.watch import WatchConfig
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    folder: str = setting("training-logs", "folder of metrics.jsonl and of the ranks' records")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The root of all sections. A recipe adds one more: ``[model]``, its own settings."""

    run: str = setting("default", "name of the run: its generations are saved under it")
    address: str | None = setting(
        None, "daemon: a folder, unix:/…, grpc://host:port; none: as forebay.connect() finds it"
    )
    num_epochs: int = setting(1, "epochs in all, those before a resume included")
    max_steps: int | None = setting(
        None, "optimizer steps in all, if that is before the last epoch's end; none: all epochs"
    )
    seed: int = setting(0, "of the order of samples, of the first weights and of dropout")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "type that forward and backward compute in; weights and optimizer stay fp32"
    )
    compile: bool = setting(False, "torch.compile for each module")
    deterministic: bool = setting(
        False,
        "deterministic kernels; dropout drawn from (seed, step, sample); DDP keeps its buckets",
    )
    num_compute_threads: int = setting(0, "of each rank for torch; 0: as torch decides")
    min_step_seconds: float = setting(
        0.0, "a step takes at least this long: gives a toy model the pace of a real one"
    )
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise InvalidRequest(f"num_epochs must be at least 1, not {self.num_epochs}")
        if self.max_steps is not None and self.max_steps < 1:
            raise InvalidRequest(f"max_steps must be at least 1, not {self.max_steps}")
