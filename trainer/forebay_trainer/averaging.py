"""A running average of the weights (EMA), which is often better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    decay: float | None = setting(
        None, "share of the average that an optimizer step keeps, as 0.999; none: no average"
    )

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise InvalidRequest(f"decay must be between 0 and 1, not {self.decay}")


class Average:
    """Of all trained weights, laid out over the ranks as they are.

    Early on it follows the weights more closely, by (1 + n) / (10 + n) after n steps, so that it
    forgets the first ones.
    """

    def __init__(self, decay: float, weights: Mapping[str, nn.Parameter]) -> None:
        self._decay = decay
        self._weights = weights
        self._average = {name: weight.detach().clone() for name, weight in weights.items()}
        self._num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        self._num_updates += 1
        for name, weight in self._weights.items():
            self._average[name].mul_(decay).add_(weight, alpha=1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The modules compute with the average inside, and have their own weights afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            own = weight.detach().clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(own)

    def state_dict(self) -> dict[str, object]:
        return {"num_updates": self._num_updates, "weights": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        weights = state["weights"]
        assert isinstance(weights, Mapping)
        for name, value in weights.items():
            assert isinstance(value, Tensor)
            self._average[name].copy_(value)
        self._num_updates = int(str(state["num_updates"]))


class NoAverage(Average):
    """Where none is kept."""

    def __init__(self) -> None:
        super().__init__(0.5, {})

    def update(self) -> None:
        pass
