"""The type that forward and backward compute in, and the scale of an fp16 loss."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

TYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}

FIRST_SCALE: Final = 2.0**16
GROWTH_STEPS: Final = 2000
"""After so many good steps the scale doubles; a step whose gradients overflow halves it."""


class Precision:
    """Weights and optimizer states are always fp32."""

    def __init__(self, name: Literal["fp32", "bf16", "fp16"], device: torch.device) -> None:
        self.dtype = TYPES.get(name)
        self._device = device

    def autocast(self) -> AbstractContextManager[Any]:
        """Forward and loss run inside; backward outside."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)

    def policy(self, reduce_dtype: torch.dtype | None = None) -> MixedPrecisionPolicy:
        """What FSDP2 gathers and computes in, and adds gradients up in; None: fp32."""
        return MixedPrecisionPolicy(
            param_dtype=self.dtype, reduce_dtype=reduce_dtype or torch.float32
        )


class LossScaler:
    """Keeps small fp16 gradients from becoming 0: the loss is multiplied, the gradients divided.

    torch's own looks for overflows on each rank alone; this one goes by the norm of the gradients,
    which is the same on all ranks of any mesh, so that all of them skip the same steps.
    """

    def __init__(self, *, is_used: bool) -> None:
        self.scale = FIRST_SCALE if is_used else 1.0
        self.is_used = is_used
        self._good_steps = 0

    def accepts(self, norm: float) -> bool:
        """Whether gradients of this norm may be applied; called once for each update."""
        if not self.is_used:
            return True
        if not math.isfinite(norm):
            self.scale, self._good_steps = self.scale / 2, 0
            return False
        self._good_steps += 1
        if self._good_steps == GROWTH_STEPS:
            self.scale, self._good_steps = self.scale * 2, 0
        return True

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.is_used:
            self.scale, self._good_steps = state["scale"], int(state["good_steps"])
