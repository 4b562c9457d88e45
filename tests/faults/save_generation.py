"""A rank of a trainer in a process of its own, to be killed.

``save_generation.py ADDRESS RANK NUM_RANKS RENDEZVOUS_FILE STEP…`` saves the steps one after
another and waits for each to be local.
"""

import sys

import torch
import torch.distributed

import forebay


def state_at(step: int) -> dict[str, torch.Tensor]:
    """What is saved at *step*: known to whoever checks it."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(300, 700, generator=generator),
        "bias": torch.randn(700, generator=generator).bfloat16(),
    }


def main(address: str, rank: int, num_ranks: int, rendezvous: str, steps: list[int]) -> None:
    if num_ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks
        )
    with (
        forebay.connect(address) as client,
        forebay.Checkpointer(client, run="killed") as checkpointer,
    ):
        for step in steps:
            checkpointer.save(step, state=state_at(step)).wait("local", timeout=60)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], list(map(int, sys.argv[5:])))
