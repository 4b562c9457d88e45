"""What a run of many is: its arguments, its folder, and how it ended as its events tell. Pure."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from forebay_trainer.config import split_override
from forebay_trainer.metrics.history import Event, History
from forebay_trainer.processes import torchrun
from forebay_trainer.recipe import Recipe
from forebay_wire.errors import InvalidRequest

MODULE: Final = "forebay_trainer"
METRICS: Final = "metrics.jsonl"
OUT_OF_MEMORY_SIGNAL: Final = -9

ENDED_WELL: Final = ("done", "stopped early")

SAID: Final = re.compile(r"^forebay_trainer(?:, rank \d+)?: (?!RankLost)(.+)$", re.MULTILINE)
RAISED: Final = re.compile(
    r"^(?:\[rank\d+\]: )?((?!torch\.distributed\.elastic)\w[\w.]*(?:Error|Exception)\b.*)$",
    re.MULTILINE,
)
"""The last line of a traceback; torchrun has one of its own, which only says that a rank failed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run to be started; started again, it goes on."""

    run: str
    folder: Path
    """Its ``output.folder``."""
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS

    @property
    def log(self) -> Path:
        """What its processes print, of all attempts."""
        return self.folder / "log.txt"


@dataclass(frozen=True)
class Base:
    """The recipe that all runs share, as the command line gave it."""

    recipe: Recipe
    name: str
    """Of the recipe, as an argument."""
    size: str | None
    overrides: Sequence[str]
    num_ranks: int

    @property
    def folder(self) -> Path:
        return Path(self.recipe.config.output.folder)

    def job(self, name: str, values: Sequence[str], slot: Slot) -> Job:
        """The run ``RUN-NAME`` in the folder ``NAME``, with *values* (``key=value``) on top."""
        config, folder = self.recipe.config, self.folder / name
        values = [*values, f"run={config.run}-{name}", f"output.folder={folder}"]
        if "jsonl" not in config.metrics.sinks:
            values.append(f"metrics.sinks={toml_text([*config.metrics.sinks, 'jsonl'])}")
        if "prometheus" in config.metrics.sinks:  # one port is not enough for several runs
            values.append("metrics.port=0")
        return Job(
            run=f"{config.run}-{name}",
            folder=folder,
            command=self.command(values),
            environment=slot.environment(self.num_ranks),
        )

    def arguments(self, values: Sequence[str]) -> list[str]:
        """Of ``python -m forebay_trainer``, for the recipe with *values* on top."""
        size = [] if self.size is None else ["--size", self.size]
        names = {value.partition("=")[0] for value in values}
        others = [each for each in self.overrides if split_override(each)[0] not in names]
        return [self.name, *size, *others, *values]

    def command(self, values: Sequence[str]) -> list[str]:
        if self.num_ranks > 1:
            return torchrun(self.num_ranks, MODULE, *self.arguments(values))
        return [sys.executable, "-m", MODULE, *self.arguments(values)]


@dataclass(frozen=True)
class Slot:
    """The share of the machine that one run of several has."""

    number: int
    num_slots: int
    num_cores: int
    gpus: Sequence[str]
    """As ``CUDA_VISIBLE_DEVICES`` names them; none: the run computes on cores."""

    def environment(self, num_ranks: int) -> dict[str, str]:
        """The cores are divided, the GPUs go round."""
        found = {"PYTHONUNBUFFERED": "1"}
        if self.num_slots * num_ranks > 1:
            found["OMP_NUM_THREADS"] = str(max(1, self.num_cores // (self.num_slots * num_ranks)))
        if self.gpus and self.num_slots > 1:
            first = self.number * num_ranks
            own = [self.gpus[each % len(self.gpus)] for each in range(first, first + num_ranks)]
            found["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return found


def toml_text(value: Any) -> str:
    """A value as a ``key=value`` argument spells it, so that it is read as that very value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"[{', '.join(toml_text(each) for each in value)}]"


def check_base(recipe: Recipe) -> None:
    """InvalidRequest for what makes more than one run of a recipe, or one that cannot go on."""
    if recipe.config.data.num_folds and recipe.config.data.fold is None:
        raise InvalidRequest(
            "data.num_folds trains one run for each fold, and this command many runs of one: "
            "give data.fold=0, say"
        )
    if recipe.config.checkpoint.resume != "latest":
        raise InvalidRequest(
            "checkpoint.resume must be 'latest': a run that is started again goes on"
        )


def check_new(base: Base, runs: Iterable[str], names: str) -> None:
    """*runs*: those that the daemon has generations of; *names*: a pattern of those that are ours.
    InvalidRequest if one of them was trained in another folder: it would go on from there."""
    prefix = f"{base.recipe.config.run}-"
    for run in runs:
        name = run.removeprefix(prefix)
        if not run.startswith(prefix) or not re.fullmatch(names, name):
            continue
        if not (base.folder / name / METRICS).exists():
            raise InvalidRequest(
                f"the daemon has a run {run} already, and {base.folder} knows nothing of it: give "
                "run=…, or the output.folder=… of before"
            )


@dataclass(frozen=True)
class End:
    """How a run ended."""

    state: Literal["done", "left", "failed"]
    """``left``: it saved and left, and goes on when it is started again."""
    reason: str


def end_of(events: Sequence[Event], status: int | None, log: str) -> End:
    """*status*: of the process; None if it is not known, as it ended before this process began.
    *log*: what the attempt printed."""
    last = events[-1] if events else {}
    if last.get("event") == "end":
        reason = str(last["reason"])
        return End("done" if reason in ENDED_WELL else "left", reason)
    if status is None:
        return End("left", "it was killed")
    return End("failed", why(status, log))


def why(status: int, log: str) -> str:
    """The sentence of the rank that failed first, as far as the log tells."""
    for pattern in (SAID, RAISED):
        if found := pattern.findall(log):
            return str(found[0 if pattern is SAID else -1])
    if status == OUT_OF_MEMORY_SIGNAL:
        return "killed by signal 9, as the kernel does when memory is short"
    lines = [line for line in log.splitlines() if line.strip()]
    return f"status {status}: {lines[-1].strip() if lines else 'it printed nothing'}"


def quality(event: Event) -> dict[str, float]:
    """The metrics of an evaluation."""
    return {name: value for name, value in event.items() if name.startswith("test_")}


def seconds_of(events: Sequence[Event]) -> float:
    """From the first step's beginning to the end, added up over the attempts: with evaluations and
    saves, without the start of the processes."""
    bounds: dict[int, tuple[float, float]] = {}
    for event in events:
        first, _ = bounds.get(event["attempt"], (event["time"], 0.0))
        bounds[event["attempt"]] = first, event["time"]
    return sum(last - first for first, last in bounds.values())


def last_quality(found: History, run: str, folder: Path) -> dict[str, float]:
    """The metrics of the last evaluation; InvalidRequest if there was none."""
    if not found.evaluations:
        raise InvalidRequest(
            f"run {run} has no evaluation in {folder}: give the recipe data.test_split or "
            "data.test_dataset; or it was trained in another folder before: give run=…"
        )
    return quality(found.evaluations[-1])
