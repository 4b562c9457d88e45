"""One rank of two that average gradients in every way; writes down what it saw.

python methods.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from forebay_trainer.compression.averaging import Averaging, laid_out
from forebay_trainer.compression.config import CompressionConfig
from forebay_trainer.compression.fsdp import check_sum
from forebay_trainer.compression.wire import Wire
from forebay_wire.errors import InvalidRequest

SHAPES = {"matrix": (24, 16), "kernel": (8, 3, 3, 3), "bias": (17,)}
SIZES = {name: torch.Size(shape) for name, shape in SHAPES.items()}
NUM_ROUNDS = 40


class Averager:
    def __init__(self, scale=1.0, **keys):
        config = CompressionConfig(**keys)
        self.wire = Wire(dist.group.WORLD)
        self.scale = scale
        self.averaging = Averaging(
            config.build(seed=1),
            self.wire,
            start_step=config.start_step,
            scale=lambda: self.scale,
        )
        for name, shape in SIZES.items():
            self.averaging.expect(name, torch.empty(shape))

    def __call__(self, flat):
        flat = flat * self.scale
        self.averaging.average(flat, laid_out(flat, SIZES))
        return flat / self.scale

    def errors(self):
        states = self.averaging.states
        return torch.cat(
            [states[n].get("error", torch.zeros(s)).flatten() for n, s in SIZES.items()]
        )


def gradient(seed, kind="normal"):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(sum(size.numel() for size in SIZES.values()), generator=generator)
    if kind == "wide":  # over more powers of two than fp16 has
        flat *= 10.0 ** (torch.rand(len(flat), generator=generator) * 16 - 8)
    if kind == "low rank":
        for piece in laid_out(flat, SIZES).values():
            if piece.dim() > 1:
                one = torch.randn(len(piece), 1, generator=generator)
                piece.view(len(piece), -1).copy_(one * piece.view(len(piece), -1)[0])
    return flat


def once(mine, **keys):
    averager = Averager(**keys)
    return {"mean": averager(mine), "taken": averager.wire.taken()}


def constant(mine, num_rounds=NUM_ROUNDS, **keys):
    """The same gradient again and again."""
    averager = Averager(**keys)
    means, errors = [], []
    for _ in range(num_rounds):
        means.append(averager(mine))
        errors.append(averager.errors())
    return {"means": torch.stack(means), "errors": torch.stack(errors)}


def disturbed(mine, **keys):
    """A round with an infinite gradient and a change of the loss's scale do no harm."""
    calm, other = Averager(**keys), Averager(**keys)
    found = {}
    for each in (calm, other):
        for number in range(3):
            if each is other and number == 2:
                found["bad"] = other(mine * torch.inf if dist.get_rank() else mine)
                other.scale = 0.25
            found["calm" if each is calm else "disturbed"] = each(mine)
    return found


def refusal(dtype):
    try:
        check_sum(dtype, dist.group.WORLD, torch.device("cpu"))
    except InvalidRequest as error:
        return str(error)
    return None


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for kind in ("normal", "wide", "low rank"):
        mine = gradient(rank, kind)
        found[kind] = {
            "mine": mine,
            "bf16": once(mine.clone(), method="bf16"),
            "fp16": once(mine.clone(), method="fp16"),
            "topk": once(mine.clone(), method="topk", share=0.1),
            "powersgd": once(mine.clone(), method="powersgd"),
            "later": once(mine.clone(), method="powersgd", start_step=1),
        }
    mine = gradient(rank)
    powersgd, topk = {"method": "powersgd", "rank": 3}, {"method": "topk", "share": 0.1}
    found["constant"] = {
        "powersgd": constant(mine, **powersgd),
        "cold powersgd": constant(mine, **powersgd, warm_start=False),
        "topk": constant(mine, **topk),
        "powersgd without": constant(mine, 5, **powersgd, error_feedback=False),
        "topk without": constant(mine, 5, **topk, error_feedback=False),
    }
    found["disturbed"] = {
        each["method"]: disturbed(mine, **each) for each in (powersgd, topk, {"method": "fp16"})
    }
    found["refusals"] = {
        str(dtype): refusal(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2)
    }
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


main()
