"""``forebay_trainer seeds RECIPE``: the recipe once for each seed, and what comes out of it: mean ±
deviation of its metrics, a picture of its losses."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forebay_trainer import config as configuration
from forebay_trainer import recipe as recipes
from forebay_trainer.data import connect
from forebay_trainer.folds import together
from forebay_trainer.metrics.console import duration
from forebay_trainer.metrics.follow import Event
from forebay_trainer.metrics.history import History, history
from forebay_trainer.search.job import (
    Base,
    Job,
    Slot,
    check_base,
    check_new,
    last_quality,
    quality,
    seconds_of,
)
from forebay_trainer.search.outcome import status_of, write_json
from forebay_trainer.search.picture import losses
from forebay_trainer.search.pool import Pool, Running, Start, folder_of_one, leashed
from forebay_trainer.stop import StopSignal
from forebay_wire.errors import ForebayError, InvalidRequest

FILE: Final = "seeds.json"
PICTURE: Final = "loss.png"
NOT_COMPARED: Final = ("run", "seed", "address", "output", "metrics", "watch")
"""Of the configuration: what may differ between two starts of the same command."""


class SeedFailed(ForebayError):
    """A run of one of the seeds ended with an error."""


def main(arguments: Sequence[str], *, start: Start = leashed) -> int:
    """Answers the exit status; *start* is how a process is started."""
    options = parse(arguments)
    return status_of(lambda: run(options, start))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="forebay_trainer seeds",
        description="Train a recipe once for each seed; started again, it goes on where it was.",
    )
    parser.add_argument("recipe", help="TOML file, or the name of a bundled recipe")
    parser.add_argument("override", nargs="*", help="key=value, as optimizer.learning_rate=0.01")
    parser.add_argument("--size", metavar="NAME", help="a size that the recipe has, as gpu")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="how many, from the recipe's seed on"
    )
    parser.add_argument("--num-ranks", type=int, default=1, metavar="N", help="processes of a run")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="runs at a time")
    parser.add_argument("--json", action="store_true", help="the outcome as JSON on stdout")
    options = parser.parse_intermixed_args(arguments)
    for name, least in (("seeds", 2), ("num_ranks", 1), ("jobs", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return options


def run(options: argparse.Namespace, start: Start) -> int:
    recipe = recipes.load(options.recipe, options.override, size=options.size)
    check_base(recipe)
    base = Base(recipe, options.recipe, options.size, options.override, options.num_ranks)
    out = sys.stderr if options.json else sys.stdout
    first = recipe.config.seed
    seeds = Seeds(base, range(first, first + options.seeds), lambda line: print(line, file=out))
    with StopSignal(signal.SIGTERM, signal.SIGINT) as stop, folder_of_one(base.folder):
        check_settings(base.folder, settings_of(base))
        # Held over all runs: they find one daemon, which is a child of none of them.
        with connect(recipe.config.address) as client, Pool(options.jobs, start=start) as pool:
            runs = [each.run for each in client.runs() if each.num_generations]
            check_new(base, runs, r"seed\d+")
            pool.work(seeds, stop)
        if seeds.failure:
            raise SeedFailed(seeds.failure)
        if len(seeds.found) < options.seeds:
            print("saved and left; the same command goes on", file=out)
            return 0
        outcome = write(base, options, list(seeds.found.values()))
    if options.json:
        print(json.dumps(outcome))
    else:
        print("\n".join(lines(outcome)))
    return 0


@dataclass(frozen=True)
class Found:
    """A run that came to its end."""

    seed: int
    job: Job
    history: History
    quality: Mapping[str, float]
    """Of the last evaluation."""
    seconds: float


class Seeds:
    """The handler of the runs."""

    def __init__(self, base: Base, seeds: Sequence[int], say: Any) -> None:
        self.failure = ""
        """Why a run failed: then no other one is started."""
        self._base = base
        self._seeds = seeds
        self._say = say
        self._num_begun = 0
        self._done: dict[int, Found] = {}

    @property
    def found(self) -> dict[int, Found]:
        """By seed, in their order."""
        return {seed: self._done[seed] for seed in self._seeds if seed in self._done}

    def next(self, slot: Slot) -> Job | None:
        if self.failure or self._num_begun == len(self._seeds):
            return None
        seed = self._seeds[self._num_begun]
        self._num_begun += 1
        return self._base.job(f"seed{seed}", [f"seed={seed}"], slot)

    def progress(self, running: Running, events: Sequence[Event]) -> None:
        pass

    def ended(self, running: Running) -> None:
        job, end = running.job, running.end()
        if end.state == "failed":
            self.failure = self.failure or f"run {job.run} failed: {end.reason}; see {job.log}"
        if end.state != "done":
            return
        seed = int(job.folder.name.removeprefix("seed"))
        told = history(running.events, job.run)
        found = Found(
            seed, job, told, last_quality(told, job.run, job.folder), seconds_of(running.events)
        )
        self._done[seed] = found
        shown = "  ".join(f"{name} {value:.4g}" for name, value in found.quality.items())
        self._say(f"run {job.run}: {shown}  in {duration(found.seconds)}")


def settings_of(base: Base) -> dict[str, Any]:
    """What two starts of the same command have in common, as JSON knows it."""
    config = configuration.as_dict(base.recipe.config)
    kept = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    found: dict[str, Any] = json.loads(json.dumps({"recipe": base.recipe.name, **kept}))
    return found


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """InvalidRequest if the folder has runs of other settings; else notes them there."""
    path = folder / FILE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if other := differences(before, settings):
            raise InvalidRequest(
                f"{folder} has runs of other settings ({', '.join(other)}): give output.folder=… "
                "and run=…, or the arguments of before"
            )
    else:
        write_json(path, {"settings": settings})


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ."""
    names = {*configuration.flatten(before), *configuration.flatten(now)}

    def at(tree: Any, name: str) -> Any:
        for part in name.split("."):
            tree = tree.get(part) if isinstance(tree, Mapping) else None
        return tree

    return sorted(name for name in names if at(before, name) != at(now, name))


def write(base: Base, options: argparse.Namespace, found: Sequence[Found]) -> dict[str, Any]:
    """Writes ``seeds.json`` and the picture; what stands in the file."""
    spreads = together([each.quality for each in found])
    spans = [each.seconds for each in found]
    outcome = {
        "recipe": base.recipe.name,
        "size": base.size,
        "arguments": list(base.overrides),
        "num_ranks": base.num_ranks,
        "num_cores": os.cpu_count(),
        "jobs": options.jobs,
        "metrics": {
            name: {"mean": each.mean, "deviation": each.deviation, "values": each.values}
            for name, each in spreads.items()
        },
        "seconds": {"mean": statistics.fmean(spans), "deviation": statistics.stdev(spans)},
        "runs": [
            {
                "seed": each.seed,
                "run": each.job.run,
                "folder": str(each.job.folder),
                "steps": each.history.steps[-1]["step"] if each.history.steps else 0,
                "attempts": len(each.history.starts),
                "seconds": each.seconds,
                "evaluations": [
                    {"step": event["step"], **quality(event)} for event in each.history.evaluations
                ],
            }
            for each in found
        ],
        "settings": settings_of(base),
    }
    losses([each.history for each in found], base.folder / PICTURE, title(base, len(found)))
    write_json(base.folder / FILE, outcome)
    return outcome


def title(base: Base, num_seeds: int) -> str:
    size = f" ({base.size})" if base.size else ""
    return f"{base.recipe.name}{size}: {num_seeds} seeds, and their mean"


def lines(outcome: Mapping[str, Any]) -> list[str]:
    num_runs = len(outcome["runs"])
    found = [
        f"{name}: {each['mean']:.4f} ± {each['deviation']:.4f}  "
        f"({', '.join(f'{value:.4f}' for value in each['values'])})"
        for name, each in outcome["metrics"].items()
    ]
    time, deviation = outcome["seconds"]["mean"], outcome["seconds"]["deviation"]
    where = f"{outcome['num_ranks']} rank(s), {outcome['jobs']} run(s) at a time"
    found.append(f"a run takes {duration(time)} ± {duration(deviation)} ({where})")
    return [f"over {num_runs} seeds, mean ± standard deviation of the last evaluation:", *found]
