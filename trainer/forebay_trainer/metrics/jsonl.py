"""Events as JSON lines: one file, ``metrics.jsonl``, for all attempts of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Self

from forebay_trainer.metrics import Event, MetricsConfig


class JsonLines:
    """Appends lines to one file; a line is whole as soon as it is written."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @classmethod
    def open(cls, config: MetricsConfig, folder: Path, attempt: int) -> Self:
        path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _end_torn_line(path)
        return cls(path.open("a", buffering=1, encoding="utf-8"))

    def write(self, event: Event) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _end_torn_line(path: Path) -> None:
    """Cuts off a last line that a killed attempt left incomplete."""
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
