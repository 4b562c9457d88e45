"""The step loop: load, forward, backward, step, record, save, validate.

Shape letters: B samples of this rank, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from forebay_trainer.checkpoint import Checkpoints
from forebay_trainer.data import Data, Examples
from forebay_trainer.metrics import MetricsWriter
from forebay_trainer.parallel import Parallel
from forebay_trainer.records import RecordWriter, StepRecord
from forebay_trainer.stop import StopSignal

Reason = Literal["done", "terminated"]


@dataclass(frozen=True)
class StepLength:
    """How long a step takes at least: a toy model at the pace of a real one."""

    min_seconds: float

    def wait(self, started: float) -> None:
        rest = started + self.min_seconds - time.perf_counter()
        if rest > 0:
            time.sleep(rest)


class Trainer:
    """One attempt of a run on this rank. Everything in it was built and is closed by `train`."""

    def __init__(
        self,
        *,
        parallel: Parallel,
        data: Data,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        records: RecordWriter,
        stop: StopSignal,
        step: int,
        step_length: StepLength,
    ) -> None:
        self.parallel = parallel
        self.data = data
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.records = records
        self.stop = stop
        self.step = step
        self.step_length = step_length
        self.stopping = False
        self.quality: dict[str, float] = {}

    def run(self, num_epochs: int) -> Reason:
        """Trains to the end of epoch ``num_epochs``, or to the next step after SIGTERM."""
        for epoch in self.data.train_loader.epochs(num_epochs):
            self.train_epoch(epoch.number, epoch)
            if self.stopping:
                break
            self.quality = self.validate(epoch.number)
        if self.step > self.checkpoints.last_step:
            self.save(self.quality)
        self.checkpoints.finish()
        reason: Reason = "terminated" if self.stopping else "done"
        self.metrics.write("end", step=self.step, reason=reason)
        return reason

    def train_epoch(self, epoch: int, batches: Iterable[dict[str, Any]]) -> None:
        self.model.train()
        started = time.perf_counter()
        for batch, wait_seconds in timed(batches):
            examples = self.data.prepare(batch)
            num_samples, loss, stall_seconds = self.train_step(examples)
            self.record(epoch, examples)
            loss, wait_seconds, stops = self.agree(loss, wait_seconds)
            if self.checkpoints.is_due(self.step):
                stall_seconds += self.save({"loss": loss})
            self.step_length.wait(started)
            self.metrics.write(
                "step",
                step=self.step,
                epoch=epoch,
                loss=loss,
                samples=num_samples,
                learning_rate=self.scheduler.get_last_lr()[0],
                step_seconds=time.perf_counter() - started,
                data_wait_seconds=wait_seconds,
                stall_seconds=stall_seconds,
            )
            started = time.perf_counter()
            self.stopping = stops
            if stops:
                break

    def train_step(self, examples: Examples) -> tuple[int, float, float]:
        """One optimizer step; samples of all ranks, this rank's share of the loss, stall."""
        (num_samples,) = self.parallel.sum([examples.num_samples])
        losses_B = F.cross_entropy(self.model(examples.images), examples.labels, reduction="none")
        loss = share_of_mean(losses_B, examples.weights, num_samples)
        self.optimizer.zero_grad()
        # DDP averages the gradients over the ranks, and the shares have to be added up.
        (loss * self.parallel.num_ranks).backward()
        stall_seconds = self.checkpoints.before_update()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return int(num_samples), loss.item(), stall_seconds

    def record(self, epoch: int, examples: Examples) -> None:
        ids = tuple(examples.ids)
        self.records.append(StepRecord(self.step, epoch, self.data.position, ids))

    def agree(self, loss: float, wait_seconds: float) -> tuple[float, float, bool]:
        """The global loss, the mean wait, and whether any rank was told to stop; a collective."""
        loss, wait_seconds, stops = self.parallel.sum([loss, wait_seconds, self.stop.requested])
        return loss, wait_seconds / self.parallel.num_ranks, stops > 0

    def save(self, values: dict[str, float]) -> float:
        stall_seconds = self.checkpoints.save(self.step, values)
        self.metrics.write("save", step=self.step, stall_seconds=stall_seconds)
        return stall_seconds

    @torch.no_grad()
    def validate(self, epoch: int) -> dict[str, float]:
        """Accuracy and loss on the test split, over all ranks; nothing without such a split."""
        if not self.data.has_test:
            return {}
        self.model.eval()
        # DDP's own forward may start collectives, and ranks may have different numbers of batches.
        model = getattr(self.model, "module", self.model)
        correct = loss = num_samples = 0.0
        for examples in self.data.test_batches():
            logits_BK = model(examples.images)
            losses_B = F.cross_entropy(logits_BK, examples.labels, reduction="none")
            hits_B = (logits_BK.argmax(dim=1) == examples.labels).float()
            loss += float((losses_B * examples.weights).sum())
            correct += float((hits_B * examples.weights).sum())
            num_samples += examples.num_samples
        correct, loss, num_samples = self.parallel.sum([correct, loss, num_samples])
        quality = {
            "test_accuracy": correct / max(1.0, num_samples),
            "test_loss": loss / max(1.0, num_samples),
        }
        self.metrics.write(
            "epoch", epoch=epoch, step=self.step, test_samples=int(num_samples), **quality
        )
        return quality


def share_of_mean(losses_B: Tensor, weights_B: Tensor, num_samples: float) -> Tensor:
    """What this rank adds to the mean loss of the global batch of ``num_samples`` real samples.

    Padding weighs 0 and every real sample the same, however many its rank has: the sum over the
    ranks is the mean that one process would compute, for any number of ranks.
    """
    return (losses_B * weights_B).sum() / max(1.0, num_samples)


def timed(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each batch with the seconds that the caller waited for it."""
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield batch, time.perf_counter() - start
