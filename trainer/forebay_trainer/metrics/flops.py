"""Model FLOPs of a step, and the most that a rank could do in a second."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Flops = Callable[[int, int], float]
"""Floating-point operations of forward and backward over (samples, tokens)."""


def of_dense(modules: Mapping[str, nn.Module]) -> Flops:
    """Six operations for each weight and unit: a multiplication and an addition, in the forward,
    for the gradient of the input, and for that of the weight. A unit is a token, or a sample where
    there are none. Frozen weights have no gradient, and a table of embeddings is looked up.

    Right where each weight is used once a unit: not for convolutions, and without the products of
    attention (Kaplan et al., 2020, arXiv:2001.08361, section 2.1).
    """
    num_all = num_trained = 0
    for weight in _multiplied(modules):
        num_all += weight.numel()
        num_trained += weight.numel() * weight.requires_grad
    each = 4 * num_all + 2 * num_trained
    return lambda num_samples, num_tokens: float(each * (num_tokens or num_samples))


def _multiplied(modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """The weights, each once, without embeddings that nothing else uses."""
    parts = [part for module in modules.values() for part in module.modules()]
    return list(
        {
            id(weight): weight
            for part in parts
            if not isinstance(part, nn.Embedding)
            for weight in part.parameters(recurse=False)
        }.values()
    )


def counted(module: nn.Module, *inputs: Tensor) -> Flops:
    """Three times what the forward of one sample multiplies and adds, as torch counts it, without
    computing anything: convolutions, LSTMs, attention and matrices. *inputs*: of one sample
    (B = 1); only their shapes and types matter. Counted when it is first asked for."""
    memo: dict[int, Any] = {}
    for weight in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(weight, device="meta")
        memo[id(weight)] = nn.Parameter(empty) if isinstance(weight, nn.Parameter) else empty
    shape = copy.deepcopy(module, memo).eval()
    each: list[int] = []

    def flops(num_samples: int, num_tokens: int) -> float:
        if not each:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                shape(*(value.to("meta") for value in inputs))
            each.append(counter.get_total_flops())
        return 3.0 * each[0] * num_samples

    return flops


@dataclass(frozen=True)
class Peak:
    """Of one rank."""

    flops_per_second: float
    source: str


# Dense figures of NVIDIA's data sheets. 16-bit types on tensor cores with sums in 32 bits; fp32
# without tensor cores, as torch multiplies matrices unless it is told otherwise.
KNOWN: Final[Mapping[str, Mapping[str, float]]] = {
    r"B200\b": {"bf16": 2250e12, "fp16": 2250e12},
    r"H200$": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    r"H100 .*HBM3$": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    r"H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12},
    r"A100\b": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    r"L40S$": {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12},
    r"L4$": {"bf16": 121e12, "fp16": 121e12, "fp32": 30.3e12},
    r"V100-SXM2": {"fp16": 125e12, "fp32": 15.7e12},
    r"T4$": {"fp16": 65e12, "fp32": 8.1e12},
}


def known(name: str, precision: str) -> Peak | None:
    """The peak of a GPU by its name; None for one that is not in the table, and for a slice."""
    if " MIG " in f"{name} ":
        return None
    for pattern, figures in KNOWN.items():
        if re.search(rf"(^|[\s-]){pattern}", name) and precision in figures:
            return Peak(figures[precision], f"data sheet: {name}, {precision}")
    return None


MATRIX_SIZE: Final = 512
MEASURING_SECONDS: Final = 0.02


def measured(dtype: torch.dtype) -> Peak | None:
    """The best of some products of matrices on the CPU: what this machine reaches now, with as
    many threads as torch has. None for a type that it cannot multiply."""
    ones = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() < start + MEASURING_SECONDS:
        before = time.perf_counter()
        try:
            torch.mm(ones, ones)
        except RuntimeError:
            return None
        best = min(best, time.perf_counter() - before)
    name = str(dtype).removeprefix("torch.")
    source = f"measured: products of {MATRIX_SIZE} x {MATRIX_SIZE} {name}"
    return Peak(2 * MATRIX_SIZE**3 / best, f"{source}, {torch.get_num_threads()} thread(s)")


def peak(device: torch.device, precision: str, stated: float | None) -> Peak | None:
    """*stated* if there is one; of a GPU by the table; of a CPU by a short measurement."""
    if stated is not None:
        return Peak(stated, "stated")
    if device.type == "cuda":
        return known(torch.cuda.get_device_name(device), precision)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return measured(types.get(precision, torch.float32))
