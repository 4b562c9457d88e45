"""The order of a mixture: which dataset stands at each position, and which of its samples.

Every stretch of positions, from the start of a stage on, holds each dataset as often as the
stage's shares say, to the sample; within a block of :data:`BLOCK_SAMPLES` positions they lie in the
order of a keyed permutation. The samples of one dataset come in the order of that dataset itself,
pass after pass. Nothing is stored and nothing is walked: a position costs the same wherever it is.
Byte-exact definition: ``docs/formats/mixture.md``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Final

import numpy as np

from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.permutation import MAX_SAMPLES, Numbers, derive_key, permute_each

BLOCK_SAMPLES: Final = 256
"""Positions that are shuffled among themselves."""

SHARE_SUM: Final = 1 << 30
"""Weights become integers of this sum."""

MAX_COMPONENTS: Final = 256

RAMP_STEPS: Final = 256
"""Stages that a linear change of weights is made of, at most."""


@dataclass(frozen=True)
class Stage:
    """Positions from *start* on, to the start of the next stage or for ever."""

    start: int
    shares: tuple[int, ...]
    """Of each dataset, among their sum of consecutive samples."""


@dataclass(frozen=True)
class WeightsFrom:
    """Weights from a position on: what a schedule is made of."""

    start: int
    weights: tuple[float, ...]
    is_linear: bool = False
    """Whether they change, in a straight line, to those of the next one."""


def apportion(weights: Sequence[float | Fraction], total: int) -> tuple[int, ...]:
    """Integers of the sum *total* in the ratio of *weights*, by largest remainder."""
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    if not exact or min(exact) < 0 or not whole:
        raise InvalidRequest(f"weights {list(weights)}: none below 0, and not all of them 0")
    quotas = [weight * total / whole for weight in exact]
    found = [quota.numerator // quota.denominator for quota in quotas]
    rest = sorted(range(len(found)), key=lambda number: (found[number] - quotas[number], number))
    for number in rest[: total - sum(found)]:
        found[number] += 1
    return tuple(found)


def counts(shares: Sequence[int], length: int) -> list[int]:
    """How many of the first *length* positions of a stage each dataset has.

    They add up to *length*, never fall as it grows, and are the shares themselves, or a multiple,
    where it is a multiple of their sum.
    """
    total = sum(shares)
    rounds, left = divmod(length, total)
    found = []
    for share in shares:
        own = (2 * left * share + total) // (2 * total) if total else 0
        found.append(rounds * share + own)
        left, total = left - own, total - share
    return found


def stages_of(schedule: Sequence[WeightsFrom]) -> tuple[Stage, ...]:
    """The stages of a *schedule*; a straight line becomes steps."""
    if not schedule or schedule[0].start != 0:
        raise InvalidRequest("a schedule begins at 0")
    if any(later.start <= first.start for first, later in pairwise(schedule)):
        raise InvalidRequest("the stages of a schedule begin one after the other")
    if schedule[-1].is_linear:
        raise InvalidRequest("the last stage of a schedule has no next one to change to")
    stages = []
    for point, following in pairwise([*schedule, None]):
        assert point is not None
        shares = apportion(point.weights, SHARE_SUM)
        if following is None or not point.is_linear:
            stages.append(Stage(point.start, shares))
            continue
        aim, length = apportion(following.weights, SHARE_SUM), following.start - point.start
        steps = min(RAMP_STEPS, -(-length // BLOCK_SAMPLES))
        for step in range(steps):
            middle = Fraction(2 * step + 1, 2 * steps)
            between = [low + (high - low) * middle for low, high in zip(shares, aim, strict=True)]
            start = point.start + length * step // steps
            stages.append(Stage(start, apportion(between, SHARE_SUM)))
    return tuple(stages)


@dataclass(frozen=True)
class Recipe:
    """A mixture, as numbers."""

    sizes: tuple[int, ...]
    """Samples of each dataset."""
    stages: tuple[Stage, ...]
    num_samples: int
    """Of an epoch."""
    strides: tuple[int, ...] | None = None
    """None: the epochs are pieces of one endless row of positions. Else each epoch is a row of its
    own, and the number of samples that each dataset is on by."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= MAX_COMPONENTS:
            raise InvalidRequest(
                f"a mixture of {len(self.sizes)} datasets; allowed: 1 to {MAX_COMPONENTS}"
            )
        if not 0 <= self.num_samples <= MAX_SAMPLES:
            raise InvalidRequest(f"an epoch of {self.num_samples} samples; allowed: {MAX_SAMPLES}")
        if not self.stages or self.stages[0].start != 0:
            raise InvalidRequest("the stages of a mixture begin at 0")
        for stage in self.stages:
            for number, share in enumerate(stage.shares):
                if share and not self.sizes[number]:
                    raise InvalidRequest(f"dataset {number} of the mixture is empty")

    @property
    def is_endless(self) -> bool:
        """Whether epochs go on where the last one ended."""
        return self.strides is None

    @lazy
    def starts(self) -> list[int]:
        return [stage.start for stage in self.stages]

    @lazy
    def before(self) -> list[list[int]]:
        """Samples of each dataset before each stage."""
        found = [[0] * len(self.sizes)]
        for stage, following in pairwise(self.stages):
            added = counts(stage.shares, following.start - stage.start)
            found.append([old + new for old, new in zip(found[-1], added, strict=True)])
        return found

    def before_position(self, number: int, position: int) -> list[int]:
        """Samples of each dataset before a *position* of stage *number* where a block begins."""
        stage = self.stages[number]
        within = counts(stage.shares, position - stage.start)
        return [old + new for old, new in zip(self.before[number], within, strict=True)]

    def block_at(self, position: int) -> tuple[int, int, int]:
        """(stage, start, stop) of the block that *position* lies in."""
        number = bisect_right(self.starts, position) - 1
        start = self.starts[number]
        start += (position - start) // BLOCK_SAMPLES * BLOCK_SAMPLES
        stop = start + BLOCK_SAMPLES
        if number + 1 < len(self.starts):
            stop = min(stop, self.starts[number + 1])
        if not self.is_endless:
            stop = min(stop, self.num_samples)
        return number, start, stop


def until_first_ends(sizes: Sequence[int], shares: Sequence[int]) -> Recipe:
    """Epochs that end before any dataset would come a second time."""
    longest = last_where(
        lambda length: all(
            own <= size for own, size in zip(counts(shares, length), sizes, strict=True)
        ),
        sum(sizes),
    )
    return Recipe(tuple(sizes), (Stage(0, tuple(shares)),), longest, tuple(sizes))


def until_all_end(sizes: Sequence[int], shares: Sequence[int]) -> Recipe:
    """Epochs that end when each dataset has come whole at least once."""
    if any(size and not share for size, share in zip(sizes, shares, strict=True)):
        raise InvalidRequest('stop="all" never ends with a weight of 0: leave that dataset out')
    limit = max(
        (size * sum(shares) // share + len(sizes) + 1)
        for size, share in zip(sizes, shares, strict=True)
        if share
    )
    shortest = 1 + last_where(
        lambda length: any(
            own < size for own, size in zip(counts(shares, length), sizes, strict=True)
        ),
        limit + sum(shares),
    )
    num_samples = shortest if any(sizes) else 0
    passes = [
        -(-own // max(size, 1))
        for own, size in zip(counts(shares, num_samples), sizes, strict=True)
    ]
    strides = tuple(count * size for count, size in zip(passes, sizes, strict=True))
    return Recipe(tuple(sizes), (Stage(0, tuple(shares)),), num_samples, strides)


def of_fixed_sizes(sizes: Sequence[int], wanted: Sequence[int]) -> Recipe:
    """Epochs that hold exactly *wanted* samples of each dataset; the next one goes on with those
    that did not come."""
    if min(wanted) < 0 or not sum(wanted):
        raise InvalidRequest(f"sizes {list(wanted)}: none below 0, and not all of them 0")
    return Recipe(tuple(sizes), (Stage(0, tuple(wanted)),), sum(wanted), tuple(wanted))


def last_where(holds: Callable[[int], bool], high: int) -> int:
    """The last number up to *high* where *holds*, which does so at 0 and, once it fails, never
    again."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class MixtureOrder:
    """The order of one epoch of a mixture. Thread-safe, cheap to make."""

    recipe: Recipe
    identity: str
    """Names the recipe and the samples of all datasets."""
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        if not 0 <= (self.epoch + 1) * max(1, self.recipe.num_samples) <= MAX_SAMPLES:
            raise InvalidRequest(f"epoch {self.epoch} of {self.recipe.num_samples} samples is late")

    @lazy
    def _key(self) -> bytes:
        return derive_key(
            "mixture", self.identity, self.seed, 0 if self.recipe.is_endless else self.epoch
        )

    @property
    def _shift(self) -> int:
        return self.epoch * self.recipe.num_samples if self.recipe.is_endless else 0

    @lazy
    def _strides(self) -> list[int]:
        recipe = self.recipe
        return [self.epoch * stride for stride in recipe.strides or (0,) * len(recipe.sizes)]

    def at(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """(dataset, ordinal) of the samples at *positions*: ordinal o of a dataset of n samples is
        sample o mod n of its pass o div n."""
        if len(positions) == 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        if int(positions.min()) < 0 or int(positions.max()) >= self.recipe.num_samples:
            raise InvalidRequest(
                f"positions {positions.min()} to {positions.max()} are outside an epoch of "
                f"{self.recipe.num_samples} samples"
            )
        wanted = positions + self._shift
        starts, first, ordinals, bounds = self._blocks(wanted)
        sizes = np.diff(first)
        block = np.repeat(np.arange(len(starts)), sizes)
        local = np.arange(first[-1], dtype=np.int64) - first[block]
        slots = first[block] + permute_each(self._key, starts[block], sizes[block], local)
        groups = np.searchsorted(bounds, slots, side="right") - 1
        # Of one dataset in one block, the earlier position has the lower ordinal.
        by_group = np.argsort(groups, kind="stable")
        found = np.empty_like(groups)
        found[by_group] = np.arange(len(groups)) - bounds[groups[by_group]]
        found += ordinals[groups]
        which = np.searchsorted(starts, wanted, side="right") - 1
        here = first[which] + wanted - starts[which]
        return groups[here] % len(self.recipe.sizes), found[here]

    def _blocks(self, wanted: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Of the blocks that *wanted* lie in: first positions; where each begins if they are laid
        end to end, and the end; and for each dataset in each block its first ordinal, and where it
        begins in the row of their slots."""
        recipe = self.recipe
        stage_starts = np.array(recipe.starts, dtype=np.int64)
        own_start = stage_starts[np.searchsorted(stage_starts, wanted, side="right") - 1]
        starts = np.unique(wanted - (wanted - own_start) % BLOCK_SAMPLES)
        first, ordinals, bounds = [0], [], []
        for position in starts.tolist():
            number, _, stop = recipe.block_at(position)
            before = recipe.before_position(number, position)
            after = recipe.before_position(number, stop)
            slot = first[-1]
            for old, new, stride in zip(before, after, self._strides, strict=True):
                ordinals.append(old + stride)
                bounds.append(slot)
                slot += new - old
            first.append(slot)
        return starts, np.array(first), np.array(ordinals), np.array(bounds)

    def next_ordinals(self, position: int) -> list[int]:
        """About the next ordinal of each dataset at *position*: the first one that stands in its
        block. Never falls as the position grows."""
        place = position + self._shift
        if not self.recipe.is_endless:
            place = min(place, self.recipe.num_samples)
        number, start, _ = self.recipe.block_at(place)
        before = self.recipe.before_position(number, start)
        return [own + stride for own, stride in zip(before, self._strides, strict=True)]
