"""A small transformer: a causal decoder, as GPT, or an encoder that ignores padding, as BERT.

Shape letters: B samples, T places of tokens, W width, H heads of this rank, D width of a head,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.nn import functional as F
from torch.optim import Optimizer

from forebay_trainer.config import setting
from forebay_trainer.metrics.flops import Flops
from forebay_trainer.optim import OptimizerConfig
from forebay_trainer.task import Batch, Task, keep_only, layers_of_stage
from forebay_wire.errors import InvalidRequest

ROTARY_BASE: Final = 10_000.0

MAX_LOSS: Final = 700.0
"""Nats; what is more has no perplexity that is a float."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What makes a transformer. InvalidRequest, naming the field, for what does not fit."""

    vocabulary_size: int
    num_places: int
    """The most tokens that a sample has."""
    num_layers: int
    num_heads: int
    width: int
    dropout: float
    """Share dropped of the embeddings and of what each half of a block adds."""
    is_causal: bool
    """Whether a place sees itself and those before it alone."""
    positions: Literal["learned", "rotary"]
    ties_embedding: bool
    """Whether the last layer has the weights of the first."""

    def __post_init__(self) -> None:
        for name in ("vocabulary_size", "num_places", "num_layers", "num_heads", "width"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise InvalidRequest(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.width % self.num_heads:
            raise InvalidRequest(
                f"num_heads={self.num_heads} does not divide width={self.width}: "
                f"try width={self.num_heads * max(1, self.width // self.num_heads)}"
            )
        if self.positions == "rotary" and self.width // self.num_heads % 2:
            raise InvalidRequest(
                f"positions=rotary turns pairs of numbers, and a head of {self.num_heads} in "
                f"width={self.width} has {self.width // self.num_heads}: take an even number"
            )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What recipes let a user set; the data say the rest."""

    num_layers: int = setting(4, "blocks of attention and a small network")
    num_heads: int = setting(4, "of each attention")
    width: int = setting(128, "of what the blocks add to")
    dropout: float = setting(0.0, "share dropped of embeddings and of what blocks add")
    positions: Literal["learned", "rotary"] = setting("rotary", "how a place is known")
    ties_embedding: bool = setting(False, "the last layer has the weights of the first")

    def architecture(
        self, *, vocabulary_size: int, num_places: int, is_causal: bool
    ) -> Architecture:
        return Architecture(
            vocabulary_size=vocabulary_size,
            num_places=num_places,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            width=self.width,
            dropout=self.dropout,
            is_causal=is_causal,
            positions=self.positions,
            ties_embedding=self.ties_embedding,
        )


def perplexity(loss: float) -> float:
    """Of a mean loss in nats."""
    return math.exp(min(loss, MAX_LOSS))


class Transformer(nn.Module):
    """Blocks that normalise first (Xiong et al. 2020, "On Layer Normalization in the Transformer
    Architecture"), between an embedding and a linear layer."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        width = architecture.width
        self.embedding = Embedding(architecture)
        blocks = [Block(architecture) for _ in range(architecture.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, architecture.vocabulary_size, bias=False)
        # At the widths of GPT-2 near its 0.02; a narrow network with 0.02 learns more slowly: at
        # width 128, after 300 steps, 2.07 nats a character instead of 1.95.
        deviation = (2 * width) ** -0.5
        self.apply(lambda module: _draw_weights(module, deviation))
        # What is added to the residual stream has a deviation that does not grow with the depth
        # (Radford et al. 2019, section 2.3).
        for block in blocks:
            for added in (block.attention.o, block.mlp.down):
                nn.init.normal_(added.weight, std=deviation / (2 * len(blocks)) ** 0.5)
        if architecture.ties_embedding:
            self.head.weight = self.embedding.tokens.weight

    def forward(self, x: Tensor, is_token_BT: Tensor | None = None) -> Tensor:
        """The logits (B, T, V) of tokens (B, T).

        *is_token_BT*: False for padding, which no place sees; None: there is none. As a stage of a
        pipeline it takes what the stage before answered, and answers (B, T, W) unless it is last.
        """
        x_BTW = self.embedding(x)
        mask_B11T = None if is_token_BT is None else _mask(is_token_BT)
        rotation_2TD = None
        if self.architecture.positions == "rotary":
            width_of_head = self.architecture.width // self.architecture.num_heads
            rotation_2TD = rotation(x.shape[1], width_of_head, x.device)
        for block in self.blocks:
            if not isinstance(block, nn.Identity):  # which stands for a block of another stage
                x_BTW = block(x_BTW, mask_B11T, rotation_2TD)
        return self.head(self.norm(x_BTW))


class Embedding(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.tokens = nn.Embedding(architecture.vocabulary_size, architecture.width)
        self.places: nn.Embedding | None = None
        if architecture.positions == "learned":
            self.places = nn.Embedding(architecture.num_places, architecture.width)
        self.dropout = nn.Dropout(architecture.dropout)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTW = self.tokens(tokens_BT)
        if self.places is not None:
            x_BTW = x_BTW + self.places(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        return self.dropout(x_BTW)


class Block(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(architecture.width)
        self.attention = Attention(architecture)
        self.mlp_norm = nn.LayerNorm(architecture.width)
        self.mlp = Mlp(architecture.width)
        # Of the sums, not of the weights of attention: those lie on several ranks under tensor
        # parallelism, each of which would drop out in its own way.
        self.attention_dropout = nn.Dropout(architecture.dropout)
        self.mlp_dropout = nn.Dropout(architecture.dropout)

    def forward(
        self, x_BTW: Tensor, mask_B11T: Tensor | None, rotation_2TD: Tensor | None
    ) -> Tensor:
        seen_BTW = self.attention(self.attention_norm(x_BTW), mask_B11T, rotation_2TD)
        x_BTW = x_BTW + self.attention_dropout(seen_BTW)
        return x_BTW + self.mlp_dropout(self.mlp(self.mlp_norm(x_BTW)))


class Attention(nn.Module):
    """Of several heads (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.width
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self._width_of_head = width // architecture.num_heads
        self._is_causal = architecture.is_causal

    def forward(
        self, x_BTW: Tensor, mask_B11T: Tensor | None, rotation_2TD: Tensor | None
    ) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = (
            layer(x_BTW).unflatten(-1, (-1, self._width_of_head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if rotation_2TD is not None:
            q_BHTD, k_BHTD = rotated(q_BHTD, rotation_2TD), rotated(k_BHTD, rotation_2TD)
        if mask_B11T is not None and self._is_causal:
            raise InvalidRequest("a causal transformer takes no padding mask: pad at the end")
        seen_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask_B11T, is_causal=self._is_causal
        )
        return self.o(seen_BHTD.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTW)))


def rotation(num_places: int, width: int, device: torch.device) -> Tensor:
    """Cosines and sines (2, T, D) of the angles by which `rotated` turns."""
    half = torch.arange(0, width, 2, device=device) / width
    angles_TD = torch.arange(num_places, device=device)[:, None] * (ROTARY_BASE**-half).repeat(2)
    return torch.stack((angles_TD.cos(), angles_TD.sin()))


def rotated(x_BHTD: Tensor, rotation_2TD: Tensor) -> Tensor:
    """Pairs of numbers turned by angles that grow with the place, so that products of queries and
    keys know how far apart they are (Su et al. 2021, RoFormer, section 3.4.2)."""
    first, second = x_BHTD.chunk(2, dim=-1)
    cosines_TD, sines_TD = rotation_2TD
    turned = x_BHTD * cosines_TD + torch.cat((-second, first), dim=-1) * sines_TD
    return turned.to(x_BHTD.dtype)


def _mask(is_token_BT: Tensor) -> Tensor:
    """The mask of attention. The first place is always seen: a row of nothing but padding would
    else be a mean over nothing, for which not every kernel of torch promises a number, and spoil a
    loss in which it weighs nothing."""
    is_first_T = torch.arange(is_token_BT.shape[1], device=is_token_BT.device) == 0
    return (is_token_BT | is_first_T)[:, None, None, :]


def _draw_weights(module: nn.Module, deviation: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=deviation)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# How it is cut.


class HeadsParallel(ColwiseParallel):
    """Cuts a projection between heads; InvalidRequest where they cannot be shared out evenly."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self._num_heads % device_mesh.size():
            raise InvalidRequest(
                f"parallel.num_tensor={device_mesh.size()} does not divide "
                f"model.num_heads={self._num_heads}: change one of them"
            )
        return super()._apply(module, device_mesh)


def tensor_plan(architecture: Architecture) -> Mapping[str, ParallelStyle]:
    """Each half of a block is cut across and then along, so that its ranks add up once (Shoeybi et
    al. 2019, Megatron-LM, section 3)."""
    heads = {f"blocks.*.attention.{name}": HeadsParallel(architecture.num_heads) for name in "qkv"}
    return {
        **heads,
        "blocks.*.attention.o": RowwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
    }


def stage_of(model: nn.Module, stage: int, num_stages: int) -> nn.Module:
    """The part of a `Transformer` that is one stage of a pipeline."""
    assert isinstance(model, Transformer)
    architecture = model.architecture
    if architecture.ties_embedding:
        raise InvalidRequest(
            "parallel.num_stages: the first and the last stage would share one tensor; set "
            "model.ties_embedding=false"
        )
    if num_stages > architecture.num_layers:
        raise InvalidRequest(
            f"parallel.num_stages={num_stages} is more than model.num_layers="
            f"{architecture.num_layers}: change one of them"
        )
    layers = layers_of_stage(architecture.num_layers, stage, num_stages)
    ends = ["embedding"] * (stage == 0) + ["norm", "head"] * (stage == num_stages - 1)
    return keep_only(model, [*ends, *(f"blocks.{layer}" for layer in layers)])


def flops(architecture: Architecture) -> Flops:
    """Of forward and backward, as Chowdhery et al. 2022 (PaLM, appendix B) count them: six for each
    weight and token, and twelve for each layer, number of the width and pair of places. Embeddings
    are looked up; a causal model is counted as if it saw all places."""
    layers, width = architecture.num_layers, architecture.width
    num_weights = 12 * layers * width**2 + architecture.vocabulary_size * width
    each_token = 6 * num_weights + 12 * layers * width * architecture.num_places
    return lambda num_samples, num_tokens: float(each_token * architecture.num_places * num_samples)


class TransformerTask(Task):
    """Cross entropy, in nats, of the token at each place. A subclass's `prepare` makes ``seen`` and
    ``targets``, int64 (B, T), and ``weights``, float32 (B, T): 0 where a place is not to be told.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(Transformer(architecture))
        self.architecture = architecture

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (batch["seen"],)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), batch["targets"], reduction="none")

    def weights(self, batch: Batch) -> Tensor:
        weights_BT: Tensor = batch["weights"]
        return weights_BT

    def optimizers(
        self, modules: Mapping[str, nn.Module], config: OptimizerConfig
    ) -> dict[str, Optimizer]:
        """Biases and norms do not decay."""
        (model,) = modules.values()
        weights = list(model.parameters())
        matrices = {"params": [each for each in weights if each.dim() > 1]}
        vectors = {"params": [each for each in weights if each.dim() == 1], "weight_decay": 0.0}
        return {"model": config.build([each for each in (matrices, vectors) if each["params"]])}

    def flops(self) -> Flops:
        return flops(self.architecture)

    def tensor_plan(self, model: nn.Module) -> Mapping[str, ParallelStyle]:
        return tensor_plan(self.architecture)

    def split(self, model: nn.Module, stage: int, num_stages: int) -> nn.Module:
        return stage_of(model, stage, num_stages)
