"""Which rank of how many this process is."""

from __future__ import annotations

import os
import sys

from forebay_wire.errors import InvalidRequest


def find_rank(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """(rank, number of ranks): as given, else torch.distributed's, else $RANK and $WORLD_SIZE.

    Without any of them: one rank. torch.distributed counts once its process group is there.
    """
    if (rank is None) != (world_size is None):
        raise InvalidRequest("give both rank and world_size, or neither")
    if rank is None or world_size is None:
        rank, world_size = _of_torch() or _of_environment()
    if not 0 <= rank < world_size:
        raise InvalidRequest(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
    return rank, world_size


def find_nodes(world_size: int) -> int:
    """Number of machines that the *world_size* ranks run on: what torchrun says, else one."""
    nodes = _number("GROUP_WORLD_SIZE")
    if nodes is None:
        ranks_each = _number("LOCAL_WORLD_SIZE")
        nodes = 1 if ranks_each is None else -(-world_size // max(1, ranks_each))
    return max(1, min(nodes, world_size))


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    try:
        return None if value is None else int(value)
    except ValueError as error:
        raise InvalidRequest(f"{name}={value!r} in the environment is no number") from error


def _of_torch() -> tuple[int, int] | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.get_rank(), distributed.get_world_size()


def _of_environment() -> tuple[int, int]:
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world_size is None:
        return 0, 1
    try:
        return int(rank), int(world_size)
    except ValueError as error:
        raise InvalidRequest(
            f"RANK={rank!r}, WORLD_SIZE={world_size!r} in the environment are no numbers"
        ) from error
