"""Gradients travel as matrices of low rank: PowerSGD (Vogels, Karimireddy, Jaggi, 2019, arXiv
1905.13727), with error feedback.

A gradient (N, M) of each rank is sent as P Qᵀ with P (N, R), the same on all ranks, and Q (M, R):
two small all-reduces, of P and of Q. What a rank's own P Qᵀ leaves of its gradient is added to its
next one. That can grow where ranks keep differing from one another; its mean over the ranks, which
is all that counts, does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from forebay_trainer.compression.part import Part
from forebay_trainer.compression.wire import Wire

WORTH: Final = 2
"""A gradient is compressed only if it then takes this many times less."""


class PowerSGD:
    """Holds no state of its own: each part brings its error and its last Q."""

    def __init__(self, *, rank: int, feeds_back: bool, is_warm: bool, seed: int) -> None:
        self._rank = rank
        self._feeds_back = feeds_back
        self._is_warm = is_warm
        self._seed = seed

    def takes(self, values: Tensor) -> bool:
        if values.dim() < 2:
            return False
        num_rows, num_columns = matrix(values).shape
        smaller = self._rank_of(values) * (num_rows + num_columns)
        return smaller * WORTH <= values.numel()

    def fresh(self, name: str, values: Tensor) -> dict[str, Tensor]:
        state = {}
        if self._feeds_back:
            state["error"] = torch.zeros_like(matrix(values))
        if self._is_warm:
            state["q"] = self._random(name, 0, values)
        return state

    def average(self, parts: Sequence[Part], plain: Sequence[Tensor], wire: Wire) -> None:
        matrices = [matrix(part.values) for part in parts]
        qs = [
            part.state["q"] if self._is_warm else self._random(part.name, part.round, each)
            for part, each in zip(parts, matrices, strict=True)
        ]
        if self._feeds_back:
            for part, each in zip(parts, matrices, strict=True):
                each.add_(part.state["error"])
        ps = [each @ q for each, q in zip(matrices, qs, strict=True)]
        wire.average_all([*ps, *plain])
        ps = [torch.linalg.qr(p).Q for p in ps]
        own_qs = [each.T @ p for each, p in zip(matrices, ps, strict=True)]
        mean_qs = [each.clone() for each in own_qs]
        wire.average_all(mean_qs)
        for part, each, p, own_q, q in zip(parts, matrices, ps, own_qs, mean_qs, strict=True):
            left = each.addmm(p, own_q.T, alpha=-1)
            each.copy_(p @ q.T)
            if self._feeds_back:
                part.keep(error=left)
            if self._is_warm:
                part.keep(q=q)

    def _rank_of(self, values: Tensor) -> int:
        return min(self._rank, *matrix(values).shape)

    def _random(self, name: str, number: int, values: Tensor) -> Tensor:
        """The first Q of a part in a round: the same on all ranks, and after a resume."""
        text = repr((self._seed, name, number)).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        shape = (matrix(values).shape[1], self._rank_of(values))
        return torch.randn(shape, generator=generator).to(values.device)


def matrix(values: Tensor) -> Tensor:
    return values.view(values.shape[0], -1)
