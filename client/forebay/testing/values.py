"""The simplest thing that a Checkpointer saves."""

from __future__ import annotations

from typing import Any


class Values:
    """A stateful that says whatever it was given last."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state
