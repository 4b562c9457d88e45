"""``forebay_trainer sweep RECIPE --space FILE``: a search for the values of keys that do best."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from forebay_trainer import config as configuration
from forebay_trainer import recipe as recipes
from forebay_trainer.data import connect
from forebay_trainer.search import report
from forebay_trainer.search import space as spaces
from forebay_trainer.search.common_part import NAME, CommonPart, shapes
from forebay_trainer.search.job import Base, check_base, check_new
from forebay_trainer.search.outcome import status_of
from forebay_trainer.search.pool import Pool, Start, folder_of_one, leashed
from forebay_trainer.search.study import PRUNERS, SAMPLERS, Plan, Study
from forebay_trainer.search.trials import Objective, Trials
from forebay_trainer.stop import StopSignal
from forebay_wire.errors import ForebayError, InvalidRequest

NOT_COMPARED: Final = ("run", "address", "output", "metrics", "watch", "parallel")
"""Of the configuration: what may differ between two starts of the same sweep."""

LOG_WIDTH: Final = 200
"""Letters in a line of the table, where there is no terminal."""


class SweepFailed(ForebayError):
    """Too many trials failed, or all."""


def main(arguments: Sequence[str], *, start: Start = leashed) -> int:
    """Answers the exit status; *start* is how a process is started."""
    options = parse(arguments)
    return status_of(lambda: Sweep(options, start).run())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="forebay_trainer sweep",
        description="Search for the values of keys that do best; started again, it goes on.",
    )
    parser.add_argument("recipe", help="TOML file, or the name of a bundled recipe")
    parser.add_argument("override", nargs="*", help="key=value that all trials have")
    parser.add_argument("--size", metavar="NAME", help="a size that the recipe has, as gpu")
    parser.add_argument(
        "--space", type=Path, required=True, metavar="FILE", help="TOML: keys, ranges and choices"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="in all (20; a grid: all)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="default: tpe")
    parser.add_argument("--pruner", choices=PRUNERS, default="median", help="default: median")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument(
        "--value",
        choices=("last", "best"),
        default="last",
        help="which evaluation a trial is compared by (default: last)",
    )
    parser.add_argument(
        "--warm-up", type=int, default=0, metavar="STEPS", help="trained once, for all trials"
    )
    parser.add_argument("--num-ranks", type=int, default=1, metavar="N", help="processes a trial")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="trials at a time")
    parser.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="failed trials in a row that end it",
    )
    parser.add_argument("--json", action="store_true", help="the outcome as JSON on stdout")
    options = parser.parse_intermixed_args(arguments)
    least = {"trials": 1, "seed": 0, "warm_up": 0, "num_ranks": 1, "jobs": 1, "max_failures": 1}
    for name, number in least.items():
        if (getattr(options, name) or number) < number:
            parser.error(f"--{name.replace('_', '-')} must be at least {number}")
    return options


class Sweep:
    """One process of a sweep."""

    def __init__(self, options: argparse.Namespace, start: Start) -> None:
        """Reads recipe and space. InvalidRequest for what is not valid in them."""
        self._options = options
        self._start = start
        console = Console(stderr=options.json, highlight=False)
        width = None if console.is_terminal else LOG_WIDTH
        self._console = Console(stderr=options.json, highlight=False, width=width)
        self._recipe = self._load()
        self._config = self._recipe.config
        check_base(self._recipe)
        self._base = Base(
            self._recipe, options.recipe, options.size, options.override, options.num_ranks
        )
        self._space = spaces.read(options.space, type(self._config))
        spaces.check_values(self._space, options.override, self._load)
        self._is_forked = options.warm_up > 0 or self._config.checkpoint.fork_from is not None
        if options.warm_up and self._config.checkpoint.fork_from is not None:
            raise InvalidRequest("--warm-up and checkpoint.fork_from are two beginnings: give one")
        if self._is_forked:
            spaces.check_fork(self._space)
        if options.warm_up and options.warm_up >= (self._config.max_steps or math.inf):
            raise InvalidRequest("--warm-up must be less than max_steps, the steps of a trial")
        grid = self._space.grid() if options.sampler == "grid" else []
        first = self._space.of(self._config)
        self._num_trials = options.trials or len(grid) or 20
        if grid:
            self._num_trials = min(self._num_trials, len(grid))
        self._plan = Plan(
            space=self._space,
            sampler=options.sampler,
            pruner=options.pruner,
            mode=self._config.evaluation.mode,
            seed=options.seed,
            num_trials=self._num_trials,
            first=grid or ([] if first is None else [first]),
            max_resource=self._max_resource(),
        )

    def _load(self, *more: str) -> recipes.Recipe:
        options = self._options
        return recipes.load(options.recipe, [*options.override, *more], size=options.size)

    def _max_resource(self) -> int | None:
        every, steps = self._config.evaluation.every_steps, self._config.max_steps
        if not every:
            return self._config.num_epochs
        return None if steps is None else -(-(steps - self._options.warm_up) // every)

    def run(self) -> int:
        """Answers the exit status."""
        base, options = self._base, self._options
        with StopSignal(signal.SIGTERM, signal.SIGINT) as stop, folder_of_one(base.folder):
            # Held over all trials: they find one daemon, which is a child of none of them.
            with connect(self._config.address) as client:
                runs = [each.run for each in client.runs() if each.num_generations]
                check_new(base, runs, rf"{NAME}|trial\d+")
                about = self._recipe.about(client)
                if self._is_forked and any(
                    each.name.startswith("model.") for each in self._space.parameters
                ):
                    spaces.check_same_shapes(
                        self._space,
                        shapes(self._recipe, about),
                        lambda argument: shapes(self._load(argument), about),
                    )
                study = Study.open(base.folder, self._plan, self._settings())
                trials = self._work(study, stop)
            rows, best = study.rows(), study.best()
            is_whole = len(rows) >= self._num_trials and all(row.state != "running" for row in rows)
            if trials is None or (stop.requested and not is_whole and not trials.failure):
                self._say("saved and left; the same command goes on")
                return 0
            outcome = report.write(
                base.folder,
                rows,
                best,
                study.importances(),
                facts=self._facts(),
                command=None if best is None else self._command(best.values),
                title=f"{self._recipe.name}: {self._config.evaluation.metric}",
            )
        if options.json:
            print(json.dumps(outcome))
        report.show(self._console, outcome)
        if trials.failure or best is None:
            raise SweepFailed(trials.failure or "no trial came to its end: the table says why")
        return 0

    def _work(self, study: Study, stop: StopSignal) -> Trials | None:
        """Runs what is left to do; None if it was told to end before all trials had a beginning."""
        options, common = self._options, list[str]()
        with Pool(options.jobs, start=self._start) as pool:
            if options.warm_up:
                part = CommonPart(self._base, options.warm_up)
                pool.work(part, stop)
                if not part.is_there:
                    return None
                common.append(f"checkpoint.fork_from={part.fork}")
            trials = Trials(
                self._base,
                self._space,
                study,
                self._objective(),
                num_trials=self._num_trials,
                max_failures=options.max_failures,
                common=common,
                say=self._say,
            )
            pool.work(trials, stop)
        return trials

    def _objective(self) -> Objective:
        found = self._config.evaluation
        return Objective(found.metric, found.mode, self._options.value, found.every_steps)

    def _facts(self) -> dict[str, Any]:
        options, evaluation = self._options, self._config.evaluation
        return {
            "recipe": self._recipe.name,
            "run": self._config.run,
            "metric": evaluation.metric,
            "mode": evaluation.mode,
            "value": options.value,
            "sampler": options.sampler,
            "pruner": options.pruner,
            "seed": options.seed,
            "warm_up": options.warm_up,
            "space": {each.name: str(each) for each in self._space.parameters},
        }

    def _settings(self) -> dict[str, Any]:
        """What two starts of the same sweep have in common: the facts, and the configuration by
        dotted keys."""
        config = configuration.as_dict(self._config)
        kept = {name: value for name, value in config.items() if name not in NOT_COMPARED}
        searched = {each.name for each in self._space.parameters}
        names = [name for name in configuration.flatten(kept) if name not in searched]
        return {**{name: configuration.value_at(kept, name) for name in names}, **self._facts()}

    def _command(self, values: Mapping[str, Any]) -> list[str]:
        """That trains with the values of a trial, as a run of its own."""
        config = self._config
        more = self._space.arguments(values)
        if self._options.warm_up:
            more.append(
                f"checkpoint.fork_from={CommonPart(self._base, self._options.warm_up).fork}"
            )
        more += [f"run={config.run}-best", f"output.folder={self._base.folder / 'best'}"]
        return [Path(sys.executable).name, *self._base.command(more)[1:]]

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
