"""Whether two values of batches are the same, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def same(one: Any, other: Any) -> bool:
    """Of equal type, shape and bytes: tensors, arrays, lists of them, text, bytes, nested values.

    NaN equals NaN of the same bits.
    """
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        kinds = isinstance(other, np.ndarray) and (one.dtype, one.shape) == (
            other.dtype,
            other.shape,
        )
        return kinds and one.tobytes() == other.tobytes()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
