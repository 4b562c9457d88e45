"""Dropout whose draws depend on the sample, not on the rank that computes it.

What is dropped is a pure function of (seed, step, number of the layer, row of the sample, place in
it): the same on any number of ranks and micro-batches, and after every resume.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from forebay_wire.errors import InvalidRequest

# The finalizer of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
# OOPSLA 2014), and its increment; as int64, whose products wrap as unsigned ones do.
_FIRST: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND: Final = 0x94D049BB133111EB - (1 << 64)
_GOLDEN: Final = 0x9E3779B97F4A7C15 - (1 << 64)

_DRAW_BITS: Final = 24
"""As many as a float32 holds exactly."""


class Draws:
    """Tells all `SampleDropout` layers of a task which samples they see. The loop sets it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.ids_B: Tensor | None = None

    def at(self, step: int, ids_B: Tensor) -> None:
        self.step, self.ids_B = step, ids_B


class SampleDropout(nn.Module):
    """In place of `torch.nn.Dropout`; its input has a row for each sample."""

    def __init__(self, p: float, number: int, draws: Draws) -> None:
        super().__init__()
        self.p = p
        self._number = number
        self._draws = draws

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        ids_B = self._draws.ids_B
        if ids_B is None or len(ids_B) != len(x):
            rows = 0 if ids_B is None else len(ids_B)
            raise InvalidRequest(
                f"deterministic dropout got {len(x)} rows for {rows} samples: the first dimension "
                "of what is dropped out must be the samples; or set deterministic=false"
            )
        words = (self._draws.seed, self._draws.step, self._number)
        kept = uniform(words, ids_B, x[0].numel()).view(x.shape) >= self.p
        return x * kept / (1.0 - self.p)


def uniform(words: tuple[int, ...], ids_B: Tensor, num_draws: int) -> Tensor:
    """float32 (B, num_draws) in [0, 1): row b is a function of *words* and ``ids_B[b]`` alone."""
    key = torch.zeros(1, dtype=torch.int64, device=ids_B.device)
    for word in words:
        key = _mixed(key + _GOLDEN + word)
    key_B1 = _mixed(key + _GOLDEN + ids_B)[:, None]
    places = torch.arange(1, num_draws + 1, device=ids_B.device)
    bits = _mixed(key_B1 + places * _GOLDEN)
    return _shifted(bits, 64 - _DRAW_BITS).to(torch.float32) / (1 << _DRAW_BITS)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left, which torch's shift of int64 does not do."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def replace_dropout(module: nn.Module, draws: Draws, first_number: int = 0) -> int:
    """Puts a `SampleDropout` in place of every `nn.Dropout`; the number after the last one.

    InvalidRequest, naming it, for a layer that draws in its own way.
    """
    number = first_number
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Dropout:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, SampleDropout(layer.p, number, draws))
            number += 1
        elif _draws_by_itself(layer):
            raise InvalidRequest(
                f"deterministic: {name} ({type(layer).__name__}) draws its dropout in its own way; "
                "give it none, and use torch.nn.Dropout layers"
            )
    return number


def drops(module: nn.Module) -> bool:
    """Whether any `SampleDropout` in it drops anything."""
    layers = (each for each in module.modules() if isinstance(each, SampleDropout))
    return any(each.p > 0 for each in layers)


def _draws_by_itself(layer: nn.Module) -> bool:
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    probability = getattr(layer, "dropout", 0.0)  # of recurrent and attention layers
    return isinstance(probability, (int, float)) and probability > 0
