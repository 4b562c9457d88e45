"""A model whose layers lie on several ranks, one stage each, fed with small pieces of a batch.

B rows of a micro-batch, padded to a fixed number: what travels between stages has one shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from forebay_trainer.data import padded
from forebay_trainer.parallel import Parallel
from forebay_trainer.task import Batch, Task, share_of_mean


class Pipeline:
    """This rank's stage, and the order (1F1B) in which pieces run forward and backward in it."""

    def __init__(
        self, task: Task, module: nn.Module, parallel: Parallel, *, num_pieces: int
    ) -> None:
        assert parallel.mesh is not None
        self._task = task
        self._num_pieces = num_pieces
        self._is_first = parallel.stage == 0
        self._is_last = parallel.stage == parallel.shape.stages - 1
        self._num_rows = 0
        self._batch: Batch = {}
        self._total = 1.0
        self._factor = 1.0
        self._stage = PipelineStage(
            module,
            parallel.stage,
            parallel.shape.stages,
            parallel.device,
            group=parallel.mesh["stage"].get_group(),
        )
        self._schedule = Schedule1F1B(
            self._stage, num_pieces, loss_fn=self._loss, scale_grads=False
        )

    def fit(self, num_rows: int) -> None:
        """Micro-batches have at most so many rows."""
        self._num_rows = -(-num_rows // self._num_pieces) * self._num_pieces

    def forward_backward(self, part: Batch, total: float, factor: float) -> float:
        """The last stage's share of the loss of the global batch; 0 elsewhere. Gradients are those
        of the loss times *factor*."""
        self._batch = padded(part, self._num_rows)
        self._total, self._factor = total, factor
        losses: list[Tensor] = []
        inputs = self._task.inputs(self._batch) if self._is_first else ()
        keywords: dict[str, Any] = self._task.keywords(self._batch)
        if self._is_last:
            self._schedule.step(*inputs, target=self._rows(), losses=losses, **keywords)
        else:
            self._schedule.step(*inputs, **keywords)
        return float(sum(loss.item() for loss in losses)) / factor

    def outputs(self, part: Batch) -> tuple[Any, Batch] | None:
        """On the last stage what the model answers, and the batch, padded like it."""
        batch = padded(part, self._num_rows)
        self._batch, self._total, self._factor = batch, 1.0, 1.0
        inputs = self._task.inputs(batch) if self._is_first else ()
        keywords: dict[str, Any] = self._task.keywords(batch)
        if not self._is_last:
            self._schedule.eval(*inputs, **keywords)
            return None
        return self._schedule.eval(*inputs, target=self._rows(), losses=[], **keywords), batch

    def _rows(self) -> Tensor:
        """Stands for the targets, which may be anything: the schedule cuts it like the batch."""
        return torch.arange(self._num_rows)

    def _loss(self, outputs: Any, rows: Tensor) -> Tensor:
        start, stop = int(rows[0]), int(rows[-1]) + 1
        piece = {name: values[start:stop] for name, values in self._batch.items()}
        losses = self._task.losses(outputs, piece)
        return share_of_mean(losses, self._task.weights(piece), self._total) * self._factor
