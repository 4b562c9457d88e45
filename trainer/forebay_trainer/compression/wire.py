"""The ranks that average gradients among them, and a count of the bytes that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

PLAIN_BYTES: Final = 4
"""Of a gradient that is not compressed."""


class Wire:
    """Collectives of one process group. `sent_bytes` is what this rank sends, with each collective
    done in the way that sends the least: of an all-reduce of S bytes over n ranks
    2 (n - 1) / n · S, half as a reduce-scatter and half as an all-gather.

    Used from one thread at a time; every rank has to call the same in the same order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.num_ranks = group.size()
        self.sent_bytes = 0.0
        self.plain_bytes = 0.0
        """What would have been sent if all gradients were added up as they are."""

    def taken(self) -> tuple[float, float]:
        """Both counts, which begin anew."""
        found = self.sent_bytes, self.plain_bytes
        self.sent_bytes = self.plain_bytes = 0.0
        return found

    def expect(self, values: Tensor) -> None:
        """*values* are to be averaged, in whatever way."""
        self.plain_bytes += self._all_reduce_bytes(values)

    def average(self, values: Tensor) -> None:
        """In place."""
        self.sent_bytes += self._all_reduce_bytes(values)
        dist.all_reduce(values, group=self._group)
        values.div_(self.num_ranks)

    def average_all(self, tensors: Sequence[Tensor]) -> None:
        """In place, in one all-reduce."""
        if not tensors:
            return
        flat = torch.cat([each.reshape(-1) for each in tensors])
        self.average(flat)
        for piece, each in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True):
            each.copy_(piece.view_as(each))

    def exchange(self, rows: Tensor) -> Tensor:
        """(ranks, …) with a row for each rank becomes (ranks, …) with a row of each."""
        self.sent_bytes += num_bytes(rows) * (self.num_ranks - 1) / self.num_ranks
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self._group)
        return received

    def gather(self, row: Tensor) -> Tensor:
        """(…) of each rank as (ranks, …)."""
        self.sent_bytes += num_bytes(row) * (self.num_ranks - 1)
        rows = row.new_empty(self.num_ranks, *row.shape)
        dist.all_gather(list(rows.unbind()), row, group=self._group)
        return rows

    def saw_reduce_scatter(self, piece: Tensor) -> None:
        """Somebody else's, of which this rank got *piece*."""
        self.sent_bytes += num_bytes(piece) * (self.num_ranks - 1)
        self.plain_bytes += piece.numel() * PLAIN_BYTES * (self.num_ranks - 1)

    def saw_all_reduce(self, values: Tensor) -> None:
        """Somebody else's."""
        self.sent_bytes += self._all_reduce_bytes(values)
        self.plain_bytes += self._all_reduce_bytes(values) * PLAIN_BYTES / values.element_size()

    def _all_reduce_bytes(self, values: Tensor) -> float:
        return 2 * num_bytes(values) * (self.num_ranks - 1) / self.num_ranks


def num_bytes(values: Tensor) -> int:
    return values.numel() * values.element_size()
