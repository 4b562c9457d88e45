"""What the columns of a dataset hold: counts, extremes, means, lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from forebay.dataset.members import chosen
from forebay.dataset.moments import Figures, Moments, moments
from forebay.dataset.schema import Column
from forebay_wire.errors import InvalidRequest

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset

Progress = Callable[[int, int], object]
"""Told how much is done, and of how much: rows, of each set of shards that is read."""


@dataclass(frozen=True)
class ColumnStatistics:
    """One column. Numbers are those of all elements of arrays; of text, bytes and lists they are
    of the lengths (characters, bytes, elements)."""

    of: str
    """"values", "lengths", or "nothing" for columns of other types."""
    num_rows: int = 0
    num_nulls: int = 0
    """Rows without a value."""
    num_nan: int = 0
    """Values that are no number."""
    num_values: int = 0
    """What the following are of: elements, or lengths, without those."""
    min: int | float | None = None
    max: int | float | None = None
    mean: float | None = None
    std: float | None = None
    """Of the population. Where values are infinite there are neither."""
    channels: tuple[Figures, ...] | None = None
    """The same of each entry along one dimension of a sample, where they were asked for."""

    @property
    def num_missing(self) -> int:
        """Nulls, and values that are no number (NaN)."""
        return self.num_nulls + self.num_nan

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        value = {**asdict(self), "num_missing": self.num_missing}
        if self.channels is None:
            del value["channels"]
        return value


@dataclass(frozen=True)
class Wanted:
    """Figures that belong together: of a column, or of each entry along one of its dimensions."""

    column: Column
    axis: int | None = None
    """Of a sample's shape; None: of all its values."""

    @property
    def key(self) -> str:
        """What it is kept by."""
        return f"{'' if self.axis is None else self.axis}:{self.column.name}"


@dataclass(frozen=True)
class Found:
    """What was found of one :class:`Wanted`."""

    of: str
    num_rows: int
    num_nulls: int
    figures: tuple[Figures, ...]
    """One of all values, or one of each channel."""

    def payload(self) -> dict[str, Any]:
        """As it stands in a manifest: a list of each figure; JSON knows no infinities."""
        lists = {
            name: [_plain(getattr(one, name)) for one in self.figures]
            for name in Figures.__dataclass_fields__
        }
        return {"of": self.of, "num_rows": self.num_rows, "num_nulls": self.num_nulls, **lists}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Found:
        """KeyError, ValueError or TypeError for what is none."""
        columns = [
            [float(one) if isinstance(one, str) else one for one in payload[name]]
            for name in Figures.__dataclass_fields__
        ]
        figures = tuple(Figures(*one) for one in zip(*columns, strict=True))
        return cls(payload["of"], payload["num_rows"], payload["num_nulls"], figures)


def _plain(value: Any) -> Any:
    return repr(value) if isinstance(value, float) and not np.isfinite(value) else value


def wanted_of(
    dataset: Dataset, columns: Sequence[str] | None, along: Mapping[str, int]
) -> list[Wanted]:
    """What to look for: each of *columns* (default: all), and the channels of those of *along*."""
    chosen = [Wanted(column) for column in dataset.columns(columns)]
    names = {one.column.name for one in chosen}
    channels = [
        Wanted(column, _axis(column, along[column.name])) for column in dataset.columns(list(along))
    ]
    missing = [Wanted(one.column) for one in channels if one.column.name not in names]
    return [*chosen, *missing, *channels]


def _axis(column: Column, axis: int) -> int:
    if column.kind != "array" or not -len(column.shape) <= axis < len(column.shape):
        raise InvalidRequest(
            f"column {column.name!r} ({column.text}) has no dimension {axis} to take statistics "
            "along: dimensions are those of one sample, of arrays of one shape"
        )
    return axis % len(column.shape)


def compute(
    dataset: Dataset, wanted: Sequence[Wanted], progress: Progress = lambda done, total: None
) -> dict[str, Found]:
    """Figures by key, of all rows of a version or split, a record batch at a time in order."""
    takers = {one.key: _Taker(one) for one in wanted}
    by_layer: dict[int | None, list[Wanted]] = {}
    for one in wanted:
        by_layer.setdefault(dataset.manifest.layer_of(one.column.name), []).append(one)
    done, total = 0, len(dataset) * len(by_layer)
    for own in by_layer.values():  # each in its own record batches, whatever is asked for beside it
        for batch in _batches(dataset, list(dict.fromkeys(one.column.name for one in own))):
            for one in own:
                takers[one.key].take(batch.column(one.column.name))
            done += batch.num_rows
            progress(done, total)
    return {key: taker.found() for key, taker in takers.items()}


def _batches(dataset: Dataset, names: list[str]) -> Iterator[Any]:
    for _, batch in chosen(dataset, dataset.whole().iter_batches(names)):
        if batch.num_rows:
            yield batch


class _Taker:
    """One :class:`Wanted` while it is computed."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self._of = _what(wanted.column)
        dtype = wanted.column.dtype
        self._is_whole = self._of == "values" and dtype is not None and dtype.kind != "f"
        self._num_rows = 0
        self._num_nulls = 0
        self._moments: Moments | None = None

    def take(self, values: pa.Array) -> None:
        self._num_rows += len(values)
        self._num_nulls += values.null_count
        if self._of == "nothing":
            return
        numbers = self._channels(_numbers(values.drop_null(), self.wanted.column))
        if numbers.dtype.kind == "f" and self._is_whole:
            raise InvalidRequest(
                f"column {self.wanted.column.name!r}: an element of an array of whole numbers is "
                "missing"
            )
        if self._moments is None:
            self._moments = moments(numbers.dtype, len(numbers))
        self._moments.add(numbers)

    def _channels(self, numbers: NDArray[Any]) -> NDArray[Any]:
        axis, shape = self.wanted.axis, self.wanted.column.shape
        if axis is None:
            return numbers.reshape(1, -1)
        samples = numbers.reshape(-1, *shape)
        return np.moveaxis(samples, axis + 1, 0).reshape(shape[axis], -1)

    def found(self) -> Found:
        axis = self.wanted.axis
        count = 1 if axis is None else self.wanted.column.shape[axis]
        figures = [Figures()] * count if self._moments is None else self._moments.figures()
        return Found(self._of, self._num_rows, self._num_nulls, tuple(figures))


def _what(column: Column) -> str:
    if column.kind in ("scalar", "array"):
        return "values"
    return "lengths" if column.kind in ("string", "binary", "list") else "nothing"


def _numbers(values: pa.Array, column: Column) -> NDArray[Any]:
    if column.kind == "string":
        values = pc.utf8_length(values)
    elif column.kind == "binary":
        values = pc.binary_length(values)
    elif column.kind == "list":
        values = pc.list_value_length(values)
    elif column.kind == "array":
        values = values.storage.flatten()
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found


def joined(wanted: Sequence[Wanted], found: Mapping[str, Found]) -> dict[str, ColumnStatistics]:
    """By column, for people and transforms."""
    channels = {one.column.name: found[one.key].figures for one in wanted if one.axis is not None}
    made = {}
    for one in wanted:
        if one.axis is None:
            column, figures = found[one.key], found[one.key].figures[0]
            made[one.column.name] = ColumnStatistics(
                column.of,
                column.num_rows,
                column.num_nulls,
                figures.num_nan,
                figures.num_values,
                figures.min,
                figures.max,
                figures.mean,
                figures.std,
                channels.get(one.column.name),
            )
    return made
