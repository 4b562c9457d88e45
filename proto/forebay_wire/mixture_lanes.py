"""A mixture dealt to lanes: in each lane a mixture of the datasets' lanes.

Position p of an epoch is of lane p mod L, and so are the samples that stand there: lane l of a
dataset, the positions p of its order with p mod L = l. So whoever takes some lanes reads those of
every dataset alone. With one lane it is the mixture itself. Byte-exact definition:
``docs/formats/mixture.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.mixture import MixtureOrder, Recipe, Stage, counts, last_where
from forebay_wire.permutation import Numbers

Ends = Literal["endless", "first", "all", "sizes"]
"""What makes an epoch end."""

ONE: Final = 1


def lane_length(length: int, lane: int, lanes: int) -> int:
    """How many of the first *length* positions are of *lane*."""
    return (length - lane + lanes - 1) // lanes


def in_lanes(recipe: Recipe, ends: Ends, lanes: int) -> LanedMixture:
    """The mixture that *recipe* is in one lane, in *lanes*. InvalidRequest for more of them than a
    dataset has samples, and for fixed sizes."""
    if lanes == ONE:
        return LanedMixture((recipe,), recipe.num_samples)
    for number, size in enumerate(recipe.sizes):
        if 0 < size < lanes:
            raise InvalidRequest(
                f"{lanes} lanes of a mixture: dataset {number} of it has {size} samples, fewer "
                "than there are lanes: give lanes=1"
            )
    if ends == "endless":
        return _endless(recipe, lanes)
    if ends == "sizes":
        raise InvalidRequest(
            f"{lanes} lanes of a mixture with sizes= or repeats=, which has each sample as often "
            "as that says: in lanes, which share them out anew in each pass, it would not: lanes=1"
        )
    return _until(recipe, ends, lanes)


def _endless(recipe: Recipe, lanes: int) -> LanedMixture:
    recipes = []
    for lane in range(lanes):
        own = lane_length(recipe.num_samples, lane, lanes)
        stages = []
        for stage in recipe.stages:
            epochs, rest = divmod(stage.start, max(1, recipe.num_samples))
            start = epochs * own + lane_length(rest, lane, lanes)
            stages.append(Stage(start, stage.shares))
        recipes.append(Recipe(_lane_sizes(recipe, lane, lanes), tuple(stages), own))
    return LanedMixture(tuple(recipes), recipe.num_samples)


def _until(recipe: Recipe, ends: Ends, lanes: int) -> LanedMixture:
    shares = recipe.stages[0].shares

    def owns(length: int) -> list[tuple[list[int], tuple[int, ...]]]:
        """Of each different lane: samples of each dataset, and the lane's sizes."""
        borders = {0, *(number % lanes for number in (length, *recipe.sizes))}
        return [
            (counts(shares, lane_length(length, lane, lanes)), _lane_sizes(recipe, lane, lanes))
            for lane in sorted(borders)
        ]

    def fits(length: int) -> bool:
        return all(
            own <= size
            for found, sizes in owns(length)
            for own, size in zip(found, sizes, strict=True)
        )

    def is_short(length: int) -> bool:
        return any(
            own < size
            for found, sizes in owns(length)
            for own, size in zip(found, sizes, strict=True)
        )

    if ends == "first":
        num_samples = last_where(fits, sum(recipe.sizes))
        passes = [1] * len(shares)
    else:
        slack = 3 * (sum(shares) // _least(shares) + 1) + 2 * len(shares)
        most = recipe.num_samples + lanes * slack
        num_samples = 1 + last_where(is_short, most) if any(recipe.sizes) else 0
        passes = [
            max(-(-found[number] // max(1, sizes[number])) for found, sizes in owns(num_samples))
            for number in range(len(shares))
        ]
    recipes = []
    for lane in range(lanes):
        sizes = _lane_sizes(recipe, lane, lanes)
        strides = tuple(count * size for count, size in zip(passes, sizes, strict=True))
        own = lane_length(num_samples, lane, lanes)
        recipes.append(Recipe(sizes, (Stage(0, shares),), own, strides))
    return LanedMixture(tuple(recipes), num_samples)


def _least(shares: Sequence[int]) -> int:
    return min((share for share in shares if share), default=1)


def _lane_sizes(recipe: Recipe, lane: int, lanes: int) -> tuple[int, ...]:
    return tuple(lane_length(size, lane, lanes) for size in recipe.sizes)


@dataclass(frozen=True)
class LanedMixture:
    """A mixture in lanes, as numbers."""

    recipes: tuple[Recipe, ...]
    """Of each lane."""
    num_samples: int
    """Of an epoch, in all lanes."""

    @property
    def lanes(self) -> int:
        return len(self.recipes)


@dataclass(frozen=True)
class LanedOrder:
    """The order of one epoch of a mixture in lanes. Thread-safe, cheap to make."""

    mixture: LanedMixture
    identity: str
    """Names the mixture, its lanes, and the samples of all datasets."""
    seed: int
    epoch: int

    @lazy
    def _orders(self) -> list[MixtureOrder]:
        made = self.mixture
        names = [self.identity]
        if made.lanes > ONE:
            names = [f"{self.identity}/{lane}" for lane in range(made.lanes)]
        return [
            MixtureOrder(recipe, name, self.seed, self.epoch)
            for recipe, name in zip(made.recipes, names, strict=True)
        ]

    def at(self, positions: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """(dataset, pass, place in the dataset's order) of the samples at *positions*."""
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < (
            self.mixture.num_samples
        ):
            raise InvalidRequest(
                f"positions {positions.min()} to {positions.max()} are outside an epoch of "
                f"{self.mixture.num_samples} samples"
            )
        lanes = self.mixture.lanes
        datasets, turns, places = (np.empty(len(positions), dtype=np.int64) for _ in range(3))
        own_lanes = positions % lanes
        for lane in np.unique(own_lanes).tolist():
            target = np.flatnonzero(own_lanes == lane)
            numbers, ordinals = self._orders[lane].at(positions[target] // lanes)
            sizes = np.array(self.mixture.recipes[lane].sizes, dtype=np.int64)[numbers]
            turns[target], own = np.divmod(ordinals, sizes)
            datasets[target], places[target] = numbers, own * lanes + lane
        return datasets, turns, places

    def next_places(self, position: int) -> list[tuple[int, int] | None]:
        """About the next (pass, place) of each dataset at *position*; None for an empty one. Never
        falls as the position grows."""
        lanes, first = self.mixture.lanes, self.mixture.recipes[0]
        ordinals = self._orders[0].next_ordinals(lane_length(position, 0, lanes))
        found: list[tuple[int, int] | None] = []
        for ordinal, size in zip(ordinals, first.sizes, strict=True):
            turn, place = divmod(ordinal, max(1, size))
            found.append((turn, place * lanes) if size else None)
        return found
