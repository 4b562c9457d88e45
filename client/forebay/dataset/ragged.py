"""Lists of numbers of different lengths as tensors of a batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.lists import Lists
from forebay.dataset.schema import Column
from forebay_wire.errors import InvalidRequest

STYLES: Final = ("list", "pad", "nested")

_lock = threading.Lock()
"""Held where nested tensors are made: torch numbers their shapes without a lock of its own."""


class Ragged:
    """How the lists of a batch become tensors. Picklable, thread-safe."""

    def __init__(self, style: str, pad_value: float) -> None:
        if style not in STYLES:
            raise InvalidRequest(f'ragged={style!r}: "list", "pad" or "nested"')
        if style != "pad" and pad_value != 0:
            raise InvalidRequest('pad_value belongs to ragged="pad"')
        self.style = style
        self.pad_value = pad_value
        if style == "nested":
            # What it imports at its first use must not be imported by a thread beside a fork.
            _nested(np.zeros(0), np.zeros(0, dtype=np.int64))

    @property
    def is_flat(self) -> bool:
        """Whether it takes lists end to end."""
        return self.style != "list"

    def check(self, lists: Iterable[Column], names: Collection[str]) -> None:
        """Raise unless the columns *lists*, of a batch with columns *names*, can become tensors."""
        for column in lists if self.style == "pad" else ():
            check_pad(self.pad_value, column.dtype)
            if lengths_of(column.name) in names:
                raise InvalidRequest(
                    f"column {lengths_of(column.name)!r} is in the way of the lengths of "
                    f"{column.name!r}: leave it out with columns=[...]"
                )

    def tensors(self, name: str, lists: Lists) -> dict[str, torch.Tensor]:
        """What the batch has of a column."""
        if self.style == "nested":
            return {name: _nested(lists.values, lists.lengths)}
        return padded(name, lists, self.pad_value)


def padded(name: str, lists: Lists, pad_value: float = 0) -> dict[str, torch.Tensor]:
    """A tensor ``(rows, longest)`` of the *lists* with *pad_value* behind them, and the lengths."""
    lengths = lists.lengths
    shape = (len(lengths), int(lengths.max(initial=0)))
    if len(lists.values) == shape[0] * shape[1]:
        whole = lists.values.reshape(shape)
    else:
        whole = np.full(shape, pad_value, dtype=lists.values.dtype)
        whole[np.arange(shape[1]) < lengths[:, None]] = lists.values
    return {name: torch.from_numpy(whole), lengths_of(name): torch.from_numpy(lengths)}


def lengths_of(name: str) -> str:
    """The column of the lengths of the padded column *name*."""
    return f"{name}_lengths"


def check_pad(value: float, dtype: np.dtype[Any] | None) -> None:
    """Raise unless *value* is a *dtype*."""
    if dtype is None or dtype.kind == "f":
        return
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if value != int(value) or not low <= value <= high:
        raise InvalidRequest(f"pad_value={value} is no {dtype}: {low} to {high}")


def _nested(values: NDArray[Any], lengths: NDArray[np.int64]) -> torch.Tensor:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    with _lock:
        return torch.nested.nested_tensor_from_jagged(
            torch.from_numpy(values), torch.from_numpy(offsets)
        )


def _forget_lock() -> None:
    """In a forked child: another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
