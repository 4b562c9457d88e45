"""One parameter's gradient on its way to the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forebay_trainer.compression.wire import Wire


@dataclass(frozen=True)
class Part:
    """Of the gradients that travel together. `values` is a view: what is written there counts."""

    name: str
    round: int
    """How often this parameter's gradient has been averaged before."""
    values: Tensor
    state: dict[str, Tensor]

    def keep(self, **state: Tensor) -> None:
        """Takes over a new state, once `values` is the mean. Not if that is not finite: no rank
        applies it then, and the state must not carry it into the steps to come."""
        is_finite = torch.isfinite(self.values).all()
        for name, new in state.items():
            self.state[name].copy_(torch.where(is_finite, new, self.state[name]))


class Method(Protocol):
    """A way of averaging that keeps something from step to step."""

    def takes(self, values: Tensor) -> bool:
        """Whether such a gradient becomes smaller by it."""
        ...

    def fresh(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """The state of a parameter whose gradient looks like *values*, before the first step."""
        ...

    def average(self, parts: Sequence[Part], plain: Sequence[Tensor], wire: Wire) -> None:
        """Replaces all by (nearly) the mean over the ranks, *plain* by the exact one; a collective.
        The means are the same on all ranks."""
        ...
