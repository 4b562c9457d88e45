"""Draws a picture of what a run's generator draws: ``python …/samples.py RUN [key=value…]``.

Shape letters: B pictures, C channels, H height, W width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import image
from torch import Tensor

from forebay_trainer import recipe as recipes
from forebay_trainer.checkpoint import weights_of
from forebay_trainer.dropout import uniform
from forebay_wire.errors import ForebayError


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw what a run's generator draws.")
    parser.add_argument("run", help="name of the run")
    parser.add_argument("override", nargs="*", help="key=value, as the run had them")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), metavar="FILE")
    parser.add_argument("--rows", type=int, default=4, metavar="N")
    parser.add_argument("--columns", type=int, default=16, metavar="N")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = recipes.load(str(Path(__file__).parent), options.override)
        generator = recipe.build({}).modules["generator"]
        generator.load_state_dict(weights_of(recipe.config.address, options.run, "generator"))
        noise_features = next(generator.parameters()).shape[1]
        noise = 2 * uniform((0,), torch.arange(options.rows * options.columns), noise_features) - 1
        with torch.no_grad():
            drawn_BCHW = generator.eval()(noise)
    except ForebayError as error:
        print(f"samples.py: {error.message}", file=sys.stderr)
        return 1
    image.imsave(options.out, sheet(drawn_BCHW, options.columns).numpy(), cmap="gray_r")
    return 0


def sheet(images_BCHW: Tensor, num_columns: int) -> Tensor:
    """All pictures in rows of so many, side by side: one picture, pixels in 0 to 1."""
    rows = [torch.cat(list(row[:, 0]), dim=1) for row in images_BCHW.split(num_columns)]
    return (torch.cat(rows) + 1) / 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
