"""The encoder of BERT (Devlin et al., 2019, section 3), and a head that classifies its tokens.

Numbers are those of the published weights: norms after the residual sums, the exact GELU, learnt
positions. Attention weights are not dropped out, for they are computed by torch's fused kernels.

Shape letters: B sentences, T tokens, D width, H heads, F width of the feed-forward layer, K
classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebay_wire.errors import InvalidRequest

NORM_EPSILON: Final = 1e-12
FIRST_DEVIATION: Final = 0.02
"""Standard deviation of weights that begin at random."""

UNKNOWN_TOKEN: Final = 100
"""``[UNK]`` in the vocabularies of the published models."""


@dataclass(frozen=True, kw_only=True)
class BertShape:
    """Sizes of the encoder; the defaults are those of MiniLM-L6-H384."""

    vocabulary_size: int = 30522
    width: int = 384
    num_layers: int = 6
    num_heads: int = 12
    feed_forward_width: int = 1536
    num_positions: int = 512
    num_kinds: int = 2
    """Kinds of sentences: all tokens here are of the first one."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise InvalidRequest(
                f"width must be a multiple of num_heads, and {self.width} is none of "
                f"{self.num_heads}; change one of them"
            )


class Embeddings(nn.Module):
    """Tokens as vectors. Tokens from V on are looked up in a table of their own, so that the
    table of the published vocabulary can stay as it is."""

    def __init__(self, shape: BertShape, num_added: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary_size, shape.width)
        self.positions = nn.Embedding(shape.num_positions, shape.width)
        self.kinds = nn.Embedding(shape.num_kinds, shape.width)
        self.added = nn.Embedding(num_added, shape.width) if num_added else None
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        num_words = self.words.num_embeddings
        x_BTD = self.words(tokens_BT.clamp(max=num_words - 1))
        if self.added is not None:
            added_BTD = self.added((tokens_BT - num_words).clamp(min=0))
            x_BTD = torch.where((tokens_BT >= num_words)[..., None], added_BTD, x_BTD)
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = x_BTD + self.positions(places_T) + self.kinds(torch.zeros_like(places_T))
        out_BTD: Tensor = self.dropout(self.norm(x_BTD))
        return out_BTD


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what it got and normalised after."""

    def __init__(self, shape: BertShape, dropout: float) -> None:
        super().__init__()
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.attention_norm = nn.LayerNorm(shape.width, eps=NORM_EPSILON)
        self.up = nn.Linear(shape.width, shape.feed_forward_width)
        self.down = nn.Linear(shape.feed_forward_width, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)
        self._head_width = shape.width // shape.num_heads

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor) -> Tensor:
        attended_BTD = F.scaled_dot_product_attention(
            self._heads(self.query(x_BTD)),
            self._heads(self.key(x_BTD)),
            self._heads(self.value(x_BTD)),
            attn_mask=mask_B11T,
        )
        summed_BTD = self.out(attended_BTD.transpose(1, 2).flatten(2))
        x_BTD = self.attention_norm(x_BTD + self.dropout(summed_BTD))
        fed_BTD = self.down(F.gelu(self.up(x_BTD)))
        out_BTD: Tensor = self.norm(x_BTD + self.dropout(fed_BTD))
        return out_BTD

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """As (B, H, T, D/H): of a tensor group each rank has its own heads."""
        return x_BTD.unflatten(2, (-1, self._head_width)).transpose(1, 2)


class Bert(nn.Module):
    """Tokens to vectors that know their sentence."""

    def __init__(self, shape: BertShape, *, num_added: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape, num_added, dropout)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.num_layers))
        self.apply(_begin_at_random)

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """*lengths_B*: tokens of each sentence, padding left out. Returns (B, T, D).

        InvalidRequest for sentences that have more tokens than the model knows positions.
        """
        num_tokens, limit = tokens_BT.shape[1], self.shape.num_positions
        if num_tokens > limit:
            raise InvalidRequest(
                f"a sentence has {num_tokens} tokens, and the model takes {limit} at most: prepare "
                "the data with shorter ones"
            )
        places_T = torch.arange(num_tokens, device=tokens_BT.device)
        # A row without tokens, which weighs nothing, sees its padding: a softmax of nothing is NaN.
        mask_BT = places_T < lengths_B.clamp(min=1)[:, None]
        x_BTD: Tensor = self.embeddings(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_BT[:, None, None, :])
        return x_BTD

    def load(self, published: Mapping[str, Tensor]) -> None:
        """Takes weights by the names of the published models; what was added to the vocabulary
        begins as the unknown token. InvalidRequest for weights that are missing, left over or of
        another shape."""
        found = {ours(name): weight for name, weight in published.items()}
        wanted = dict(self.named_parameters())
        wanted.pop("embeddings.added.weight", None)
        given = {name: weight for name, weight in found.items() if name is not None}
        differing = wanted.keys() ^ given.keys()
        differing |= {
            name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape
        }
        if differing:
            raise InvalidRequest(
                f"the weights are not those of a BERT of this shape ({self.shape}): missing, left "
                f"over or of another shape are {', '.join(sorted(differing)[:5])}"
            )
        with torch.no_grad():
            for name, weight in wanted.items():
                weight.copy_(given[name])
            if self.embeddings.added is not None:
                self.embeddings.added.weight.copy_(self.embeddings.words.weight[UNKNOWN_TOKEN])


class TokenClassifier(nn.Module):
    """An encoder, and a linear layer on each of its vectors."""

    def __init__(self, encoder: Bert, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.shape.width, num_classes)
        self.head.apply(_begin_at_random)

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """The logits (B, T, K)."""
        logits_BTK: Tensor = self.head(self.dropout(self.encoder(tokens_BT, lengths_B)))
        return logits_BTK


def _begin_at_random(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=FIRST_DEVIATION)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


_OUTER: Final = {
    "embeddings.word_embeddings": "embeddings.words",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.kinds",
    "embeddings.LayerNorm": "embeddings.norm",
}
_INNER: Final = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}
_LAYER: Final = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


def ours(published: str) -> str | None:
    """The name here of a published weight; None for what the encoder does without: the pooled
    first token, heads, and buffers."""
    part, _, kind = published.removeprefix("bert.").rpartition(".")
    if part in _OUTER:
        return f"{_OUTER[part]}.{kind}"
    if (layer := _LAYER.fullmatch(part)) and layer[2] in _INNER:
        return f"blocks.{layer[1]}.{_INNER[layer[2]]}.{kind}"
    return None
