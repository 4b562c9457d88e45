"""What trainers import: datasets, loaders and checkpoints, kept by a Forebay daemon."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from forebay import forking as _forking  # noqa: F401 - before Arrow or gRPC are loaded
from forebay_wire.durability import Durability
from forebay_wire.errors import (
    AlreadyExists,
    AlreadyRunning,
    Conflict,
    DaemonUnavailable,
    DeadlineExceeded,
    Fenced,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    OriginChanged,
    PermissionDenied,
    ResourceExhausted,
    SampleTooLarge,
    SchemaMismatch,
    StorageError,
    TooManyBadSamples,
    Unauthenticated,
    UnsupportedObject,
    VersionMismatch,
)
from forebay_wire.keep import Keep

if TYPE_CHECKING:
    from forebay.checkpoint import Checkpointer
    from forebay.client import Client, connect
    from forebay.dataset.dataset import Dataset
    from forebay.dataset.images import decode_images
    from forebay.dataset.loader import DataLoader
    from forebay.dataset.mixture import Mixture, Stage
    from forebay.dataset.packing import Packed
    from forebay.dataset.parallel import WriteSession
    from forebay.dataset.schema import Array
    from forebay.dataset.stream import StreamingDataset
    from forebay.dataset.transforms import per_sample
    from forebay.dataset.write import DatasetWriter

__all__ = [
    "AlreadyExists",
    "AlreadyRunning",
    "Array",
    "Checkpointer",
    "Client",
    "Conflict",
    "DaemonUnavailable",
    "DataLoader",
    "Dataset",
    "DatasetWriter",
    "DeadlineExceeded",
    "Durability",
    "Fenced",
    "ForebayError",
    "IntegrityError",
    "InvalidRequest",
    "Keep",
    "LimitExceeded",
    "Mixture",
    "NotFound",
    "OriginChanged",
    "Packed",
    "PermissionDenied",
    "ResourceExhausted",
    "SampleTooLarge",
    "SchemaMismatch",
    "Stage",
    "StorageError",
    "StreamingDataset",
    "TooManyBadSamples",
    "Unauthenticated",
    "UnsupportedObject",
    "VersionMismatch",
    "WriteSession",
    "connect",
    "decode_images",
    "per_sample",
]

# Resolved at first use (PEP 562): importing forebay loads neither torch nor gRPC nor pyarrow.
_LAZY = {
    "Array": "forebay.dataset.schema",
    "Checkpointer": "forebay.checkpoint",
    "Client": "forebay.client",
    "DataLoader": "forebay.dataset.loader",
    "Dataset": "forebay.dataset.dataset",
    "DatasetWriter": "forebay.dataset.write",
    "Mixture": "forebay.dataset.mixture",
    "Packed": "forebay.dataset.packing",
    "Stage": "forebay.dataset.mixture",
    "StreamingDataset": "forebay.dataset.stream",
    "WriteSession": "forebay.dataset.parallel",
    "connect": "forebay.client",
    "decode_images": "forebay.dataset.images",
    "per_sample": "forebay.dataset.transforms",
}

_NEEDS_TORCH = {"Checkpointer", "DataLoader", "StreamingDataset", "decode_images", "per_sample"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'forebay' has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name == "torch" and name in _NEEDS_TORCH:
            raise ImportError(
                f"forebay.{name} needs PyTorch: pip install 'forebay[torch]'"
            ) from error
        raise
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
