"""A transformer that says which token comes next.

Shape letters: B samples, T places of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from forebay_trainer.models.transformer import TransformerConfig, TransformerTask, perplexity
from forebay_trainer.task import Batch, Task


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """A transformer's, as they are."""


def build(config: Config, about: Mapping[str, Any]) -> Task:
    """*about*: vocabulary_size and block_length."""
    sizes = {"vocabulary_size": about["vocabulary_size"], "num_places": about["block_length"]}
    return LanguageModel(config.architecture(**sizes, is_causal=True))


class LanguageModel(TransformerTask):
    """Every token but the first of a work is told from those before it."""

    def prepare(self, batch: Batch) -> Batch:
        tokens_BT1 = batch["tokens"].long()
        targets_BT = tokens_BT1[:, 1:]
        # A work's end is followed by -1. No place before it sees that, and no loss counts it.
        weights_BT = (targets_BT >= 0) * batch["weight"][:, None]
        found = {"seen": tokens_BT1[:, :-1].clamp(min=0), "targets": targets_BT.clamp(min=0)}
        return {**batch, **found, "weights": weights_BT}

    def evaluate(self, outputs: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        return {"characters": (batch["num_characters"] * batch["weight"]).sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums["loss"] / max(1.0, sums["weight"])
        return {
            "perplexity": perplexity(loss),
            "bits_per_character": sums["loss"] / math.log(2) / max(1.0, sums["characters"]),
        }

    def num_tokens(self, batch: Batch) -> int:
        return int(batch["weights"].sum())
