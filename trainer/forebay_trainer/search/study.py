"""The memory of a sweep: which values were tried, what came of them, which ones are next. Optuna's
journal in the sweep's folder; one process at a time uses it.

Suggestions are a function of the sweep's seed, the number of the trial and what the trials before
it came to: the sampler is made anew for each of them, so a sweep that was killed goes on as it
would have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from forebay_trainer.search.job import toml_text
from forebay_trainer.search.space import Parameter, Space
from forebay_wire.errors import InvalidRequest, NotFound

try:
    import optuna
    from optuna import distributions, pruners, samplers, trial
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
except ImportError as error:
    raise NotFound("optuna is not here: pip install 'forebay[search]'") from error

FILE: Final = "trials.journal"
NAME: Final = "sweep"
SAMPLERS: Final = ("tpe", "evolution", "random", "grid")
PRUNERS: Final = ("median", "hyperband", "asha", "none")
COMPARED_BEFORE_PRUNING: Final = 4
"""Trials that are done before the median of them ends another one."""
MEASURED_TRIALS: Final = 10
"""Done ones that it takes to say which key matters."""
REDUCTION: Final = 3
"""Of hyperband and asha: one of so many trials goes on to the next rung."""

State = Literal["done", "pruned", "failed", "running"]

STATES: Final[Mapping[Any, State]] = {
    trial.TrialState.COMPLETE: "done",
    trial.TrialState.PRUNED: "pruned",
    trial.TrialState.FAIL: "failed",
    trial.TrialState.RUNNING: "running",
}


@dataclass(frozen=True)
class Row:
    """What is known of a trial."""

    number: int
    state: State
    value: float | None
    """Of a pruned one the last that it came to."""
    values: Mapping[str, Any]
    """By key of the recipe."""
    reason: str = ""
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a sweep searches; the same for as long as it lives."""

    space: Space
    sampler: str
    pruner: str
    mode: Literal["min", "max"]
    seed: int
    num_trials: int
    """As planned at its start; it may become more."""
    first: Sequence[Mapping[str, Any]]
    """Values that are tried first."""
    max_resource: int | None
    """Evaluations of a whole trial, if that is known."""

    def make_sampler(self, number: int) -> Any:
        """For the suggestion of one trial."""
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.sampler == "tpe":
            # Of few trials not all can be spent on chance.
            startup = min(10, max(4, self.num_trials // 3))
            return samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
        if self.sampler == "evolution":
            # NSGA-II and not CMA-ES: that knows no choices, which recipes have many of.
            size = min(50, max(4, self.num_trials // 4))
            return samplers.NSGAIISampler(seed=seed, population_size=size)
        return samplers.RandomSampler(seed=seed)  # a grid is queued as a whole

    def make_pruner(self) -> Any:
        if self.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=COMPARED_BEFORE_PRUNING)
        if self.pruner == "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
        if self.pruner == "hyperband":
            most = "auto" if self.max_resource is None else self.max_resource
            return pruners.HyperbandPruner(
                min_resource=1, max_resource=most, reduction_factor=REDUCTION
            )
        return pruners.NopPruner()


class Study:
    """Not thread-safe; the folder's lock must be held."""

    def __init__(self, plan: Plan, study: Any) -> None:
        self._plan = plan
        self._study = study
        self._trials: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: Path, plan: Plan, settings: Mapping[str, Any]) -> Study:
        """Makes it, or opens what an earlier process left. InvalidRequest if that had other
        *settings*, plain values for JSON."""
        optuna.logging.set_verbosity(logging.WARNING)
        path = folder / FILE
        clean(path)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=NAME,
            direction="minimize" if plan.mode == "min" else "maximize",
            pruner=plan.make_pruner(),
            load_if_exists=True,
        )
        before, now = study.user_attrs.get("settings"), json.loads(json.dumps(settings))
        if before is not None and before != now:
            other = sorted(name for name in now if now[name] != before.get(name))
            raise InvalidRequest(
                f"{folder} has a sweep with other settings ({', '.join(other) or 'fewer'}): give "
                "output.folder=… and run=…, or the arguments of before"
            )
        if "is_ready" not in study.user_attrs:
            study.set_user_attr("settings", now)
            for values in plan.first:
                study.enqueue_trial(encode(values), skip_if_exists=True)
            study.set_user_attr("is_ready", True)
        return cls(plan, study)

    # Asking.

    def running(self) -> list[int]:
        """Trials that an earlier process had begun and not ended."""
        found = self._study.get_trials(deepcopy=False, states=(trial.TrialState.RUNNING,))
        for each in found:
            self._trials[each.number] = trial.Trial(self._study, each._trial_id)
        return [each.number for each in found]

    @property
    def num_begun(self) -> int:
        return sum(
            each.state != trial.TrialState.WAITING
            for each in self._study.get_trials(deepcopy=False)
        )

    def ask(self) -> int:
        """Begins a trial; its number."""
        self._study.sampler = self._plan.make_sampler(self.num_begun)
        ranges = {each.name: distribution(each) for each in self._plan.space.parameters}
        begun = self._study.ask(ranges)
        self._trials[begun.number] = begun
        return int(begun.number)

    def values(self, number: int) -> dict[str, Any]:
        return decode(self._plan.space, self._trials[number].params)

    # Telling.

    def report(self, number: int, resource: int, value: float) -> None:
        """What a trial came to at its evaluation *resource*, from 1. Twice is as good as once."""
        begun = self._trials[number]
        if resource not in begun.storage.get_trial(begun._trial_id).intermediate_values:
            begun.report(value, resource)

    def should_prune(self, number: int) -> bool:
        return bool(self._trials[number].should_prune())

    def note(self, number: int, steps: int, seconds: float) -> None:
        """What a trial cost; before its end is told."""
        self._trials[number].set_user_attr("steps", steps)
        self._trials[number].set_user_attr("seconds", round(seconds, 3))

    def complete(self, number: int, value: float) -> None:
        self._study.tell(number, value)

    def prune(self, number: int) -> None:
        self._study.tell(number, state=trial.TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        self._trials[number].set_user_attr("reason", reason)
        self._study.tell(number, state=trial.TrialState.FAIL)

    # Looking.

    def rows(self) -> list[Row]:
        return [
            Row(
                each.number,
                STATES[each.state],
                each.value,
                decode(self._plan.space, each.params),
                each.user_attrs.get("reason", ""),
                each.user_attrs.get("steps", 0),
                each.user_attrs.get("seconds", 0.0),
            )
            for each in self._study.get_trials(deepcopy=False)
            if each.state in STATES
        ]

    def best(self) -> Row | None:
        """Of the trials that are done."""
        rows = [row for row in self.rows() if row.state == "done" and row.value is not None]
        sign = 1 if self._plan.mode == "min" else -1
        return min(rows, key=lambda row: sign * (row.value or 0.0), default=None)

    def importances(self) -> dict[str, float]:
        """How much of the differences between trials each key explains (PED-ANOVA, Watanabe et al.
        2023); nothing where too few trials are done to tell."""
        rows = [row for row in self.rows() if row.state == "done"]
        if len(self._plan.space.parameters) < 2 or len(rows) < MEASURED_TRIALS:
            return {}
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # all values are equal, say
            return {}
        return {name: float(value) for name, value in found.items()}


def clean(path: Path) -> None:
    """Mends what a process that was killed may have left: a torn last line, and its lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def distribution(parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return distributions.CategoricalDistribution([plain(each) for each in parameter.choices])
    if parameter.kind == "int":
        low, high, step = int(parameter.low), int(parameter.high), int(parameter.step or 1)
        return distributions.IntDistribution(low, high, log=parameter.log, step=step)
    return distributions.FloatDistribution(
        parameter.low, parameter.high, log=parameter.log, step=parameter.step
    )


def plain(value: Any) -> Any:
    """As Optuna takes choices: lists are none."""
    return toml_text(value) if isinstance(value, list) else value


def encode(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in values.items()}


def decode(space: Space, found: Mapping[str, Any]) -> dict[str, Any]:
    """What `encode` took, in the order of the space."""
    values = {}
    for parameter in space.parameters:
        if parameter.name in found:
            value = found[parameter.name]
            same = (each for each in parameter.choices if plain(each) == value)
            values[parameter.name] = next(same, value)
    return values
