"""The step loop: load, forward, backward, step, evaluate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from forebay_trainer.checkpoint import Checkpoints
from forebay_trainer.data import Data, Epoch, real_ids
from forebay_trainer.dropout import Draws
from forebay_trainer.evaluation import Evaluation, Progress
from forebay_trainer.metrics import Metrics
from forebay_trainer.optim import Optimization
from forebay_trainer.parallel import Parallel
from forebay_trainer.placement import Placement
from forebay_trainer.records import RecordWriter, StepRecord
from forebay_trainer.settings import TrainConfig
from forebay_trainer.stop import StopSignal
from forebay_trainer.task import Batch, Task, share_of_mean
from forebay_trainer.watch import Watch
from forebay_wire.errors import ForebayError

Reason = Literal["done", "stopped early", "terminated", "left"]

MAX_NAMED_SAMPLES = 1000


class LossNotFinite(ForebayError):
    """The loss of a step is NaN or infinite; the weights are those of the step before."""


@dataclass(kw_only=True)
class Trainer:
    """One attempt of a run on this rank. Everything in it was built and is closed by `train`."""

    config: TrainConfig
    task: Task
    parallel: Parallel
    data: Data
    placement: Placement
    optimization: Optimization
    evaluation: Evaluation
    progress: Progress
    checkpoints: Checkpoints
    metrics: Metrics
    records: RecordWriter
    watch: Watch
    draws: Draws
    stop: StopSignal
    step: int
    """Optimizer steps taken, over all attempts."""
    quality: dict[str, float] = field(default_factory=dict)
    """Of the evaluation at this step, if there was one."""
    stall_seconds: float = 0.0
    """For which checkpoints held up this step so far."""

    def run(self) -> Reason:
        """Trains to the end of the last epoch, or to the next step after SIGTERM."""
        reason: Reason = "done"
        if self.config.evaluation.at_start:
            self.evaluate(self.data.epoch)
        for epoch in self.data.epochs(self.config.num_epochs):
            if self.is_over:  # for an earlier attempt has come to the end
                break
            self.watch.at(self.step, "before an epoch")
            self.task.before_epoch(epoch.number, self.data)
            reason = self.train_epoch(epoch)
            self.metrics.write("epoch", step=self.step, epoch=epoch.number)
            if reason != "done" or self.is_over:
                break  # here: the loader stands where it is only until the next epoch is asked for
        if reason == "done" and self.progress.is_stuck:
            reason = "stopped early"
        if self.step > self.checkpoints.last_step:
            self.save(self.quality)
        self.watch.at(self.step, "landing")
        self.checkpoints.finish()
        self.metrics.write("end", step=self.step, reason=reason)
        return reason

    @property
    def is_over(self) -> bool:
        """Whether the run ends before its last epoch does."""
        limit = self.config.max_steps
        return self.progress.is_stuck or (limit is not None and self.step >= limit)

    def train_epoch(self, epoch: Epoch) -> Reason:
        started = time.perf_counter()
        self.watch.at(self.step + 1, "load")
        for batch in epoch:
            values, stops = self.train_step(batch, epoch.wait_seconds)
            ids, position = real_ids(batch), self.data.position
            self.records.append(StepRecord(self.step, epoch.number, position, ids))
            self.quality = {}
            is_end = self.data.is_epoch_over or self.is_over
            if self.progress.is_due(self.step, is_end=is_end):
                self.evaluate(epoch.number)
                self.progress.note(self.step, self.quality)
            if self.checkpoints.is_due(self.step):
                self.save({"loss": values["loss"], **self.quality})
            time.sleep(max(0.0, started + self.config.min_step_seconds - time.perf_counter()))
            values["step_seconds"] = time.perf_counter() - started
            values["stall_seconds"] = self.stall_seconds
            self.metrics.write("step", step=self.step, epoch=epoch.number, **values)
            started = time.perf_counter()
            if stops:
                return "terminated"
            if self.is_over:
                break
            self.watch.at(self.step + 1, "load")
        return "done"

    def train_step(self, batch: Batch, wait_seconds: float) -> tuple[dict[str, float], bool]:
        """One optimizer step; what to log of it, and whether any rank was told to stop."""
        self.watch.at(self.step + 1, "forward and backward")
        self.stall_seconds = 0.0
        parts = self.data.parts(batch, self.config.seed, self.step)
        weight = sum(float(self.task.weights(part).sum()) for part in parts)
        num_tokens = sum(self.task.num_tokens(part) for part in parts)
        counts = [weight, len(real_ids(batch)), num_tokens]
        total, num_samples, all_tokens = self.parallel.sum_parts(counts)
        for module in self.placement.modules.values():
            module.train()
        values = {"loss": 0.0}
        if self.task.own_step:
            values = self.task.step(self, parts, total)
        else:
            for number, part in enumerate(parts):
                with self.placement.syncing(is_last=number == len(parts) - 1):
                    values["loss"] += self.forward_backward(part, total)
        values["data_wait_seconds"] = wait_seconds / self.parallel.shape.num_data
        values, stops = self.agree(values)
        if not math.isfinite(values["loss"]):
            self.refuse(values["loss"], batch)
        if not self.task.own_step:
            values["gradient_norm"] = self.update()
        self.optimization.average.update()
        values["learning_rate"] = self.optimization.learning_rate(self.step)
        self.step += 1
        values |= {"samples": int(num_samples), "tokens": int(all_tokens), **self.placement.sent()}
        return values, stops

    def forward_backward(self, part: Batch, total: float) -> float:
        """This rank's share of the loss of the global batch, from one micro-batch."""
        if self.placement.pipeline is not None:
            factor = self.optimization.loss_factor
            return self.placement.pipeline.forward_backward(part, total, factor)
        self.draws.at(self.step, part["id"])
        with self.placement.autocast():
            outputs = self.task.forward(self.placement.modules, part)
            losses = self.task.losses(outputs, part)
            loss = share_of_mean(losses, self.task.weights(part), total)
        self.backward(loss)
        return loss.item()

    def backward(self, loss: Tensor) -> None:
        """*loss* is this rank's share of a mean over the global batch."""
        (loss * self.optimization.loss_factor).backward()

    def update(self, name: str | None = None) -> float:
        """Applies the gradients of one module (by default the only one); their norm."""
        self.watch.at(self.step + 1, "update")
        self.stall_seconds += self.checkpoints.before_update()
        if name is None:
            (name,) = self.optimization.optimizers
        return self.optimization.update(name, self.step)

    def agree(self, values: Mapping[str, float]) -> tuple[dict[str, float], bool]:
        """The shares of all ranks added up, and whether any was told to stop; a collective."""
        shares = [value if self.parallel.speaks else 0.0 for value in values.values()]
        shares += [self.metrics.joules(), float(self.stop.requested)]
        *sums, num_stops = self.parallel.sum(shares)
        return dict(zip([*values, "energy_joules"], sums, strict=True)), num_stops > 0

    def refuse(self, loss: float, batch: Batch) -> None:
        """Ends the run before the weights are touched; names the samples of the step."""
        found = sorted({each for ids in self.parallel.gather(real_ids(batch)) for each in ids})
        shown = ", ".join(map(str, found[:MAX_NAMED_SAMPLES]))
        more = f" and {len(found) - MAX_NAMED_SAMPLES} more" * (len(found) > MAX_NAMED_SAMPLES)
        raise LossNotFinite(
            f"the loss of step {self.step + 1} is {loss}; nothing of it was applied or saved, and "
            f"{self.checkpoints.last_good}. Its samples are the rows {shown}{more} of the dataset"
        )

    def evaluate(self, epoch: int) -> None:
        self.quality = self.evaluation.run(lambda: self.watch.at(self.step, "evaluation"))
        if self.quality:
            self.metrics.write("evaluation", step=self.step, epoch=epoch, **self.quality)

    def save(self, values: Mapping[str, float]) -> None:
        self.watch.at(self.step, "save")
        seconds = self.checkpoints.save(self.step, values)
        self.stall_seconds += seconds
        self.metrics.write("save", step=self.step, stall_seconds=seconds)
