"""The sinks by the names that ``metrics.sinks`` lists. A sink is opened by (config, folder,
attempt)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from forebay_trainer.metrics import MetricsConfig, Sink
from forebay_trainer.metrics.console import Console
from forebay_trainer.metrics.jsonl import JsonLines
from forebay_trainer.metrics.prometheus import Prometheus
from forebay_trainer.metrics.tensorboard import TensorBoard
from forebay_trainer.metrics.wandb import WeightsAndBiases
from forebay_wire.errors import InvalidRequest

SINKS: Final[Mapping[str, Callable[[MetricsConfig, Path, int], Sink]]] = {
    "console": Console.open,
    "jsonl": JsonLines.open,
    "prometheus": Prometheus.open,
    "tensorboard": TensorBoard.open,
    "wandb": WeightsAndBiases.open,
}

NEEDS: Final = {
    "prometheus": ("prometheus_client", "server"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}
"""Package that a sink imports, and the extra that has it."""


def check(name: str) -> None:
    """InvalidRequest for a sink that does not exist, or whose package is not installed."""
    if name not in SINKS:
        raise InvalidRequest(f"sinks: {name!r} is none of {', '.join(SINKS)}")
    package, extra = NEEDS.get(name, (None, None))
    if package is not None and find_spec(package) is None:
        raise InvalidRequest(
            f"sinks: {name} needs the package {package}: pip install 'forebay[{extra}]'"
        )
