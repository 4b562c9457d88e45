"""Averages gradients over the ranks of one group by the method of the run, and keeps its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from forebay_trainer.compression import cast
from forebay_trainer.compression.part import Method, Part
from forebay_trainer.compression.wire import Wire


class Averaging:
    """Called by hooks, in the thread of the backward; the same on all ranks of the group.

    The state is kept by parameter, since DDP lays its buckets out anew after the first step.
    """

    def __init__(
        self, how: Method | torch.dtype, wire: Wire, *, start_step: int, scale: Callable[[], float]
    ) -> None:
        """*how*: a type to send, or a method. Gradients come multiplied by *scale()*, which changes
        from step to step; what is kept is not."""
        self._how = how
        self._wire = wire
        self._start_step = start_step
        self._scale = scale
        self.states: dict[str, dict[str, Tensor]] = {}
        self.rounds: dict[str, int] = {}

    @torch.no_grad()
    def expect(self, name: str, values: Tensor) -> None:
        """Makes the state of a parameter whose gradient looks like *values*."""
        self.rounds[name] = 0
        if not isinstance(self._how, torch.dtype):
            takes = self._how.takes(values)
            self.states[name] = self._how.fresh(name, values) if takes else {}

    @torch.no_grad()
    def average(self, flat: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """*gradients*: the pieces of *flat*, by parameter; empty if unknown."""
        self._wire.expect(flat)
        if isinstance(self._how, torch.dtype):
            cast.average(flat, self._how, self._wire)
        elif not gradients:
            self._wire.average(flat)
        else:
            scale = self._scale()
            flat.div_(scale)
            self._average(self._how, gradients)
            flat.mul_(scale)

    def _average(self, method: Method, gradients: Mapping[str, Tensor]) -> None:
        parts, plain = [], []
        for name, values in gradients.items():
            round = self.rounds[name]
            self.rounds[name] = round + 1
            if round >= self._start_step and method.takes(values):
                parts.append(Part(name, round, values, self.states[name]))
            else:
                plain.append(values)
        method.average(parts, plain, self._wire)


def laid_out(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The pieces of a line by name, as views."""
    pieces = flat.split([shape.numel() for shape in shapes.values()])
    return {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
