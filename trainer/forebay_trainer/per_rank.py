"""A tensor that every rank has its own of, as one row of a tensor that all ranks share.

So it can be part of a checkpoint, where everything else is the same on all ranks: each rank saves
and restores its row, without a collective.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def to_rows(mine: Tensor, ranks: DeviceMesh | None) -> Tensor:
    """(…) of this rank as its row of (ranks, …). *ranks*: all of them in one line; None: one."""
    row = mine.detach().unsqueeze(0)
    if ranks is None:
        return row
    return DTensor.from_local(row, ranks, [Shard(0)], run_check=False)


def from_rows(rows: Tensor, ranks: DeviceMesh | None) -> Tensor | None:
    """This rank's row, or None if another number of ranks saved them."""
    num_ranks = 1 if ranks is None else ranks.size()
    if rows.shape[0] != num_ranks:
        return None
    if isinstance(rows, DTensor):
        return rows.to_local()[0]
    return torch.as_tensor(rows)[0 if ranks is None else ranks.get_rank()]
