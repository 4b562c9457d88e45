"""What the keys ``parallel.compression`` say, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from forebay_trainer.compression.part import Method
from forebay_trainer.compression.powersgd import PowerSGD
from forebay_trainer.compression.topk import TopK
from forebay_trainer.config import setting
from forebay_wire.errors import InvalidRequest

TYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    method: Literal["none", "bf16", "fp16", "powersgd", "topk"] = setting(
        "none", "how gradients travel: 16-bit numbers, matrices of low rank, or the largest entries"
    )
    rank: int = setting(2, "of powersgd: the more, the nearer to the gradient, and the more bytes")
    share: float = setting(0.01, "of topk: entries of each parameter that are sent")
    start_step: int = setting(0, "of powersgd and topk: steps before are not compressed")
    error_feedback: bool = setting(
        True, "of powersgd and topk: what was left out is added to the next gradient"
    )
    warm_start: bool = setting(True, "of powersgd: begin with the matrix of the step before")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidRequest(f"rank must be at least 1, not {self.rank}")
        if not 0 < self.share <= 1:
            raise InvalidRequest(f"share must be above 0 and at most 1, not {self.share}")
        if self.start_step < 0:
            raise InvalidRequest(f"start_step must be at least 0, not {self.start_step}")

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that gradients are sent in, if that is the method."""
        return TYPES.get(self.method)

    @property
    def has_state(self) -> bool:
        """Whether steps leave something for later ones; such a method works between replicas."""
        return self.method in ("powersgd", "topk")

    def build(self, seed: int) -> Method | torch.dtype:
        if self.dtype is not None:
            return self.dtype
        if self.method == "topk":
            return TopK(share=self.share, feeds_back=self.error_feedback)
        return PowerSGD(
            rank=self.rank, feeds_back=self.error_feedback, is_warm=self.warm_start, seed=seed
        )

    def check(self, *, stages: int, replicas: int, shards: int, tensor: int) -> None:
        """InvalidRequest for a mesh on which gradients are not compressed so."""
        if self.method == "none":
            return
        for key, kind, number in (
            ("num_tensor", "tensor parallelism", tensor),
            ("num_stages", "a pipeline", stages),
        ):
            if number > 1:
                raise InvalidRequest(
                    f"parallel.compression.method={self.method}: gradients of {kind} are not "
                    f"compressed; set it to none, or parallel.{key}=1"
                )
        if self.has_state and shards > 1 and replicas == 1:
            raise InvalidRequest(
                f"parallel.compression.method={self.method}: it works between replicas, and FSDP2 "
                "has none here; give parallel.num_replicas=2 or more (HSDP), or use method=bf16"
            )
