"""The communication hook of DDP. No deferred annotations here: DDP reads those of a hook."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from forebay_trainer.compression.averaging import Averaging, laid_out


def attach(module: DistributedDataParallel, prefix: str, averaging: Averaging) -> None:
    """Has *averaging* take the place of DDP's all-reduce. *prefix*: of the parameters' names.

    The hook waits for its collectives: those of several buckets would otherwise be started by the
    backend's threads, in an order that differs from rank to rank.
    """
    names: dict[int, str] = {}
    for name, weight in module.module.named_parameters():
        if weight.requires_grad:
            names[id(weight)] = f"{prefix}.{name}"
            averaging.expect(f"{prefix}.{name}", weight)

    def hook(
        state: None,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # missing in torch's stubs
    ) -> torch.futures.Future[torch.Tensor]:
        flat = bucket.buffer()
        shapes = {names[id(weight)]: weight.shape for weight in bucket.parameters()}
        averaging.average(flat, laid_out(flat, shapes))
        devices = [flat.device] if flat.device.type == "cuda" else None
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
        done.set_result(flat)
        return done

    module.register_comm_hook(None, hook)
