"""A mixture in an order: what a loader reads of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from forebay.dataset.advice import PlanFit
from forebay.dataset.holes import Hole
from forebay.dataset.lists import Lists, merged
from forebay.dataset.plan import PlanNews
from forebay.dataset.reading import (
    DatasetReading,
    DatasetSamples,
    Numbers,
    OrderOptions,
    PlanParameters,
    Reporter,
    no_drop_of_all,
)
from forebay.dataset.schema import Column
from forebay.dataset.states import check_is_state, check_state, whole_numbers
from forebay.transfer.wanted import current_plan, reading_for
from forebay_wire.errors import InvalidRequest
from forebay_wire.mixture_lanes import LanedOrder
from forebay_wire.order import Cut, LastBatch

if TYPE_CHECKING:
    from forebay.dataset.mixture import Mixture

STATE_FORMAT: Final = 1

KEPT_PASSES: Final = 4
"""Orders of passes that are kept for each dataset: two are read where one ends."""


class MixtureReading:
    """A mixture in an order."""

    def __init__(self, mixture: Mixture, options: OrderOptions) -> None:
        if options.lanes is not None and options.shuffle != "block":
            raise InvalidRequest(f'lanes belong to shuffle="block", not to {options.shuffle!r}')
        if options.lanes not in (None, 1) and not mixture.has_lanes:
            mixture.in_lanes(options.lanes)  # raises
        mixture.columns(options.columns)  # raises where they differ
        self.mixture = mixture
        self._options = replace(options, lanes=None)
        self._readings = [
            DatasetReading(dataset, self._options) for dataset in mixture.datasets.values()
        ]

    @property
    def has_lanes(self) -> bool:
        return self._options.shuffle == "block" and self.mixture.has_lanes

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.mixture.columns(self._options.columns)

    @property
    def can_mask(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return self.mixture.name

    @property
    def title(self) -> str:
        return " + ".join(reading.title for reading in self._readings)

    @property
    def row_bytes(self) -> float:
        """By the shares of the whole row of stages, each counted alike."""
        shares = np.sum([stage.shares for stage in self.mixture.recipe.stages], axis=0)
        sizes = np.array([reading.row_bytes for reading in self._readings])
        return float((shares / shares.sum() * sizes).sum())

    def check(self, global_batch_size: int, last_batch: LastBatch) -> None:
        no_drop_of_all(self.mixture.num_samples, global_batch_size, last_batch)

    def epoch(self, epoch: int, lanes: int) -> MixtureSamples:
        mixture, seed = self.mixture, self._options.seed
        order = LanedOrder(mixture.in_lanes(lanes), mixture.identity_in(lanes), seed, epoch)
        return MixtureSamples(mixture, order, self._readings)

    def cut(
        self, epoch: int, position: int, global_batch_size: int, last_batch: LastBatch, lanes: int
    ) -> Cut:
        del epoch
        num_samples = self.mixture.in_lanes(lanes).num_samples
        return Cut(num_samples, global_batch_size, last_batch, position, lanes)

    # Where reading stands.

    def state(self, epoch: int, position: int, lanes: int) -> dict[str, Any]:
        return {"epoch": epoch, "position": position, **self._own_state(lanes)}

    def restored(self, state: Mapping[str, Any], lanes: int | None) -> tuple[int, int, int]:
        check_is_state(state)
        found = _lanes_in(state) if lanes is None else lanes
        own = self._own_state(found)
        if _lanes_in(state) != found:
            raise InvalidRequest(
                f"the state was taken with lanes={_lanes_in(state)}, this loader has {found}: make "
                "it with the same ones, or leave lanes= out"
            )
        check_state(state, own)
        epoch, position = whole_numbers(state, "epoch", "position")
        num_samples = self.mixture.in_lanes(found).num_samples
        if position > num_samples:
            raise InvalidRequest(f"the state stands at sample {position} of {num_samples}")
        return epoch, position, found

    def _own_state(self, lanes: int) -> dict[str, Any]:
        options = self._options
        blocks = self._readings[0].state(0, 0, 1)
        return {
            "format": STATE_FORMAT,
            "kind": "mixture",
            "datasets": {
                name: [dataset.name, dataset.version, dataset.identity]
                for name, dataset in self.mixture.datasets.items()
            },
            "mixture": self.mixture.identity_in(lanes),
            "seed": options.seed,
            "shuffle": options.shuffle,
            "window_blocks": blocks["window_blocks"],
            "block_rows": blocks["block_rows"],
            **({"lanes": lanes} if lanes > 1 else {}),
        }

    # The plan.

    def reporter(self, loader: str, parameters: PlanParameters) -> Reporter:
        return MixtureReporter(self, loader, parameters)

    def component_reporters(self, loader: str, parameters: PlanParameters) -> list[Reporter]:
        """A plan for each dataset."""
        return [
            reading.reporter(f"{reading.title} of {loader}", own)
            for reading, own in zip(self._readings, self.component_plans(parameters), strict=True)
        ]

    def component_plans(self, parameters: PlanParameters) -> list[PlanParameters]:
        """What the plan of each dataset says. In lanes, those of the rank; without, which samples
        fall to which rank is known only to the mixture, so each rank's plan is about all."""
        recipe = self.mixture.recipe
        shares = np.sum([stage.shares for stage in recipe.stages], axis=0)
        lanes, found = parameters.lanes, []
        for share in (shares / shares.sum()).tolist():
            size = max(1, round(parameters.global_batch_size * share / lanes)) * lanes
            if lanes > 1:
                rank, num_ranks = parameters.rank, parameters.num_ranks
                found.append(PlanParameters(size, "keep", rank, num_ranks, lanes))
            else:
                found.append(PlanParameters(size, "keep", 0, 1, 1))
        return found

    def places(self, epoch: int, position: int, lanes: int) -> list[tuple[int, int] | None]:
        """(pass, sample) of each dataset at *position* of *epoch*; None for an empty one."""
        return self.epoch(epoch, lanes).order.next_places(position)


@dataclass(frozen=True)
class MixtureSamples:
    """One epoch of a mixture. Rows are those of all datasets' versions, counted through."""

    mixture: Mixture
    order: LanedOrder
    readings: Sequence[DatasetReading]

    def __post_init__(self) -> None:
        self.__dict__["_passes"] = [{} for _ in self.readings]

    @property
    def num_samples(self) -> int:
        return self.order.mixture.num_samples

    @property
    def epoch(self) -> int:
        return self.order.epoch

    def rows(self, positions: Numbers) -> Numbers:
        numbers, turns, places = self.order.at(positions)
        rows = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            target = np.flatnonzero(numbers == number)
            for turn in np.unique(turns[target]).tolist():
                now = target[turns[target] == turn]
                own = self._pass(number, turn).rows(places[now])
                rows[now] = self.mixture.joined_rows(number, own)
        return rows

    def _pass(self, number: int, turn: int) -> DatasetSamples:
        """A pass of one dataset, kept because its blocks may have been dealt."""
        kept: dict[int, DatasetSamples] = self.__dict__["_passes"][number]
        found = kept.get(turn)
        if found is None:
            found = self.readings[number].epoch(turn, self.order.mixture.lanes)
            recent = sorted(kept.items())[-KEPT_PASSES + 1 :]
            self.__dict__["_passes"][number] = {**dict(recent), turn: found}
        return found

    def read(self, rows: Numbers, columns: Sequence[str] | None) -> dict[str, Any]:
        parts = []
        plans = plan_names()
        for number, _, target, own in self.mixture.share_out(rows):
            source = self.readings[number].source
            with reading_for(plans.get(number, "")):
                parts.append((target, source.read(own, columns)))
        return scatter(parts, self.mixture.columns(columns), len(rows))

    def read_masked(
        self, rows: Numbers, columns: Sequence[str] | None
    ) -> tuple[dict[str, Any], list[Hole]]:
        parts = []
        holes: list[Hole] = []
        plans = plan_names()
        for number, _, target, own in self.mixture.share_out(rows):
            samples = self.readings[number].epoch(self.epoch, 1)
            with reading_for(plans.get(number, "")):
                values, bad = samples.read_masked(own, columns)
            parts.append((target, values))
            for hole in bad:
                position = int(target[hole.position])
                holes.append(Hole(position, int(rows[position]), hole.reason))
        holes.sort()
        return scatter(parts, self.mixture.columns(columns), len(rows)), holes

    def ids(self, rows: Numbers) -> dict[str, Numbers]:
        found = np.empty(len(rows), dtype=np.int64)
        numbers = np.empty(len(rows), dtype=np.int64)
        for number, _, target, own in self.mixture.share_out(rows):
            found[target], numbers[target] = own, number
        return {"_ids": found, "_dataset": numbers}

    def list_lengths(self, rows: Numbers, column: str) -> Numbers:
        found = np.empty(len(rows), dtype=np.int64)
        plans = plan_names()
        for number, dataset, target, own in self.mixture.share_out(rows):
            with reading_for(plans.get(number, "")):
                found[target] = dataset.list_lengths(own, column)
        return found

    def list_pieces(
        self, rows: Numbers, starts: Numbers, sizes: Numbers, column: str
    ) -> NDArray[Any]:
        (kind,) = self.mixture.columns([column])
        found = np.empty(int(sizes.sum()), dtype=kind.dtype)
        plans = plan_names()
        for number, dataset, target, own in self.mixture.share_out(rows):
            with reading_for(plans.get(number, "")):
                part = dataset.list_pieces(own, starts[target], sizes[target], column)
            is_own = np.zeros(len(rows), dtype=np.bool_)
            is_own[target] = True
            found[np.repeat(is_own, sizes)] = part
        return found


def _lanes_in(state: Mapping[str, Any]) -> int:
    lanes = state.get("lanes", 1)
    if type(lanes) is not int or lanes < 1:
        raise InvalidRequest(f"loader state: lanes={lanes!r} is no number from 1 on")
    return lanes


def scatter(
    parts: Sequence[tuple[Numbers, Mapping[str, Any]]],
    columns: Sequence[Column],
    num_rows: int,
) -> dict[str, Any]:
    """Columns of *num_rows* rows from *parts*: where the rows stand, and their columns."""
    found: dict[str, Any] = {}
    for column in columns:
        if column.kind in ("scalar", "array"):
            assert column.dtype is not None
            whole = np.empty((num_rows, *column.shape), column.dtype)
            for target, values in parts:
                whole[target] = values[column.name]
            found[column.name] = whole
            continue
        if any(isinstance(values[column.name], Lists) for _, values in parts):
            lists = [(at, Lists.of(values[column.name], column.dtype)) for at, values in parts]
            found[column.name] = merged(lists, num_rows)
            continue
        objects = np.empty(num_rows, dtype=object)
        for target, values in parts:
            own = values[column.name]
            objects[target] = np.fromiter(own, dtype=object, count=len(own))
        found[column.name] = objects.tolist()
    return found


def plan_names() -> dict[int, str]:
    """Number of each dataset to the plan that this thread reads it for."""
    joined = current_plan().get("plan", "")
    return dict(enumerate(joined.split(","))) if "," in joined else {0: joined}


class MixtureReporter:
    """A plan for each dataset of a mixture, told as one. Methods as those of ``PlanReporter``."""

    def __init__(self, reading: MixtureReading, loader: str, parameters: PlanParameters) -> None:
        self._reading = reading
        self._lanes = parameters.lanes
        self._reporters = reading.component_reporters(loader, parameters)

    @property
    def plan(self) -> str:
        """The plans' names, in the order of the datasets."""
        return ",".join(reporter.plan for reporter in self._reporters)

    @property
    def news(self) -> PlanNews:
        """Waits added up; the longest is the longest of all."""
        waits: dict[str, float] = {}
        problems: dict[str, None] = {}
        tiers: dict[str, int] = {}
        all_news = [reporter.news for reporter in self._reporters]
        for news in all_news:
            for name, value in news.waits.items():
                before = waits.get(name, 0)
                is_longest = name == "longest_seconds"
                waits[name] = max(before, value) if is_longest else before + value
            if news.problem:
                problems[news.problem] = None
            tiers |= news.fit.tier_bytes
        fit = PlanFit(sum(news.fit.plan_bytes for news in all_news), tiers)
        return PlanNews("; ".join(problems), waits, fit)

    def account(self, account: Callable[[PlanFit], dict[str, Any]]) -> None:
        self._reporters[0].account(account)  # once is enough: the sums are of the loader

    def stand(self, epoch: int, position: int) -> None:
        places = self._reading.places(epoch, position, self._lanes)
        for reporter, place in zip(self._reporters, places, strict=True):
            if place is not None:
                reporter.stand(*place)

    def end(self) -> None:
        for reporter in self._reporters:
            reporter.end()
