"""A model of which nine tenths are frozen, in a process of its own; see ``children.py``."""

from __future__ import annotations

from typing import Any

import torch
from checkpoint_own import WAIT_SECONDS, settle

import forebay

MIB = 1 << 20
FROZEN_BYTES = 144 * MIB
ADAPTER_BYTES = 8 * MIB
"""Of each of two; AdamW has two moments for them."""


class Adapted(torch.nn.Module):
    """A frozen base with two adapters."""

    def __init__(self) -> None:
        super().__init__()
        rows = 1024
        self.base = torch.nn.ParameterList(
            torch.nn.Parameter(
                torch.randn(rows, FROZEN_BYTES // 6 // 4 // rows), requires_grad=False
            )
            for _ in range(6)
        )
        self.adapters = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(rows, ADAPTER_BYTES // 4 // rows)) for _ in range(2)
        )


class Frozen:
    """Saves it, and what has changed since."""

    def open(self, address: str) -> None:
        """Connect to a daemon."""
        self.model = Adapted()
        self.optimizer = torch.optim.AdamW(self.model.adapters.parameters(), fused=True)
        self.client = forebay.connect(address)
        self.checkpointer = forebay.Checkpointer(
            self.client, "frozen", model=self.model, optimizer=self.optimizer
        )

    def save(self, step: int) -> dict[str, Any]:
        """After a step of the adapters; how many bytes that changed, moments included."""
        for adapter in self.model.adapters:
            adapter.grad = torch.randn_like(adapter)
        self.optimizer.step()
        self.checkpointer.save(step).wait("local", timeout=WAIT_SECONDS)
        settle(self.client)
        return {"changed_bytes": sum(3 * adapter.nbytes for adapter in self.model.adapters)}

    def settle(self) -> None:
        """Return when the daemon's work in the background is done."""
        settle(self.client)

    def close(self) -> None:
        self.checkpointer.close()
        self.client.close()
