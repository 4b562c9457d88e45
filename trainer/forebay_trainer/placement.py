"""A task's modules on the mesh: cut by tensor parallelism, then sharded by FSDP2 or copied by DDP.

Whatever the placement, gradients are averaged over the parts of the global batch, and weights keep
their names, so that a generation saved by one placement can be restored into any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from forebay_trainer.compressed import Compression
from forebay_trainer.compression.config import CompressionConfig
from forebay_trainer.parallel import Parallel
from forebay_trainer.pipeline import Pipeline
from forebay_trainer.precision import Precision
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest


class Placement:
    """The modules as this rank has them; `modules` are to be called, by their names."""

    def __init__(
        self,
        task: Task,
        parallel: Parallel,
        precision: Precision,
        *,
        is_compiled: bool,
        is_deterministic: bool,
        compression: CompressionConfig,
        num_pieces: int = 1,
    ) -> None:
        """*num_pieces*: of a micro-batch, in a pipeline."""
        self._task = task
        self._parallel = parallel
        self._precision = precision
        self._is_compiled = is_compiled
        self._is_deterministic = is_deterministic
        self._compression = compression
        self.modules = {name: self._placed(module) for name, module in task.modules.items()}
        self.compression = Compression(compression, parallel)
        self.pipeline: Pipeline | None = None
        if parallel.shape.stages > 1:
            self.pipeline = Pipeline(task, self.model, parallel, num_pieces=num_pieces)

    @property
    def model(self) -> nn.Module:
        """The only module."""
        (model,) = self.modules.values()
        return model

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters that are trained, by module and name, on any placement the same names."""
        return {
            f"{prefix}.{name}": weight
            for prefix, module in self.modules.items()
            for name, weight in unwrapped(module).named_parameters()
            if weight.requires_grad
        }

    def sent(self) -> dict[str, int]:
        """What this rank sent of gradients since it was last asked, where they are compressed."""
        return self.compression.taken()

    def outputs(self, batch: Batch) -> tuple[Any, Batch] | None:
        """What the task's forward answers, and the batch that it belongs to; None on a rank that
        has no part in it, because another stage of the pipeline does."""
        if self.pipeline is not None:
            return self.pipeline.outputs(batch)
        return self._task.forward(self.modules, batch), batch

    @contextmanager
    def syncing(self, is_last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients meet after the last one."""
        with ExitStack() as stack:
            for module in self.modules.values():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(is_last)
                elif isinstance(module, DistributedDataParallel) and not is_last:
                    stack.enter_context(module.no_sync())
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """FSDP2 casts by itself, as it gathers the weights."""
        is_sharded = self._parallel.shape.is_sharded
        return nullcontext() if is_sharded else self._precision.autocast()

    def settle(self) -> None:
        """After forwards without a backward: FSDP2 lets go of the weights that it gathered."""
        for module in self.modules.values():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _placed(self, module: nn.Module) -> nn.Module:
        mesh, shape = self._parallel.mesh, self._parallel.shape
        if shape.stages > 1:
            if self._task.own_step or len(self._task.modules) > 1:
                raise InvalidRequest(
                    f"parallel.num_stages: {type(self._task).__name__} is no single model with a "
                    "loss, so it cannot run as a pipeline"
                )
            module = self._task.split(module, self._parallel.stage, shape.stages)
        module = module.to(self._parallel.device)
        if self._is_compiled:
            module.compile()
        if mesh is None:
            return module
        if shape.tensor > 1:
            parallelize_module(module, mesh["tensor"], dict(self._task.tensor_plan(module)))
        if shape.is_sharded:
            return self._sharded(module)
        if shape.replicas > 1:
            return self._copied(module)
        return module

    def _sharded(self, module: nn.Module) -> nn.Module:
        mesh = self._parallel.mesh
        assert mesh is not None
        # What compresses between replicas averages between them itself.
        has_replicas = self._parallel.shape.replicas > 1 and not self._compression.has_state
        options: dict[str, Any] = {
            "mesh": mesh["replica", "shard"] if has_replicas else mesh["shard"],
            "mp_policy": self._precision.policy(self._compression.dtype),
        }
        blocks = self._task.blocks(module)
        for block in (each for each in blocks if next(each.parameters(), None) is not None):
            fully_shard(block, **options)
        # What leaves the whole module is fp32, as under autocast a loss would be.
        options["mp_policy"] = replace(options["mp_policy"], output_dtype=torch.float32)
        fully_shard(module, **options)
        return module

    def _copied(self, module: nn.Module) -> nn.Module:
        if not any(weight.requires_grad for weight in module.parameters()):
            return module
        mesh, device = self._parallel.mesh, self._parallel.device
        assert mesh is not None
        if self._is_deterministic:
            # Else DDP lays its buckets out anew after the first step, by the order in which the
            # gradients came: sums would be made in another order than right after a resume.
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=mesh["replica"].get_group(),
            find_unused_parameters=self._is_deterministic,
        )


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that DDP wraps; every other placement is the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def use_deterministic_kernels() -> None:
    """Torch refuses, by name, what has no deterministic kernel."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
