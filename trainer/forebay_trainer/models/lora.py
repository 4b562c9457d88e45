"""Adapters of low rank beside frozen layers (Hu et al., 2021, section 4).

A layer computes W x + b + (alpha / r) B A x: W and b stay as they are, A begins at random and B at
zero, so that an adapted model begins as the one that it adapts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from forebay_wire.errors import InvalidRequest


class LowRank(nn.Module):
    """A frozen linear layer with an adapter."""

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        self.factor = alpha / rank
        nn.init.normal_(self.a.weight, std=1 / math.sqrt(base.in_features))
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.factor * self.b(self.a(self.dropout(x)))
        return out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear layer that computes the same, without dropout."""
        whole = copy.deepcopy(self.base)
        whole.weight += self.factor * (self.b.weight @ self.a.weight)
        return whole.requires_grad_(True)


def adapt(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    trained: Iterable[str] = (),
) -> None:
    """Freezes the model, and puts an adapter beside each linear layer whose own name is one of
    *targets* (``query``, say). *trained*: names of modules that are trained as they are.

    InvalidRequest for a target that no linear layer of the model has, naming those that it has.
    """
    linear = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    leaves = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(targets) - leaves):
        raise InvalidRequest(
            f"no linear layer of the model is called {', '.join(unknown)}; "
            f"adapters can stand beside: {', '.join(sorted(leaves))}"
        )
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    for name, layer in linear.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in targets:
            adapted = LowRank(layer, rank=rank, alpha=alpha, dropout=dropout)
            setattr(model.get_submodule(parent), leaf, adapted)


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with every adapter added to its layer: it has the names and the speed of
    the model before `adapt`, and computes what the adapted one computes."""
    whole = copy.deepcopy(model)
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, LowRank):
            parent, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(parent), leaf, layer.merged())
    return whole
