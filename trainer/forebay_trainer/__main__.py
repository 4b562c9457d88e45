"""``torchrun … -m forebay_trainer RECIPE key=value …``: one rank of a training run.

Exit status: 0 trained to the end or ended by SIGTERM after saving, 1 an error while training,
2 a mistake in the recipe or the arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from forebay_trainer import config as configuration
from forebay_trainer.train import TrainConfig, train
from forebay_wire.errors import ForebayError, InvalidRequest, NotFound


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="forebay_trainer", description="Train a model from a recipe, resuming by itself."
    )
    parser.add_argument("recipe", nargs="?", help="TOML file, or the name of a bundled recipe")
    parser.add_argument("override", nargs="*", help="key=value, as optimizer.learning_rate=0.01")
    parser.add_argument("--keys", action="store_true", help="list all keys and end")
    options = parser.parse_args(arguments)
    if options.keys:
        for key in configuration.keys(TrainConfig):
            print(f"{key.name} = {key.default}  # {key.type}; {key.meaning}")
        return 0
    if options.recipe is None:
        parser.error("give a recipe, for example recipes/mnist_cnn.toml")
    try:
        config = configuration.load(TrainConfig, options.recipe, options.override)
    except (InvalidRequest, NotFound) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank meets the same mistake
            print(f"forebay_trainer: {error.message}", file=sys.stderr)
        return 2
    rank = os.environ.get("RANK", "0")
    try:
        reason = train(config)
    except ForebayError as error:
        name = type(error).__name__
        print(f"forebay_trainer, rank {rank}: {name}: {error.message}", file=sys.stderr)
        return 1
    if rank == "0":
        print(f"run {config.run}: {reason}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
