"""Of each gradient only the largest entries travel, with error feedback: what was left out is added
to the next gradient (Stich, Cordonnier, Jaggi, 2018, arXiv 1809.07599)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from forebay_trainer.compression.part import Part
from forebay_trainer.compression.wire import Wire


class TopK:
    """Each rank sends a share of the entries of each parameter, as values and places; the mean is
    the exact one of what was sent."""

    def __init__(self, *, share: float, feeds_back: bool) -> None:
        self._share = share
        self._feeds_back = feeds_back

    def takes(self, values: Tensor) -> bool:
        return values.numel() > 0

    def fresh(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return {"error": torch.zeros_like(values)} if self._feeds_back else {}

    def average(self, parts: Sequence[Part], plain: Sequence[Tensor], wire: Wire) -> None:
        wire.average_all(plain)
        if not parts:
            return
        if self._feeds_back:
            for part in parts:
                part.values.add_(part.state["error"])
        sizes = [part.values.numel() for part in parts]
        flat = torch.cat([part.values.reshape(-1) for part in parts])
        places = self._largest(flat, sizes)
        mean = summed(wire.gather(message(flat[places], places)), flat).div_(wire.num_ranks)
        flat[places] = 0
        pairs = zip(mean.split(sizes), flat.split(sizes), strict=True)
        for part, (found, left) in zip(parts, pairs, strict=True):
            part.values.copy_(found.view_as(part.values))
            if self._feeds_back:
                part.keep(error=left.view_as(part.values))

    def _largest(self, flat: Tensor, sizes: Sequence[int]) -> Tensor:
        """Places in *flat* of the largest magnitudes of each of its pieces."""
        found, start = [], 0
        for size in sizes:
            number = max(1, math.ceil(self._share * size))
            piece = flat[start : start + size].abs()
            found.append(piece.topk(number, sorted=False).indices + start)
            start += size
        return torch.cat(found)


def message(values: Tensor, places: Tensor) -> Tensor:
    """Values and places in one line of 32-bit words."""
    return torch.cat([values.view(torch.int32), places.int()])


def summed(messages: Tensor, like: Tensor) -> Tensor:
    """The sum of what all ranks sent, always in the order of ranks."""
    total = torch.zeros_like(like)
    for words in messages:
        values, places = words.chunk(2)
        total[places.long()] += values.view(torch.float32)
    return total
