"""The sinks by the names that ``metrics.sinks`` lists. A sink is opened by (config, folder,
attempt)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from forebay_trainer.metrics import MetricsConfig, Sink
from forebay_trainer.metrics.jsonl import JsonLines

SINKS: Final[Mapping[str, Callable[[MetricsConfig, Path, int], Sink]]] = {
    "jsonl": JsonLines.open,
}
