"""What the ready-made transforms share: columns of batches by name, and libraries that may lack."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

import torch

from forebay.dataset.transforms import Batch
from forebay_wire.errors import InvalidRequest

CACHED_NUMBERS: Final = 1 << 18
"""So many at a time: as floats they stay in a core's cache from one step to the next."""


def column_of(batch: Batch, name: str, who: str) -> Any:
    """Column *name* of *batch*; InvalidRequest that says *who* misses it."""
    if name not in batch:
        raise InvalidRequest(
            f"{who}({name!r}): the batch has no such column; it has {', '.join(sorted(batch))}"
        )
    return batch[name]


def texts_of(batch: Batch, name: str, who: str) -> list[str | None]:
    """A column of text: None where it is missing."""
    values = column_of(batch, name, who)
    if isinstance(values, torch.Tensor) or any(
        value is not None and not isinstance(value, str) for value in values
    ):
        raise InvalidRequest(f"{who}({name!r}): expected a column of text (string)")
    found: list[str | None] = values
    return found


def required(module: str, extra: str, who: str) -> Any:
    """The library *module*; InvalidRequest with the command that installs it."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise InvalidRequest(f"{who} needs {module}: pip install 'forebay[{extra}]'") from error


def joined(values: Sequence[torch.Tensor | None]) -> Any:
    """One tensor of *values* of equal shape and type, zeros where one is None; else the list."""
    there = [value for value in values if value is not None]
    if not there or any(
        (one.shape, one.dtype) != (there[0].shape, there[0].dtype) for one in there
    ):
        return list(values)
    if len(there) == len(values):
        return torch.stack(there)
    hole = torch.zeros_like(there[0])
    return torch.stack([hole if value is None else value for value in values])
