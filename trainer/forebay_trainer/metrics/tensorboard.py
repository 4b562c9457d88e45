"""Events as scalars of TensorBoard, in the folder ``tensorboard`` beside the other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from forebay_trainer.metrics import Event, MetricsConfig, scalars


class TensorBoard:
    """One file of events an attempt; steps that it takes again hide those of the attempt before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    @classmethod
    def open(cls, config: MetricsConfig, folder: Path, attempt: int) -> Self:
        return cls(folder / "tensorboard")

    def write(self, event: Event) -> None:
        if self._writer is None:  # what it begins from is only known now
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=event["step"] + 1)
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event["step"], walltime=event["time"])
        if event["event"] != "step":
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
