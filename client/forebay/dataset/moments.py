"""Count, extremes, mean and deviation of numbers that come a piece at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Number = int | float

PIECE_NUMBERS: Final = 1 << 18
"""So many at a time: what is made of them stays in a core's cache."""

_LOW: Final = 0xFFFFFFFF


@dataclass(frozen=True)
class Figures:
    """Of some numbers. Without any, only their count is known."""

    num_values: int = 0
    num_nan: int = 0
    """No numbers (NaN), which the rest is not of."""
    min: Number | None = None
    max: Number | None = None
    mean: float | None = None
    std: float | None = None
    """Of the population. Of infinite values there are neither."""


class Moments(Protocol):
    """Takes numbers in, of one or more channels. Equal pieces in equal order: equal figures."""

    def add(self, values: NDArray[Any]) -> None:
        """More *values* ``(channels, count)``."""
        ...

    def figures(self) -> list[Figures]:
        """Of each channel, of all that came."""
        ...


def moments(dtype: np.dtype[Any], num_channels: int) -> Moments:
    """For numbers of *dtype*: exact ones for whole numbers and truth values."""
    made = FloatMoments if dtype.kind == "f" else IntegerMoments
    return made(num_channels)


class IntegerMoments:
    """Exact sums, so that neither pieces nor their order matter; rounded once, at the end."""

    def __init__(self, num_channels: int) -> None:
        self._count = 0
        self._sums = [0] * num_channels
        self._squares = [0] * num_channels
        self._low: list[int] = []
        self._high: list[int] = []

    def add(self, values: NDArray[Any]) -> None:
        if not values.shape[1]:
            return
        values = values.view(np.uint8) if values.dtype.kind == "b" else values
        low, high = values.min(axis=1).tolist(), values.max(axis=1).tolist()
        self._low = list(map(min, self._low, low)) if self._count else low
        self._high = list(map(max, self._high, high)) if self._count else high
        self._count += values.shape[1]
        step = max(1, PIECE_NUMBERS // len(values))
        for start in range(0, values.shape[1], step):
            sums, squares = _exact_sums(values[:, start : start + step])
            self._sums = list(map(int.__add__, self._sums, sums))
            self._squares = list(map(int.__add__, self._squares, squares))

    def figures(self) -> list[Figures]:
        if not self._count:
            return [Figures()] * len(self._sums)
        count = self._count
        found = zip(self._low, self._high, self._sums, self._squares, strict=True)
        return [
            Figures(
                count,
                0,
                low,
                high,
                float(Fraction(total, count)),
                math.sqrt(Fraction(count * squares - total * total, count * count)),
            )
            for low, high, total, squares in found
        ]


def _exact_sums(values: NDArray[Any]) -> tuple[list[int], list[int]]:
    """Of the values and of their squares, of each channel; less than 2^31 values each."""
    if values.dtype.itemsize <= 2:
        wide = values.astype(np.int64)
        sums = wide.sum(axis=1).tolist()
        return sums, np.multiply(wide, wide, out=wide).sum(axis=1).tolist()
    # v = a * 2^32 + b; the products of a and b fit 64 bits.
    wide = values if values.dtype.itemsize == 8 else values.astype(np.int64)
    high, low = wide >> 32, wide & _LOW
    high_sums, low_sums = _sum(high), _sum(low)
    sums = [(a << 32) + b for a, b in zip(high_sums, low_sums, strict=True)]
    low = low.astype(np.uint64)
    parts = (
        _sum(np.square(high)),
        _sum(high * low.astype(high.dtype)),
        _sum(np.square(low)),
    )
    return sums, [(a << 64) + (ab << 33) + b for a, ab, b in zip(*parts, strict=True)]


def _sum(values: NDArray[Any]) -> list[int]:
    """Of each channel, without overflow."""
    high, low = (values >> 32).sum(axis=1).tolist(), (values & _LOW).sum(axis=1).tolist()
    return [(a << 32) + b for a, b in zip(high, low, strict=True)]


class FloatMoments:
    """Mean and squared distances in float64, a piece at a time, merged in their order by the
    pairwise formulas of Chan, Golub and LeVeque ("Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances", 1979)."""

    def __init__(self, num_channels: int) -> None:
        self._counts = np.zeros(num_channels, dtype=np.int64)
        self._num_nan = np.zeros(num_channels, dtype=np.int64)
        self._low = np.full(num_channels, np.inf)
        self._high = np.full(num_channels, -np.inf)
        self._mean = np.zeros(num_channels)
        self._squares = np.zeros(num_channels)

    def add(self, values: NDArray[Any]) -> None:
        step = max(1, PIECE_NUMBERS // len(values))
        with np.errstate(invalid="ignore", over="ignore"):  # infinities among them
            for start in range(0, values.shape[1], step):
                self._add(values[:, start : start + step].astype(np.float64, order="C"))

    def _add(self, values: NDArray[np.float64]) -> None:
        is_nan = np.isnan(values)
        num_nan = is_nan.sum(axis=1)
        self._num_nan += num_nan
        counts = values.shape[1] - num_nan
        some = np.maximum(counts, 1)
        for_low = np.where(is_nan, np.inf, values) if num_nan.any() else values
        for_high = np.where(is_nan, -np.inf, values) if num_nan.any() else values
        self._low = np.minimum(self._low, for_low.min(axis=1))
        self._high = np.maximum(self._high, for_high.max(axis=1))
        mean = np.where(is_nan, 0.0, values).sum(axis=1) / some
        distances = values - mean[:, None]
        squares = np.square(np.where(is_nan, 0.0, distances)).sum(axis=1)
        totals = self._counts + counts
        share = counts / np.maximum(totals, 1)
        distance = np.where(counts > 0, mean - self._mean, 0.0)
        self._squares += squares + np.square(distance) * self._counts * share
        self._mean = self._mean + distance * share
        self._counts = totals

    def figures(self) -> list[Figures]:
        with np.errstate(invalid="ignore"):
            std = np.sqrt(self._squares / np.maximum(self._counts, 1))
        found = zip(
            self._counts.tolist(),
            self._num_nan.tolist(),
            self._low.tolist(),
            self._high.tolist(),
            [_finite(mean) for mean in self._mean.tolist()],
            [_finite(one) for one in std.tolist()],
            strict=True,
        )
        return [Figures(*one) if one[0] else Figures(num_nan=one[1]) for one in found]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
