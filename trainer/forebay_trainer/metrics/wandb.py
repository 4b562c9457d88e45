"""Events as a run of Weights & Biases; offline, that is files to be synchronised later."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from forebay_trainer.metrics import Event, MetricsConfig, scalars


class WeightsAndBiases:
    """All attempts of a run are one run there, by its name."""

    def __init__(self, config: MetricsConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._run: Any = None

    @classmethod
    def open(cls, config: MetricsConfig, folder: Path, attempt: int) -> Self:
        folder.mkdir(parents=True, exist_ok=True)  # else it would take another one
        return cls(config, folder)

    def write(self, event: Event) -> None:
        if self._run is None:
            self._run = self._begin(event["run"])
        # Their own counter of steps only grows, and a resume takes steps again: ours is a value.
        self._run.log({"step": event["step"], "attempt": event["attempt"], **scalars(event)})

    def _begin(self, name: str) -> Any:
        import wandb

        run = wandb.init(
            project=self._config.wandb_project,
            name=name,
            id=re.sub(r"[^\w-]", "-", name)[:128],
            resume="allow",
            mode=self._config.wandb_mode,
            dir=str(self._folder),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
