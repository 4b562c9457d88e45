"""Where the ranks of one start meet: a part of torch's store that no earlier start has touched.

Its name is agreed on by :func:`forebay_wire.meeting.meet`.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore


def open_store(rank: int, timeout: timedelta) -> TCPStore:
    """The store that ``MASTER_ADDR`` and ``MASTER_PORT`` name: torchrun's own, else rank 0's."""
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not is_torchruns,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def part_of(store: TCPStore, name: str) -> PrefixStore:
    """The part of a store that belongs to one start."""
    return PrefixStore(f"start-{name}", store)
