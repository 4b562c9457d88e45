"""Checkpoints: the state of a training as packs, and back, through torch's own planners.

Names load at first use, so that reading a description needs no Checkpointer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forebay.checkpoint.checkpointer import Checkpointer, CheckpointReport
    from forebay.checkpoint.dcp import StorageReader, StorageWriter
    from forebay.checkpoint.dcp_folder import export_dcp
    from forebay.checkpoint.export import Exported, export_safetensors
    from forebay.checkpoint.handle import Saved
    from forebay.checkpoint.importing import Imported, import_checkpoint
    from forebay.checkpoint.lazy import LazyTensor, Opened, open
    from forebay.checkpoint.restore import Resumed, Skipped

__all__ = [
    "CheckpointReport",
    "Checkpointer",
    "Exported",
    "Imported",
    "LazyTensor",
    "Opened",
    "Resumed",
    "Saved",
    "Skipped",
    "StorageReader",
    "StorageWriter",
    "export_dcp",
    "export_safetensors",
    "import_checkpoint",
    "open",
]

_LAZY = {
    "Exported": "forebay.checkpoint.export",
    "Imported": "forebay.checkpoint.importing",
    "export_dcp": "forebay.checkpoint.dcp_folder",
    "export_safetensors": "forebay.checkpoint.export",
    "import_checkpoint": "forebay.checkpoint.importing",
    "CheckpointReport": "forebay.checkpoint.checkpointer",
    "Checkpointer": "forebay.checkpoint.checkpointer",
    "LazyTensor": "forebay.checkpoint.lazy",
    "Opened": "forebay.checkpoint.lazy",
    "Resumed": "forebay.checkpoint.restore",
    "Saved": "forebay.checkpoint.handle",
    "Skipped": "forebay.checkpoint.restore",
    "StorageReader": "forebay.checkpoint.dcp",
    "StorageWriter": "forebay.checkpoint.dcp",
    "open": "forebay.checkpoint.lazy",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'forebay.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
