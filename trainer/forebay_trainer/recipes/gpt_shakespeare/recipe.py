"""A transformer that says which token comes next.

Shape letters: B samples, T places of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import Tensor

from forebay_trainer.config import setting
from forebay_trainer.models.transformer import Architecture, TransformerTask
from forebay_trainer.task import Batch, Task

MAX_LOSS: Final = 700.0
"""Nats; what is more has no perplexity that is a float."""


@dataclass(frozen=True, kw_only=True)
class Config:
    num_layers: int = setting(4, "blocks of attention and a small network")
    num_heads: int = setting(4, "of each attention")
    width: int = setting(128, "of what the blocks add to")
    dropout: float = setting(0.0, "share dropped of embeddings and of what blocks add")
    positions: Literal["learned", "rotary"] = setting("rotary", "how a place is known")
    ties_embedding: bool = setting(False, "the last layer has the weights of the first")


def build(config: Config, about: Mapping[str, Any]) -> Task:
    """*about*: vocabulary_size and block_length."""
    return LanguageModel(
        Architecture(
            vocabulary_size=about["vocabulary_size"],
            num_places=about["block_length"],
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            width=config.width,
            dropout=config.dropout,
            is_causal=True,
            positions=config.positions,
            ties_embedding=config.ties_embedding,
        )
    )


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
            "perplexity": math.exp(min(loss, MAX_LOSS)),
            "bits_per_character": sums["loss"] / math.log(2) / max(1.0, sums["characters"]),
        }

    def num_tokens(self, batch: Batch) -> int:
        return int(batch["weights"].sum())
