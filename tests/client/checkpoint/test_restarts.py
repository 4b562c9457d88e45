"""Ranks of a restarted job meet although the store still has what the dead ones left there."""

import subprocess
import sys
import textwrap

from torch._C._distributed_c10d import TCPStore

RANK = textwrap.dedent(
    """
    import os, sys
    import torch.distributed as dist
    import torch.testing._internal.distributed.fake_pg  # the training's group: it uses no store
    from forebay.checkpoint.group import Ranks

    port, rank, start = map(int, sys.argv[1:])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("fake", store=store, rank=rank, world_size=2)
    print("here", flush=True)
    ranks = Ranks.join(None, 20.0)
    print(ranks.exchange("say hello", [start, rank]), flush=True)
    os._exit(0 if start else 3)  # as one that is killed: nothing is taken back
    """
)


def begin(store: TCPStore, number: int, rank: int) -> subprocess.Popen[str]:
    """A rank that has come so far as to look for the others."""
    command = [sys.executable, "-c", RANK, str(store.port), str(rank), str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_a_restarted_job_meets_in_the_store_of_the_one_before() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for number in range(2):
        ranks = [begin(store, number, rank) for rank in (1, 0)]
        told = [rank.communicate(timeout=100)[0].strip() for rank in ranks]
        assert told == [f"[[{number}, 0], [{number}, 1]]"] * 2
