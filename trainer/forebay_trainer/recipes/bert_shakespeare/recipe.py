"""A transformer that tells words which were hidden from those around them.

Shape letters: B samples, T places of tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from forebay_trainer.config import setting
from forebay_trainer.dropout import uniform
from forebay_trainer.models.transformer import (
    Architecture,
    TransformerConfig,
    TransformerTask,
    perplexity,
)
from forebay_trainer.preparation.tokens import MASK, PADDING, SPECIAL
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest

TRAINING: Final = 1
EVALUATION: Final = 2
"""What draws are for: no two of them are alike."""

HIDDEN: Final = 0.8
RANDOM: Final = 0.1
"""Of the tokens that are to be told; the rest are seen as they are (Devlin et al. 2018, section
3.1), for in use no token is hidden."""


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    told_share: float = setting(0.15, "of the tokens that are to be told")

    def __post_init__(self) -> None:
        if not 0 < self.told_share < 1:
            raise InvalidRequest(f"told_share must lie between 0 and 1, not be {self.told_share}")


def build(config: Config, about: Mapping[str, Any]) -> Task:
    """*about*: vocabulary_size and num_places."""
    sizes = {"vocabulary_size": about["vocabulary_size"], "num_places": about["num_places"]}
    return MaskedLanguageModel(config.architecture(**sizes, is_causal=False), config.told_share)


class MaskedLanguageModel(TransformerTask):
    """A token that is to be told is the unit of the loss.

    Which ones they are is drawn from (seed, step, sample) in training, so that every epoch hides
    others and a resumed run, or one on other ranks, the same; in evaluations from the sample alone.
    """

    def __init__(self, architecture: Architecture, told_share: float) -> None:
        super().__init__(architecture)
        self._told_share = told_share

    def prepare(self, batch: Batch) -> Batch:
        return self._hidden({**batch, "targets": batch["tokens"].long()}, (EVALUATION,))

    def augment(self, batch: Batch, seed: int, step: int) -> Batch:
        return self._hidden(batch, (TRAINING, seed, step))

    def _hidden(self, batch: Batch, words: tuple[int, ...]) -> Batch:
        seen_BT, is_told_BT = hidden(
            batch["targets"],
            batch["id"],
            words,
            told_share=self._told_share,
            vocabulary_size=self.architecture.vocabulary_size,
        )
        return {**batch, "seen": seen_BT, "weights": is_told_BT * batch["weight"][:, None]}

    def keywords(self, batch: Batch) -> dict[str, Tensor]:
        return {"is_token_BT": batch["targets"] != PADDING}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        hits_BT = (outputs.argmax(dim=-1) == batch["targets"]) * batch["weights"]
        return {"hits": hits_BT.sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        num_told = max(1.0, sums["weight"])
        return {
            "accuracy": sums["hits"] / num_told,
            "perplexity": perplexity(sums["loss"] / num_told),
        }

    def num_tokens(self, batch: Batch) -> int:
        return int(((batch["targets"] != PADDING) * batch["weight"][:, None]).sum())


def hidden(
    tokens_BT: Tensor,
    ids_B: Tensor,
    words: tuple[int, ...],
    *,
    told_share: float,
    vocabulary_size: int,
) -> tuple[Tensor, Tensor]:
    """What the model sees, and which tokens it has to tell: each with the chance *told_share*, but
    no special ones. A pure function of *words* and, row by row, of ``ids_B``."""
    draws_B2T = uniform(words, ids_B, 2 * tokens_BT.shape[1])
    first_BT, second_BT = draws_B2T.chunk(2, dim=1)
    is_told_BT = (first_BT < told_share) & (tokens_BT >= len(SPECIAL))
    place_BT = first_BT / told_share  # evenly from 0 to 1, of the tokens that are to be told
    any_BT = len(SPECIAL) + (second_BT * (vocabulary_size - len(SPECIAL))).long()
    other_BT = torch.where(place_BT < HIDDEN + RANDOM, any_BT, tokens_BT)
    other_BT = torch.where(place_BT < HIDDEN, MASK, other_BT)
    return torch.where(is_told_BT, other_BT, tokens_BT), is_told_BT
