"""Writes as a run has learnt to: ``python …/sample.py RUN [key=value…]``.

Shape letters: B samples (one), T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from forebay_trainer import recipe as recipes
from forebay_trainer.checkpoint import weights_of
from forebay_trainer.data import connect
from forebay_trainer.models.transformer import Transformer
from forebay_trainer.preparation.tokens import Tokens, tokens_of
from forebay_wire.errors import ForebayError


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Write as a run has learnt to.")
    parser.add_argument("run", help="name of the run; its newest generation is taken")
    parser.add_argument("override", nargs="*", help="key=value, as the run had them")
    parser.add_argument("--recipe", default=str(Path(__file__).parent), help="as bpe.toml")
    parser.add_argument("--prompt", default="\n\n", metavar="TEXT", help="what it goes on from")
    parser.add_argument("--num-characters", type=int, default=300, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="below 1: likelier tokens"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = recipes.load(options.recipe, options.override)
        with connect(recipe.config.address) as client:
            about = recipe.config.data.about(client)
        model = recipe.build(about).modules["model"]
        assert isinstance(model, Transformer)
        model.load_state_dict(weights_of(recipe.config.address, options.run, "model"))
    except ForebayError as error:
        print(f"sample.py: {error.message}", file=sys.stderr)
        return 1
    print(
        written(
            model.eval(),
            tokens_of(about),
            options.prompt,
            num_characters=options.num_characters,
            temperature=options.temperature,
            seed=options.seed,
        )
    )
    return 0


@torch.no_grad()
def written(
    model: Transformer,
    tokens: Tokens,
    prompt: str,
    *,
    num_characters: int,
    temperature: float,
    seed: int,
) -> str:
    """The prompt and so many characters after it, each token drawn from what the model expects."""
    generator = torch.Generator().manual_seed(seed)
    num_places = model.architecture.num_places
    numbers = tokens.encode(prompt)[0]
    while len(tokens.decode(numbers)) < len(prompt) + num_characters:
        logits_BTV = model(torch.tensor([numbers[-num_places:]]))
        chances_V = torch.softmax(logits_BTV[0, -1] / temperature, dim=-1)
        numbers.append(int(torch.multinomial(chances_V, 1, generator=generator)))
    return tokens.decode(numbers)[: len(prompt) + num_characters]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
