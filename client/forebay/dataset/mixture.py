"""Several datasets read as one, by weights, by fixed sizes, or by a schedule of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from forebay.dataset.dataset import Dataset
from forebay.dataset.schema import Column, Schema
from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.lazy import lazy
from forebay_wire.mixture import (
    SHARE_SUM,
    Recipe,
    WeightsFrom,
    apportion,
    of_fixed_sizes,
    stages_of,
    until_all_end,
    until_first_ends,
)
from forebay_wire.mixture_lanes import Ends, LanedMixture, in_lanes

if TYPE_CHECKING:
    from forebay.dataset.reading import OrderOptions, Reading

Numbers = NDArray[np.int64]

STOPS: Final = ("first", "all")


@dataclass(frozen=True)
class Stage:
    """Weights of a mixture from a moment on, as a part of a schedule.

    The moment counts samples of the mixture from the very start of training, through all epochs;
    or tokens, which the datasets' means turn into samples. Without either it is the start.
    """

    weights: Mapping[str, float]
    from_samples: int | None = None
    from_tokens: int | None = None
    linear: bool = False
    """Whether the weights change evenly until the next stage begins, to its own."""

    def __post_init__(self) -> None:
        if self.from_samples is not None and self.from_tokens is not None:
            raise InvalidRequest("a stage begins from_samples or from_tokens, not both")
        if min(self.from_samples or 0, self.from_tokens or 0) < 0:
            raise InvalidRequest("a stage begins at 0 or later")


class Mixture:
    """Several datasets (or splits) with the same columns, for loaders to read as one.

        mixture = forebay.Mixture(
            {"web": web, "code": code}, {"web": 0.7, "code": 0.3}, num_samples=1_000_000
        )
        loader = forebay.DataLoader(mixture, global_batch_size=256, shuffle="full", seed=0)

    Every block of 256 positions holds each dataset's share of it. Of each, every sample comes
    once before any comes again: a pass is an epoch of that dataset, in an order of its own. It is
    as exact, and goes on after any change of ranks, workers and batch size, as one dataset.
    Immutable, picklable, thread-safe.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        weights: Mapping[str, float] | Sequence[Stage] | None = None,
        *,
        num_samples: int | None = None,
        stop: str | None = None,
        sizes: Mapping[str, int] | None = None,
        repeats: Mapping[str, float] | None = None,
        by: str = "samples",
        column: str = "tokens",
        mean_tokens: Mapping[str, float] | None = None,
    ) -> None:
        """Exactly one of *weights*, *sizes* and *repeats*.

        *weights* need not add up to 1; a list of :class:`Stage` is a schedule. With them goes
        *num_samples*, the length of an epoch, which may be any: the next one goes on where it
        ended. Or *stop*, for weights that do not change: an epoch ends before any dataset would
        begin again ("first", the default), or when each was read whole ("all"); all begin anew in
        the next.

        *sizes*: so many samples of each in an epoch, the next one going on with those that did not
        come. *repeats*: likewise, as multiples of the datasets' sizes.

        ``by="tokens"``: weights are shares of the tokens of *column* (lists) instead of samples.
        They become shares of samples by the mean length, which is taken from all lists of a dataset
        once (*mean_tokens* says it instead): right on average, not for each batch.
        """
        if not datasets:
            raise InvalidRequest("a mixture needs at least one dataset")
        for name, dataset in datasets.items():
            if not isinstance(dataset, Dataset):
                raise InvalidRequest(
                    f"{name!r} of the mixture is no dataset from client.dataset(...), but "
                    f"{type(dataset).__name__}"
                )
        if by not in ("samples", "tokens"):
            raise InvalidRequest(f'by={by!r}: "samples" or "tokens"')
        self.datasets = dict(datasets)
        self._means = _Means(self.datasets, column, mean_tokens)
        self._recipe = self._make_recipe(weights, num_samples, stop, sizes, repeats, by)
        self._laned: dict[int, LanedMixture] = {}
        self._made_of: dict[str, Any] = {
            "weights": weights,
            "num_samples": num_samples,
            "stop": stop,
            "sizes": sizes,
            "repeats": repeats,
            "by": by,
            "column": column,
            "mean_tokens": mean_tokens,
        }
        starts = [dataset.manifest.num_rows for dataset in self.datasets.values()]
        self._first_rows = np.cumsum([0, *starts], dtype=np.int64)
        """Of each dataset, if their versions' rows are counted through; and the end."""

    # What it is.

    @property
    def name(self) -> str:
        return "+".join(self.datasets)

    @property
    def num_samples(self) -> int:
        """Of an epoch, in one lane: with more of them, ``stop=`` may end it a few samples sooner or
        later."""
        return self._recipe.num_samples

    def __len__(self) -> int:
        return self._recipe.num_samples

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {dataset!r}" for name, dataset in self.datasets.items())
        return f"<Mixture of {self.num_samples} samples an epoch: {parts}>"

    @property
    def recipe(self) -> Recipe:
        """The numbers behind it."""
        return self._recipe

    @lazy
    def identity(self) -> str:
        """Names exactly these samples, mixed in this way."""
        recipe = self._recipe
        parts = [
            [dataset.identity for dataset in self.datasets.values()],
            [[stage.start, *stage.shares] for stage in recipe.stages],
            recipe.num_samples,
            recipe.strides,
        ]
        return blake3(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()

    @property
    def has_lanes(self) -> bool:
        """Whether it can be dealt to several lanes."""
        return self._ends != "sizes"

    def in_lanes(self, lanes: int) -> LanedMixture:
        """It, dealt to *lanes*."""
        found = self._laned.get(lanes)
        if found is None:
            found = self._laned[lanes] = in_lanes(self._recipe, self._ends, lanes)
        return found

    def identity_in(self, lanes: int) -> str:
        """As :attr:`identity`, in *lanes*."""
        if lanes == 1:
            return self.identity
        parts = [self.identity, lanes, self.in_lanes(lanes).num_samples]
        return blake3(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()

    def columns(self, names: Sequence[str] | None = None) -> tuple[Column, ...]:
        """The columns called *names*, or all: alike in all datasets, or SchemaMismatch."""
        first, *others = self.datasets
        wanted = self.datasets[first].columns(names)
        for other in others:
            schema = self.datasets[other].schema
            if names is None and set(schema.names) != {column.name for column in wanted}:
                raise SchemaMismatch(
                    f"the mixture's datasets have other columns: {first!r} {_names(wanted)}, "
                    f"{other!r} {_names(schema.columns)}; choose common ones with columns=[...]"
                )
            for column in wanted:
                if column.name not in schema.names:
                    raise SchemaMismatch(
                        f"{other!r} of the mixture has no column {column.name!r}; it has "
                        f"{_names(schema.columns)}"
                    )
                if schema[column.name].spec() != column.spec():
                    raise SchemaMismatch(
                        f"column {column.name!r} of the mixture is {column.text} in {first!r} and "
                        f"{schema[column.name].text} in {other!r}: write one of them again"
                    )
        return wanted

    # Reading. Rows are those of all datasets' versions, counted through.

    def share_out(self, rows: Numbers) -> list[tuple[int, Dataset, Numbers, Numbers]]:
        """Of each dataset that has any: its number, itself, where its rows stand in *rows*, and
        these as rows of its version."""
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        found = []
        for number, dataset in enumerate(self.datasets.values()):
            target = np.flatnonzero(numbers == number)
            if len(target):
                found.append((number, dataset, target, rows[target] - self._first_rows[number]))
        return found

    def joined_rows(self, number: int, rows: Numbers) -> Numbers:
        """*rows* of a version of dataset *number* as rows of all."""
        joined: Numbers = rows + self._first_rows[number]
        return joined

    def arranged(self, options: OrderOptions) -> Reading:
        """What a loader reads of it, in the order that its *options* say."""
        from forebay.dataset.mixed import MixtureReading

        return MixtureReading(self, options)

    def followed(self) -> tuple[Dataset, ...]:
        """The datasets that a loader moves on with ``follow="latest"``: all of them, each epoch of
        the mixture beginning them anew."""
        for name in ("num_samples", "sizes", "repeats"):
            if self._made_of[name] is not None:
                raise InvalidRequest(
                    f'follow="latest" and a mixture with {name}=: its next epoch goes on with what '
                    "did not come in this one, which an epoch of other versions cannot; give "
                    'stop="first" or stop="all" instead, or leave follow= out'
                )
        return tuple(self.datasets.values())

    def moved_to(self, datasets: Sequence[Dataset]) -> Mixture:
        """The same mixture of other versions of its datasets."""
        return Mixture(dict(zip(self.datasets, datasets, strict=True)), **self._made_of)

    # Making it.

    def _make_recipe(
        self,
        weights: Mapping[str, float] | Sequence[Stage] | None,
        num_samples: int | None,
        stop: str | None,
        sizes: Mapping[str, int] | None,
        repeats: Mapping[str, float] | None,
        by: str,
    ) -> Recipe:
        if sum(given is not None for given in (weights, sizes, repeats)) != 1:
            raise InvalidRequest("a mixture takes exactly one of weights, sizes and repeats")
        own = [len(dataset) for dataset in self.datasets.values()]
        self._ends: Ends = "sizes"
        if weights is None:
            if num_samples is not None or stop is not None or by != "samples":
                raise InvalidRequest("num_samples, stop and by belong to weights")
            if repeats is not None:
                factors = self._in_order(repeats, "repeats")
                wanted = [
                    round(Fraction(factor) * n) for factor, n in zip(factors, own, strict=True)
                ]
            else:
                assert sizes is not None
                wanted = [int(size) for size in self._in_order(sizes, "sizes")]
            return of_fixed_sizes(own, wanted)
        schedule = self._schedule(weights, by)
        if num_samples is not None:
            if stop is not None or num_samples < 1:
                raise InvalidRequest("num_samples is at least 1, and goes without stop")
            self._ends = "endless"
            return Recipe(tuple(own), stages_of(schedule), int(num_samples))
        if len(schedule) != 1:
            raise InvalidRequest("a schedule needs num_samples, the length of an epoch")
        if stop not in (None, *STOPS):
            raise InvalidRequest(f'stop={stop!r}: "first", "all", or num_samples=...')
        self._ends = "all" if stop == "all" else "first"
        ends = until_all_end if stop == "all" else until_first_ends
        return ends(own, apportion(schedule[0].weights, SHARE_SUM))

    def _schedule(
        self, weights: Mapping[str, float] | Sequence[Stage], by: str
    ) -> list[WeightsFrom]:
        stages = [Stage(weights)] if isinstance(weights, Mapping) else list(weights)
        found: list[WeightsFrom] = []
        tokens = 0
        for stage in stages:
            own = tuple(map(float, self._in_order(stage.weights, "weights")))
            if by == "tokens":
                means = self._means.all
                own = tuple(
                    weight / mean if weight else 0.0
                    for weight, mean in zip(own, means, strict=True)
                )
            start = int(stage.from_samples or 0)
            if stage.from_tokens:
                if not found:
                    raise InvalidRequest("the first stage of a schedule begins at 0")
                last = found[-1]
                each = self._mean_tokens(last, own)
                start = last.start + round((stage.from_tokens - tokens) / each)
                tokens = stage.from_tokens
            elif found and start:
                tokens += self._tokens_between(found[-1], own, start, stages)
            found.append(WeightsFrom(start, own, stage.linear))
        return found

    def _tokens_between(
        self, last: WeightsFrom, own: tuple[float, ...], start: int, stages: Sequence[Stage]
    ) -> int:
        """Tokens of the stage before one that begins at sample *start*, if anybody asks."""
        if all(stage.from_tokens is None for stage in stages):
            return 0
        return round((start - last.start) * self._mean_tokens(last, own))

    def _mean_tokens(self, stage: WeightsFrom, following: tuple[float, ...]) -> float:
        """Of a sample of *stage*, which ends where *following* weights begin."""
        weights = [Fraction(share, SHARE_SUM) for share in apportion(stage.weights, SHARE_SUM)]
        if stage.is_linear:
            aim = apportion(following, SHARE_SUM)
            weights = [
                (low + Fraction(high, SHARE_SUM)) / 2
                for low, high in zip(weights, aim, strict=True)
            ]
        means = self._means.all
        return float(sum(w * Fraction(mean) for w, mean in zip(weights, means, strict=True)))

    def _in_order(self, given: Mapping[str, Any], what: str) -> list[Any]:
        """Values of *given* in the order of the datasets."""
        if set(given) != set(self.datasets):
            raise InvalidRequest(
                f"{what} are of {', '.join(sorted(given))}; the mixture's datasets are "
                f"{', '.join(sorted(self.datasets))}"
            )
        for name, value in given.items():
            if not math.isfinite(value):
                raise InvalidRequest(f"{what}: {name!r} has {value}; a finite number is wanted")
        return [given[name] for name in self.datasets]


class _Means:
    """Mean tokens of a sample of each dataset, when they are asked for."""

    def __init__(
        self, datasets: Mapping[str, Dataset], column: str, given: Mapping[str, float] | None
    ) -> None:
        self._datasets = datasets
        self._column = column
        self._given = given

    @lazy
    def all(self) -> list[float]:
        if self._given is not None:
            if set(self._given) != set(self._datasets):
                raise InvalidRequest("mean_tokens names other datasets than the mixture")
            found = [float(self._given[name]) for name in self._datasets]
        else:
            found = [
                dataset.total_length(self._column) / max(1, len(dataset))
                for dataset in self._datasets.values()
            ]
        for name, mean in zip(self._datasets, found, strict=True):
            if not mean > 0:
                raise InvalidRequest(
                    f"{name!r} of the mixture has no tokens in column {self._column!r}: "
                    "leave it out"
                )
        return found


def _names(columns: Sequence[Column] | Schema) -> str:
    found = columns.columns if isinstance(columns, Schema) else columns
    return ", ".join(column.name for column in found)
