"""How a command of searches ends: its exit status, and a file of what it came to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebay_wire.errors import ForebayError, InvalidRequest, NotFound


def status_of(act: Callable[[], int]) -> int:
    """What *act* answers; an error of ours is a sentence: 2 for the arguments, 1 for all else."""
    try:
        return act()
    except ForebayError as error:
        print(f"forebay_trainer: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, (InvalidRequest, NotFound)) else 1


def write_json(path: Path, value: Any) -> None:
    """All of it is there, or that of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
