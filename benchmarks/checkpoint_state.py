"""The state that the checkpoints' benchmark saves: a transformer and its AdamW in shared memory.

Every contender is a process of its own that maps the same weights and moments, for there is no
memory for one state each. Needs torch alone, so that it works in the environment of the peers too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

STATE_NAME = "forebay-benchmark-state"
"""As ``checkpoint_memory.py`` looks for it."""

BYTES_PER_PARAMETER = 12
"""A weight and AdamW's two moments, 4 bytes each."""

ALIGNMENT = 64
NUM_TOKENS = 32
"""In a training step."""


@dataclass(frozen=True)
class Shape:
    """Of a decoder-only transformer."""

    width: int
    depth: int
    vocabulary: int


def shape_of(state_bytes: int) -> Shape:
    """The transformer whose weights and moments take about *state_bytes*: within a layer of it."""
    parameters = state_bytes // BYTES_PER_PARAMETER
    width = next(w for w in (2048, 1024, 512, 256, 64) if w <= 256 or 12 * 8 * w * w <= parameters)
    vocabulary = 8 * width
    depth = (parameters - vocabulary * width) // (12 * width * width)
    return Shape(width, max(1, depth), vocabulary)


class Block(torch.nn.Module):
    """Attention and a feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.attention_norm = torch.nn.LayerNorm(width)
        self.attention = torch.nn.Linear(width, 3 * width)
        self.projection = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, width) to the same."""
        parts = self.attention(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(0, 1) for p in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(0, 1).flatten(1))
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Transformer(torch.nn.Module):
    """Predicts the next token; the table of embeddings is its output's, too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = torch.nn.ModuleList(Block(shape.width) for _ in range(shape.depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss over a row of tokens."""
        x = self.embedding(tokens[:-1])
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(functional.linear(x, self.embedding.weight), tokens[1:])


def transformer_of(state_bytes: int) -> Transformer:
    """Without memory of its own."""
    with torch.device("meta"):
        return Transformer(shape_of(state_bytes))


def padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class SharedState:
    """The memory of weights and moments. The process that made it keeps it for all."""

    def __init__(self, model: torch.nn.Module, path: Path | None = None) -> None:
        """A new one for a model on the device ``meta``, or the one that another process has at
        *path*."""
        self.model = model
        sizes = [padded(4 * parameter.numel()) for parameter in self.model.parameters()]
        self.num_bytes = 3 * sum(sizes)
        self._made = path is None
        if path is None:
            self.fd = os.memfd_create(STATE_NAME)
            os.ftruncate(self.fd, self.num_bytes)
        else:
            self.fd = os.open(path, os.O_RDWR)
        self.map = mmap.mmap(self.fd, self.num_bytes)

    @property
    def path(self) -> Path:
        """Where other processes find it while this one lives."""
        return Path(f"/proc/{os.getpid()}/fd/{self.fd}")

    def fill(self) -> None:
        """Values like those of a training."""
        third = self.num_bytes // 3
        weights, averages, squares = (
            torch.frombuffer(self.map, dtype=torch.float32, offset=start, count=third // 4)
            for start in (0, third, 2 * third)
        )
        weights.normal_(0, 0.02)
        averages.normal_(0, 1e-3)
        squares.uniform_(1e-9, 1e-6)

    def tensors(self) -> Iterator[tuple[torch.Size, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Shape, weight and two moments of each parameter."""
        third, offset = self.num_bytes // 3, 0
        for parameter in self.model.parameters():
            count = parameter.numel()
            views = [
                torch.frombuffer(self.map, dtype=torch.float32, offset=start + offset, count=count)
                for start in (0, third, 2 * third)
            ]
            yield (parameter.shape, *(view.view(parameter.shape) for view in views))
            offset += padded(4 * count)


class Training:
    """A model and its optimizer, whose tensors are those of a shared state (on a GPU: copies)."""

    def __init__(self, state: SharedState, device: str) -> None:
        self.model, self.device = state.model, torch.device(device)
        found = list(state.tensors())
        weights = iter(
            [torch.nn.Parameter(weight.to(self.device, copy=False)) for _, weight, _, _ in found]
        )
        for module in self.model.modules():
            for name in module._parameters:
                module._parameters[name] = next(weights)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        for parameter, (_, _, average, square) in zip(self.model.parameters(), found, strict=True):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(1.0, device=self.device),
                "exp_avg": average.to(self.device),
                "exp_avg_sq": square.to(self.device),
            }

    def tensors(self) -> list[torch.Tensor]:
        """Everything large that is saved."""
        moments = [self.optimizer.state[one] for one in self.model.parameters()]
        found = [one.detach() for one in self.model.parameters()]
        for name in ("exp_avg", "exp_avg_sq"):
            found += [one[name] for one in moments]
        return found

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def state_dict(self) -> dict[str, object]:
        """As peers are given it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def change(self) -> None:
        """Other bytes everywhere, as a step makes them, in less time."""
        torch._foreach_mul_(self.tensors(), 1.001)
        self.synchronize()

    def clear(self) -> None:
        torch._foreach_zero_(self.tensors())
        self.synchronize()

    def total(self) -> int:
        """Changes with any bit."""
        sums = [tensor.view(torch.int64).sum() for tensor in self.tensors()]
        return sum((place + 1) * int(one) for place, one in enumerate(sums)) % (1 << 62)

    def step(self, before_change: Callable[[], None] = lambda: None) -> None:
        """One training step; *before_change* is called when gradients are there."""
        vocabulary = self.model.get_parameter("embedding.weight").shape[0]
        tokens = torch.randint(0, vocabulary, (NUM_TOKENS + 1,), device=self.device)
        self.model(tokens).backward()
        before_change()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def keep_freed_memory() -> None:
    """Have malloc keep what was freed, as a trainer does: else each step faults its pages anew."""
    libc = ctypes.CDLL(None)
    for option, value in ((-3, 1 << 30), (-1, 1 << 31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(option, min(value, 2**31 - 1))
