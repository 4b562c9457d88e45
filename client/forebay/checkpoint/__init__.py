"""Checkpoints: the state of a training as packs, and back, through torch's own planners.

Names load at first use, so that reading a description needs no Checkpointer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forebay.checkpoint.checkpointer import Checkpointer, CheckpointReport
    from forebay.checkpoint.dcp import StorageReader, StorageWriter
    from forebay.checkpoint.handle import Saved
    from forebay.checkpoint.restore import Resumed, Skipped

__all__ = [
    "CheckpointReport",
    "Checkpointer",
    "Resumed",
    "Saved",
    "Skipped",
    "StorageReader",
    "StorageWriter",
]

_LAZY = {
    "CheckpointReport": "forebay.checkpoint.checkpointer",
    "Checkpointer": "forebay.checkpoint.checkpointer",
    "Resumed": "forebay.checkpoint.restore",
    "Saved": "forebay.checkpoint.handle",
    "Skipped": "forebay.checkpoint.restore",
    "StorageReader": "forebay.checkpoint.dcp",
    "StorageWriter": "forebay.checkpoint.dcp",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'forebay.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
