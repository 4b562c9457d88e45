"""What a sweep may choose: keys of the recipe, each with a range or choices, checked before it
begins. Pure.

    [optimizer.learning_rate]
    low = 1e-4
    high = 1e-1
    log = true

    [model.channels]
    choices = [[8, 16], [16, 32]]
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from forebay_trainer import config as configuration
from forebay_trainer.search.job import toml_text
from forebay_wire.errors import InvalidRequest

Kind = Literal["float", "int", "choice"]

FIELDS: Final = ("low", "high", "log", "step", "choices")

OWN: Final[Mapping[str, str]] = {
    "run": "each trial has a run of its own",
    "address": "all trials share one daemon",
    "output.": "each trial has a folder of its own",
    "metrics.": "it changes nothing that is learnt",
    "watch.": "it changes nothing that is learnt",
    "evaluation.": "trials are compared by their evaluations",
    "checkpoint.": "it changes nothing that is learnt, and the sweep needs it to go on",
    "data.num_folds": "a trial is one run",
}
"""Keys, or their beginnings, that a sweep does not search, and why."""

AFTER_FORK: Final[Mapping[str, str]] = {
    "seed": "the order of the samples",
    "data.dataset": "the order of the samples",
    "data.version": "the order of the samples",
    "data.follow": "the order of the samples",
    "data.train_split": "the order of the samples",
    "data.fold": "the order of the samples",
    "data.shuffle": "the order of the samples",
    "data.window_blocks": "the order of the samples",
    "data.block_rows": "the order of the samples",
    "optimizer.name": "what the optimizer keeps",
    "average.decay": "whether an average is kept",
    "precision": "whether losses are scaled",
}
"""Keys that a generation stands on: all runs that begin from it share their values."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One key to be searched."""

    name: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    choices: Sequence[Any] = ()

    @property
    def ends(self) -> Sequence[Any]:
        """The values that must be valid, if all are to be."""
        return self.choices if self.kind == "choice" else (self.low, self.high)

    def has(self, value: Any) -> bool:
        if self.kind == "choice":
            return any(value == each and type(value) is type(each) for each in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return self.low <= value <= self.high and math.isclose(steps, round(steps), abs_tol=1e-9)

    def grid(self) -> Sequence[Any]:
        """All values; InvalidRequest where there is no end of them."""
        if self.kind == "choice":
            return self.choices
        step = 1 if self.kind == "int" and self.step is None and not self.log else self.step
        if step is None:
            raise InvalidRequest(
                f"{self.name}: a grid needs choices, or low, high and step; else take another "
                "--sampler"
            )
        num = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + number * step for number in range(num)]

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"one of {', '.join(toml_text(each) for each in self.choices)}"
        step = "" if self.step is None else f", step {self.step:g}"
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}{step}"


@dataclasses.dataclass(frozen=True)
class Space:
    parameters: Sequence[Parameter]

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """``key=value`` of a trial."""
        return [f"{name}={toml_text(value)}" for name, value in values.items()]

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, the last key changing fastest."""
        columns = [parameter.grid() for parameter in self.parameters]
        names = [parameter.name for parameter in self.parameters]
        return [dict(zip(names, row, strict=True)) for row in itertools.product(*columns)]

    def of(self, config: Any) -> dict[str, Any] | None:
        """The values that a configuration has, if the space has them."""
        found = {}
        for parameter in self.parameters:
            value = config
            for part in parameter.name.split("."):
                value = getattr(value, part)
            if isinstance(value, tuple):
                value = list(value)
            if not parameter.has(value):
                return None
            found[parameter.name] = value
        return found


def read(path: Path, config: type) -> Space:
    """Reads a space of keys of *config*. InvalidRequest, with file, line and key, for what is not
    valid in it."""
    if not path.is_file():
        raise InvalidRequest(f"no space file {path}: give --space a TOML file")
    document = configuration.read(path)

    def place(name: str) -> str:
        near = (
            at
            for leaf, at in document.source.items()
            if leaf == name or leaf.startswith(f"{name}.")
        )
        return next(near, str(path))

    parameters = list(walk(config, config, document.tree, "", place))
    if not parameters:
        raise InvalidRequest(f"{path} has no key to search; write [optimizer.learning_rate], say")
    return Space(parameters)


Place = Callable[[str], str]


def walk(
    root: type, config: Any, tree: Mapping[str, Any], prefix: str, place: Place
) -> Iterator[Parameter]:
    hints = typing.get_type_hints(config)
    for key, table in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise configuration.unknown_key(root, name, place(name))
        is_section = dataclasses.is_dataclass(hints[key])
        if not isinstance(table, Mapping):
            example = f"[{name}.KEY]" if is_section else f"[{name}]"
            raise InvalidRequest(
                f"{name!r} ({place(name)}) must be a table with low and high, or with choices, as "
                f"{example}; a value that is not searched is an argument key=value"
            )
        if is_section:
            yield from walk(root, hints[key], table, f"{name}.", place)
        else:
            yield parameter(name, table, hints[key], place)


def parameter(name: str, table: Mapping[str, Any], target: Any, place: Place) -> Parameter:
    for own, why in OWN.items():
        if name == own or (own.endswith(".") and name.startswith(own)):
            raise InvalidRequest(f"{name!r} ({place(name)}) cannot be searched: {why}")
    for field in table:
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it may be {', '.join(FIELDS)}"
            raise InvalidRequest(f"unknown {field!r} of {name!r} ({place(name)}): {advice}")
    if "choices" in table:
        return choice(name, table, target, place)
    return bounds(name, table, target, place)


def choice(name: str, table: Mapping[str, Any], target: Any, place: Place) -> Parameter:
    where = place(name)
    if len(table) > 1:
        raise InvalidRequest(f"{name!r} ({where}) has choices and a range: give one of them")
    values = table["choices"]
    if not isinstance(values, list) or len(values) < 2:
        raise InvalidRequest(f"choices of {name!r} ({where}) must be a list of at least two values")
    checked = [configuration.check(name, value, target, where) for value in values]
    found = [list(value) if isinstance(value, tuple) else value for value in checked]
    texts = [toml_text(value) for value in found]
    if len(set(texts)) < len(texts):
        raise InvalidRequest(f"choices of {name!r} ({where}) has a value twice: {', '.join(texts)}")
    return Parameter(name, "choice", choices=tuple(found))


def bounds(name: str, table: Mapping[str, Any], target: Any, place: Place) -> Parameter:
    where = place(name)
    kind = kind_of(target)
    if kind is None:
        raise InvalidRequest(
            f"{name!r} ({where}) is {configuration.describe(target)}, no number: give it choices"
        )
    if missing := [field for field in ("low", "high") if field not in table]:
        raise InvalidRequest(f"{name!r} ({where}) lacks {' and '.join(missing)}, or choices")
    low, high, step = (number(name, table, field, kind, place) for field in ("low", "high", "step"))
    log = configuration.check(f"{name}.log", table.get("log", False), bool, where)
    assert low is not None
    assert high is not None
    if not low < high:
        raise InvalidRequest(f"{name!r} ({where}): low must be below high, not {low!r} to {high!r}")
    if log and low <= 0:
        raise InvalidRequest(f"{name!r} ({where}): log needs low above 0, not {low!r}")
    if log and step is not None:
        raise InvalidRequest(f"{name!r} ({where}): log and step exclude one another")
    if step is not None and not 0 < step <= high - low:
        raise InvalidRequest(
            f"{name!r} ({where}): step must be above 0 and at most {high - low:g}, not {step!r}"
        )
    return Parameter(name, kind, low, high, step, log)


def number(
    name: str, table: Mapping[str, Any], field: str, kind: Kind, place: Place
) -> float | None:
    if field not in table:
        return None
    value: float = configuration.check(
        f"{name}.{field}", table[field], int if kind == "int" else float, place(f"{name}.{field}")
    )
    if not math.isfinite(value):
        raise InvalidRequest(f"{name}.{field} ({place(name)}) must be finite, not {value}")
    return value


def kind_of(target: Any) -> Kind | None:
    """Of numbers that the declared type takes."""
    if configuration.convert(0.5, target) is not configuration.MISMATCH:
        return "float"
    return "int" if configuration.convert(1, target) is not configuration.MISMATCH else None


def check_values(space: Space, overrides: Sequence[str], load: Callable[[str], Any]) -> None:
    """*load*: the recipe with one more argument; raises for one that is not valid. InvalidRequest
    for a key that is also an argument, or a range that goes beyond what the recipe takes."""
    fixed = {configuration.split_override(each)[0] for each in overrides}
    for each in space.parameters:
        if each.name in fixed:
            raise InvalidRequest(
                f"{each.name} is searched, and an argument fixes it: leave one of them out"
            )
        for value in each.ends:
            try:
                load(f"{each.name}={toml_text(value)}")
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"{each.name}: the space has {toml_text(value)}, which the recipe refuses: "
                    f"{error.message}"
                ) from None


def check_fork(space: Space) -> None:
    """InvalidRequest for a key that a run that begins from another one's generation cannot change;
    which of ``model.*`` it can, depends on the weights."""
    for each in space.parameters:
        if each.name in AFTER_FORK:
            raise InvalidRequest(
                f"{each.name} cannot be searched where trials begin from a common generation: "
                f"{AFTER_FORK[each.name]} is part of that; leave it out, or the common part"
            )


def check_same_shapes(
    space: Space, base: Mapping[str, Any], shapes: Callable[[str], Mapping[str, Any]]
) -> None:
    """*shapes*: of the weights by their names, with one more argument; *base*: without. For
    `check_fork`, where keys of the model are searched."""
    for each in space.parameters:
        for value in each.ends if each.name.startswith("model.") else ():
            found = shapes(f"{each.name}={toml_text(value)}")
            names = [name for name in {**base, **found} if base.get(name) != found.get(name)]
            if names:
                raise InvalidRequest(
                    f"{each.name} cannot be searched where trials begin from a common generation: "
                    f"with {toml_text(value)} other weights are to be restored ({names[0]}: "
                    f"{base.get(names[0], 'not there')} becomes "
                    f"{found.get(names[0], 'not there')}); leave it out, or the common part"
                )
