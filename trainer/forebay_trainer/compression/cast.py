"""Gradients travel as 16-bit numbers and are added up as 32-bit ones.

torch's ``bf16_compress_hook`` is refused by DDP where there is no NCCL, and both of its hooks have
the backend add up 16-bit numbers: each addition rounds, in fp16 it overflows, and not every backend
can. Here a reduce-scatter and an all-gather are made of collectives that only move bytes: each
rank gets its piece of the gradient from all ranks, adds it up in fp32 and hands the mean back. The
bytes are those of a 16-bit all-reduce; a mean is rounded twice, however many ranks there are.

R rows (one a rank), W numbers in each.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from forebay_trainer.compression.wire import Wire

HALF_TOP: Final = 15
"""A row of fp16 is scaled until its largest magnitude is in [2^14, 2^15): fp16 ends at 65504."""

LEAST_EXPONENT: Final = -100
"""Rows smaller than that are scaled no further: 2^115 is still an fp32."""


def average(values: Tensor, dtype: torch.dtype, wire: Wire) -> None:
    """Replaces (…,) fp32 by the mean over the ranks, the same on all of them."""
    flat = values.view(-1)
    width = -(-flat.numel() // wire.num_ranks)
    rows_RW = F.pad(flat, (0, width * wire.num_ranks - flat.numel())).view(-1, width)
    mine_RW = unpacked(wire.exchange(packed(rows_RW, dtype)), dtype)
    mean_1W = mine_RW.sum(dim=0, keepdim=True).div_(wire.num_ranks)
    means_RW = unpacked(wire.gather(packed(mean_1W, dtype)[0]), dtype)
    flat.copy_(means_RW.reshape(-1)[: flat.numel()])


def packed(rows_RW: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row as bytes. Before a row of fp16 stands the power of two that it was divided by, so
    that neither large nor small gradients leave the range; what is not finite stays so."""
    if dtype is torch.float16:
        top_R1 = rows_RW.abs().amax(dim=1, keepdim=True)
        exponent_R1 = torch.frexp(top_R1).exponent.clamp(min=LEAST_EXPONENT)
        exponent_R1 = torch.where(torch.isfinite(top_R1), exponent_R1, HALF_TOP)
        scaled_RW = torch.ldexp(rows_RW, HALF_TOP - exponent_R1)
        rows_RW = torch.cat([exponent_R1.float(), scaled_RW], dim=1)
    return rows_RW.to(dtype).contiguous().view(torch.uint8)


def unpacked(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `packed`, but for the rounding."""
    numbers = rows.view(dtype).float()
    if dtype is not torch.float16:
        return numbers
    return torch.ldexp(numbers[:, 1:], numbers[:, :1].int() - HALF_TOP)
