"""``torchrun … -m forebay_trainer RECIPE key=value …``: one rank of a training run.

Exit status: 0 trained to the end or ended by SIGTERM after saving, 1 an error while training,
2 a mistake in the recipe or the arguments, 3 ended because another rank failed, or all hung,
4 saved and left because another rank was told to end: start again on the ranks that stay.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from forebay_trainer import config as configuration
from forebay_trainer import recipe as recipes
from forebay_trainer.settings import TrainConfig
from forebay_trainer.watch import EXIT_STATUS, RankLost
from forebay_wire.errors import ForebayError, InvalidRequest, NotFound

LEFT_STATUS: Final = 4

COMMANDS: Final[Mapping[str, str]] = {
    "plot": "forebay_trainer.metrics.plot",
    "prepare": "forebay_trainer.prepare",
    "seeds": "forebay_trainer.search.seeds",
    "sweep": "forebay_trainer.search.sweep",
}
"""First argument to the module whose ``main(arguments)`` it runs, instead of training."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[arguments[0]])
        return int(module.main(arguments[1:]))
    options = parse(arguments)
    try:
        if options.keys:
            return list_keys(options.recipe)
        recipe = recipes.load(options.recipe, options.override, size=options.size)
    except (InvalidRequest, NotFound) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank meets the same mistake
            print(f"forebay_trainer: {error.message}", file=sys.stderr)
        return 2
    if options.dry_run:
        return told(lambda: show_plan(recipe, options.num_ranks, options.mtbf * 3600))
    return told(lambda: run(recipe))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="forebay_trainer", description="Train a model from a recipe, resuming by itself."
    )
    parser.add_argument("recipe", nargs="?", help="TOML file, or the name of a bundled recipe")
    parser.add_argument("override", nargs="*", help="key=value, as optimizer.learning_rate=0.01")
    parser.add_argument("--size", metavar="NAME", help="a size that the recipe has, as gpu")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, read and saved, and end"
    )
    parser.add_argument(
        "--num-ranks",
        type=int,
        default=int(os.environ.get("WORLD_SIZE", "1")),
        metavar="N",
        help="of --dry-run: plan for so many (default: those that run)",
    )
    parser.add_argument(
        "--mtbf",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="of --dry-run: mean time between failures of the run (default: 24)",
    )
    parser.add_argument("--keys", action="store_true", help="list all keys and end")
    options = parser.parse_intermixed_args(arguments)
    if options.recipe is None and not options.keys:
        parser.error(f"give a recipe: a TOML file, or one of {', '.join(recipes.names())}")
    return options


def list_keys(recipe: str | None) -> int:
    """Prints the keys that every recipe has, and those of *recipe*."""
    config = TrainConfig if recipe is None else type(recipes.load(recipe).config)
    for key in configuration.keys(config):
        print(f"{key.name} = {key.default}  # {key.type}; {key.meaning}")
    return 0


def run(recipe: recipes.Recipe) -> int:
    from forebay_trainer.folds import train_all  # with all of torch

    reason = train_all(recipe)
    if os.environ.get("RANK", "0") == "0":
        print(f"run {recipe.config.run}: {reason}", flush=True)
    return LEFT_STATUS if reason == "left" else 0


def show_plan(recipe: recipes.Recipe, num_ranks: int, mtbf_seconds: float) -> int:
    from forebay_trainer.plan import plan

    for line in plan(recipe, num_ranks, mtbf_seconds).lines():
        print(line)
    return 0


def told(act: Callable[[], int]) -> int:
    """Runs *act*; an error of ours is one sentence. Answers the exit status."""
    try:
        return act()
    except ForebayError as error:
        rank, name = os.environ.get("RANK", "0"), type(error).__name__
        print(f"forebay_trainer, rank {rank}: {name}: {error.message}", file=sys.stderr)
        return EXIT_STATUS if isinstance(error, RankLost) else 1


def run_main() -> int:
    """`main`, whose reader may leave: ``forebay_trainer --keys | head``."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(run_main())
