"""Reads a file of metrics while the trainer writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class MetricsTail:
    """The events of a metrics file, each one returned once, as soon as its line is complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Event]:
        """What came since the last call; nothing while there is no file."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            # An attempt that is killed may leave a torn line, which the next attempt cuts off.
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]
