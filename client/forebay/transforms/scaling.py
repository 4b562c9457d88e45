"""Numbers brought to a common scale, by statistics of the dataset or given ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from forebay.dataset.dataset import Dataset
from forebay.dataset.memory import batch_memory
from forebay.dataset.statistics import ColumnStatistics
from forebay.dataset.transforms import Batch
from forebay.transforms.columns import CACHED_NUMBERS, column_of
from forebay_wire.errors import InvalidRequest

Numbers = float | Sequence[float]

_known: Final[dict[tuple[str, str], ColumnStatistics]] = {}
"""By identity of a version or split, and column: neither ever changes."""


class Scale:
    """(x - shift) / width. Thread-safe, picklable: it holds its figures, not the dataset."""

    def __init__(self, who: str, column: str, shift: Numbers, width: Numbers, dim: int) -> None:
        self.who = who
        self.column = column
        self.dim = dim
        self.shift = torch.as_tensor(shift, dtype=torch.float32)
        widths = torch.as_tensor(width, dtype=torch.float32)
        if self.shift.dim() > 1 or widths.dim() > 1:
            raise InvalidRequest(f"{who}({column!r}): a number, or one for each channel")
        self.width = torch.where(widths == 0, 1.0, widths)  # what is always the same becomes 0

    def __call__(self, batch: Batch) -> Batch:
        values = column_of(batch, self.column, self.who)
        if isinstance(values, torch.Tensor):
            return {**batch, self.column: self._scaled(values, self.dim)}
        inner = self.dim if self.dim < 0 else self.dim - 1
        scaled = [None if one is None else self._scaled(one, inner) for one in values]
        return {**batch, self.column: scaled}

    def _scaled(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        shift, width = self._along(self.shift, values, dim), self._along(self.width, values, dim)
        if values.is_nested or values.dim() < 2 or dim in (0, -values.dim()):
            return (values.float() - shift).div_(width)
        found = torch.from_numpy(batch_memory.empty(values.shape, np.dtype(np.float32)))
        some = max(1, CACHED_NUMBERS // max(1, values[:1].numel()))
        for start in range(0, len(values), some):
            part = found[start : start + some].copy_(values[start : start + some])
            part.sub_(shift).div_(width)
        return found

    def _along(self, numbers: torch.Tensor, values: torch.Tensor, dim: int) -> torch.Tensor:
        if numbers.dim() == 0:
            return numbers
        if not -values.dim() <= dim < values.dim() or values.shape[dim] != len(numbers):
            raise InvalidRequest(
                f"{self.who}({self.column!r}): {len(numbers)} figures do not fit dimension {dim} "
                f"of {tuple(values.shape)}: say which one has the channels with dim="
            )
        shape = [1] * values.dim()
        shape[dim] = len(numbers)
        return numbers.view(shape)


def standardize(
    column: str,
    dataset: Dataset | None = None,
    *,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    dim: int = -1,
) -> Scale:
    """A ``transform=`` that makes *column* float32 of mean 0 and standard deviation 1.

    By *mean* and *std*: numbers, or one for each channel (dimension *dim* of the batch's tensor);
    or by those of all values of *dataset*, which is read once for it by each process that asks:
    give it the split that is trained on.
    """
    if dataset is not None:
        _check_given("standardize", column, mean, std, are_given=False)
        found = _statistics("standardize", column, dataset)
        mean, std = found.mean, found.std
    _check_given("standardize", column, mean, std, are_given=True)
    assert mean is not None
    assert std is not None
    return Scale("standardize", column, mean, std, dim)


def normalize(
    column: str,
    dataset: Dataset | None = None,
    *,
    low: Numbers | None = None,
    high: Numbers | None = None,
    dim: int = -1,
) -> Scale:
    """A ``transform=`` that makes *column* float32 with 0 where it was *low* and 1 where it was
    *high*: given as for :func:`standardize`, or the extremes of *dataset*."""
    if dataset is not None:
        _check_given("normalize", column, low, high, are_given=False)
        found = _statistics("normalize", column, dataset)
        low, high = found.min, found.max
    _check_given("normalize", column, low, high, are_given=True)
    assert low is not None
    assert high is not None
    lowest = torch.as_tensor(low, dtype=torch.float64)
    width = torch.as_tensor(high, dtype=torch.float64) - lowest
    return Scale("normalize", column, lowest.tolist(), width.tolist(), dim)


def _check_given(who: str, column: str, *figures: Any, are_given: bool) -> None:
    if any((figure is not None) != are_given for figure in figures):
        raise InvalidRequest(
            f"{who}({column!r}): give a dataset to take its statistics from, or both figures"
        )


def _statistics(who: str, column: str, dataset: Dataset) -> ColumnStatistics:
    key = (dataset.identity, column)
    found = _known.get(key)
    if found is None:
        found = _known[key] = dataset.statistics([column])[column]
    if found.of != "values" or not found.num_values:
        raise InvalidRequest(
            f"{who}({column!r}): {dataset.name} has no numbers there to take statistics of; "
            "give the figures themselves"
        )
    return found
