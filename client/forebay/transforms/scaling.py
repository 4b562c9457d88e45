"""Numbers brought to a common scale, by statistics of the dataset or given ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from forebay.dataset.dataset import Dataset
from forebay.dataset.kept_statistics import training_part
from forebay.dataset.memory import batch_memory
from forebay.dataset.moments import Figures
from forebay.dataset.statistics import ColumnStatistics
from forebay.dataset.transforms import Batch, OfTraining
from forebay.transforms.columns import CACHED_NUMBERS, column_of
from forebay_wire.errors import InvalidRequest

Numbers = float | Sequence[float]

NEAR: Final = 16.0
"""Widths from 0: a shift that is not further is subtracted in float32 from what float32 keeps,
wrong by no more than a millionth of the width."""

KEPT_BY_FLOAT32: Final = frozenset(
    (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16),
        *(torch.float16, torch.bfloat16, torch.float32),
    )
)

_known: Final[dict[tuple[str, str, int | None], ColumnStatistics]] = {}
"""By identity of a version or split, column and dimension: none of them ever changes."""


class Scale:
    """(x - shift) / width. Thread-safe, picklable: it holds its figures, not the dataset."""

    def __init__(self, who: str, column: str, shift: Numbers, width: Numbers, dim: int) -> None:
        self.who = who
        self.column = column
        self.dim = dim
        self._take(shift, width)

    def _take(self, shift: Numbers, width: Numbers) -> None:
        self.shift = torch.as_tensor(shift, dtype=torch.float64)
        widths = torch.as_tensor(width, dtype=torch.float64)
        sizes = (self.shift.numel(), widths.numel())
        if self.shift.dim() > 1 or widths.dim() > 1 or 0 in sizes:
            raise InvalidRequest(f"{self.who}({self.column!r}): a number, or one for each channel")
        self.width = torch.where(widths == 0, 1.0, widths)  # what is always the same becomes 0
        shifts, widths = self.shift.abs(), self.width.abs()
        narrowest, widest = widths.min().item(), max(shifts.max().item(), widths.max().item())
        self._is_near = (
            shifts.max().item() <= NEAR * narrowest and narrowest > 1e-30 and widest < 1e30
        )

    def __call__(self, batch: Batch) -> Batch:
        values = column_of(batch, self.column, self.who)
        if isinstance(values, torch.Tensor):
            return {**batch, self.column: self._scaled(values, self.dim)}
        inner = self.dim if self.dim < 0 else self.dim - 1
        scaled = [None if one is None else self._scaled(one, inner) for one in values]
        return {**batch, self.column: scaled}

    def _scaled(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        shift, width = self._along(self.shift, values, dim), self._along(self.width, values, dim)
        is_exact = self._is_near and values.dtype in KEPT_BY_FLOAT32
        shift, width = (shift.float(), width.float()) if is_exact else (shift, width)
        if values.is_nested or values.dim() < 2 or dim in (0, -values.dim()):
            return (values.to(shift.dtype) - shift).div_(width).float()
        found = torch.from_numpy(batch_memory.empty(values.shape, np.dtype(np.float32)))
        some = max(1, CACHED_NUMBERS // max(1, values[:1].numel()))
        for start in range(0, len(values), some):
            part, own = found[start : start + some], values[start : start + some]
            if is_exact:
                part.copy_(own).sub_(shift).div_(width)
            else:
                part.copy_((own.double() - shift).div_(width))
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


class ScaleByStatistics(Scale, OfTraining):
    """A :class:`Scale` by the statistics of a dataset: of the one given, or of the training part of
    the first that a loader reads with it. The same figures ever after, also in copies by pickle."""

    def __init__(
        self,
        who: str,
        column: str,
        dim: int | None,
        figures: Callable[[ColumnStatistics | Figures], tuple[float, float]],
    ) -> None:
        super().__init__(who, column, 0.0, 1.0, -1 if dim is None else dim)
        self._channel_dim = dim
        self._figures = figures
        self._is_given = False
        self.source: str | None = None
        """The dataset, version and split whose figures they are; None: of none yet."""
        self._taken: tuple[str, int, str | None] | None = None

    def take_of(self, dataset: Dataset) -> None:
        """Take the figures of all that *dataset* is."""
        found = _statistics(self.who, self.column, dataset, self._channel_dim)
        each = (found,) if found.channels is None else found.channels
        shifts, widths = zip(*(self._figures_of(one, dataset) for one in each), strict=True)
        is_one = found.channels is None
        self._take(shifts[0] if is_one else shifts, widths[0] if is_one else widths)
        self._taken = (dataset.name, dataset.version, dataset.split)
        self.source = f"{dataset.name} v{dataset.version}"
        self.source += "" if dataset.split is None else f" split {dataset.split}"

    def _figures_of(self, one: ColumnStatistics | Figures, dataset: Dataset) -> tuple[float, float]:
        shift, width = self._figures(one)
        if math.isfinite(shift) and math.isfinite(width):
            return shift, width
        assert one.min is not None
        assert one.max is not None
        is_finite = math.isfinite(one.min) and math.isfinite(one.max)
        raise InvalidRequest(
            f"{self.who}({self.column!r}): values of {dataset.name} are "
            f"{'too large for float64 to scale by' if is_finite else 'infinite'} ({one.min} to "
            f"{one.max}); give the figures themselves"
        )

    def given(self, dataset: Dataset) -> ScaleByStatistics:
        """Itself, with the figures of *dataset*, whatever a loader reads."""
        self.take_of(dataset)
        self._is_given = True
        return self

    def learn(self, dataset: Any) -> None:
        if self._is_given:
            return
        if not isinstance(dataset, Dataset):
            raise InvalidRequest(
                f"{self.who}({self.column!r}): of {type(dataset).__name__} it is not clear whose "
                f"statistics to take: {self.who}({self.column!r}, dataset)"
            )
        if self._taken is None:
            self.take_of(training_part(dataset))
            return
        name, version, split = self._taken
        if dataset.name != name:
            raise InvalidRequest(
                f"{self.who}({self.column!r}) has the statistics of {self.source}, and this loader "
                f"reads {dataset.name!r}: say whose it shall have, {self.who}({self.column!r}, "
                "dataset), or make another one"
            )
        if dataset.split is not None and dataset.split == split:
            return
        other = training_part(dataset)
        if other.split == split or (other.split is None and other.version != version):
            return  # what grew since, whose rows have no splits yet
        what = "the whole version" if other.split is None else f"split {other.split!r}"
        raise InvalidRequest(
            f"{self.who}({self.column!r}) has the statistics of {self.source}; what this loader "
            f"reads is trained on {what}: make one for each fold or split, or say whose figures "
            f"it shall have, {self.who}({self.column!r}, dataset)"
        )

    def __call__(self, batch: Batch) -> Batch:
        if self.source is None:
            raise InvalidRequest(
                f"{self.who}({self.column!r}) takes its figures when a loader is made with it; "
                "elsewhere give a dataset to take its statistics from, or both figures"
            )
        return super().__call__(batch)


def standardize(
    column: str,
    dataset: Dataset | None = None,
    *,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    dim: int | None = None,
) -> Scale:
    """A ``transform=`` that makes *column* float32 of mean 0 and standard deviation 1.

    By *mean* and *std*: numbers, or one for each channel (dimension *dim* of the batch's tensor,
    default: the last).

    Else by statistics: of *dataset*, or of what the first loader with this transform trains on: the
    split ``train`` of the version that it reads, of a fold its training part, or the whole version
    where there is no such split; never of a test split. Those of all values, or, with *dim*, of
    each channel. They are computed once and kept with the version (:meth:`Dataset.statistics`).
    """
    if not _are_given("standardize", column, dataset, mean, std):
        scale = ScaleByStatistics("standardize", column, dim, _mean_and_std)
        return scale if dataset is None else scale.given(dataset)
    assert mean is not None
    assert std is not None
    return Scale("standardize", column, mean, std, -1 if dim is None else dim)


def normalize(
    column: str,
    dataset: Dataset | None = None,
    *,
    low: Numbers | None = None,
    high: Numbers | None = None,
    dim: int | None = None,
) -> Scale:
    """A ``transform=`` that makes *column* float32 with 0 where it was *low* and 1 where it was
    *high*: given, or by the extremes of what is trained on, as for :func:`standardize`."""
    if not _are_given("normalize", column, dataset, low, high):
        scale = ScaleByStatistics("normalize", column, dim, _low_and_width)
        return scale if dataset is None else scale.given(dataset)
    assert low is not None
    assert high is not None
    lowest = torch.as_tensor(low, dtype=torch.float64)
    width = torch.as_tensor(high, dtype=torch.float64) - lowest
    return Scale("normalize", column, lowest.tolist(), width.tolist(), -1 if dim is None else dim)


def _mean_and_std(found: ColumnStatistics | Figures) -> tuple[float, float]:
    if found.mean is None or found.std is None:
        return math.nan, math.nan
    return found.mean, found.std


def _low_and_width(found: ColumnStatistics | Figures) -> tuple[float, float]:
    assert found.min is not None
    assert found.max is not None
    return float(found.min), float(found.max - found.min)


def _are_given(who: str, column: str, dataset: Dataset | None, *figures: Numbers | None) -> bool:
    """Whether the figures are; else they come of statistics. InvalidRequest for a part of them."""
    given = [figure is not None for figure in figures]
    if all(given) and dataset is None:
        return True
    if any(given):
        raise InvalidRequest(
            f"{who}({column!r}): give a dataset to take its statistics from, or both figures"
        )
    return False


def _statistics(who: str, column: str, dataset: Dataset, dim: int | None) -> ColumnStatistics:
    key = (dataset.identity, column, dim)
    found = _known.get(key)
    if found is None:
        along = {} if dim is None else {column: _dimension_of_sample(who, column, dataset, dim)}
        found = _known[key] = dataset.statistics([column], along=along)[column]
    channels = (found,) if found.channels is None else found.channels
    if found.of != "values" or not all(one.num_values for one in channels):
        raise InvalidRequest(
            f"{who}({column!r}): {dataset.name} has no numbers there to take statistics of; "
            "give the figures themselves"
        )
    return found


def _dimension_of_sample(who: str, column: str, dataset: Dataset, dim: int) -> int:
    """*dim* counts those of a batch, of which the first one is that of samples."""
    (found,) = dataset.columns([column])
    count = len(found.shape)
    if found.kind != "array" or not (0 < dim <= count or -count <= dim < 0):
        raise InvalidRequest(
            f"{who}({column!r}): {found.text} has no dimension {dim} in a batch with channels to "
            "take statistics of"
        )
    return dim - 1 if dim > 0 else dim
