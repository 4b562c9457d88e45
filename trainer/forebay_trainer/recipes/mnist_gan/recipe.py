"""Two networks that play against each other: one draws digits, one tells them from real ones.

Shape letters: B pictures, Z numbers of noise, C channels, H height, W width, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forebay_trainer.config import setting
from forebay_trainer.dropout import uniform
from forebay_trainer.loop import Trainer
from forebay_trainer.metrics.flops import Flops, counted
from forebay_trainer.models.gan import IMAGE_SIZE, NUM_GROUPS, Discriminator, Generator
from forebay_trainer.task import Batch, Task, share_of_mean
from forebay_wire.errors import InvalidRequest

POOLED: Final = 4
"""Pixels in each direction that are averaged for the Fréchet distance."""

FOR_DISCRIMINATOR, FOR_GENERATOR, FOR_EVALUATION = range(3)
"""What noise is drawn for: a step needs it twice."""


@dataclass(frozen=True, kw_only=True)
class Config:
    noise_features: int = setting(64, "numbers that a picture is made of")
    channels: int = setting(32, "of the layers at 14 x 14; those at 7 x 7 have twice as many")
    dropout: float = setting(0.3, "share of the discriminator's last features that are dropped")

    def __post_init__(self) -> None:
        if self.noise_features < 1:
            raise InvalidRequest(f"noise_features must be at least 1, not {self.noise_features}")
        if self.channels < 1 or self.channels % NUM_GROUPS:
            raise InvalidRequest(
                f"channels must be a multiple of {NUM_GROUPS}, not {self.channels}"
            )
        if not 0 <= self.dropout < 1:
            raise InvalidRequest(f"dropout must be at least 0 and below 1, not {self.dropout}")


def build(config: Config) -> Task:
    return Game(config)


class Game(Task):
    """Logistic losses; the generator's is the one that does not saturate (Goodfellow et al., 2014,
    section 3): it raises the logarithm of being taken for real.

    A step is one of the discriminator and then one of the generator, on new noise, which is a
    function of (seed, step, row of the dataset): the same on any ranks and after every resume.
    """

    own_step: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(
            {
                "discriminator": Discriminator(channels=config.channels, dropout=config.dropout),
                "generator": Generator(
                    noise_features=config.noise_features, channels=config.channels
                ),
            }
        )
        self._config = config

    def prepare(self, batch: Batch) -> Batch:
        images_BHW = batch["image"].float() / 127.5 - 1.0
        return {**batch, "real": images_BHW[:, None]}

    def noise(self, batch: Batch, *words: int) -> Tensor:
        """From -1 to 1, evenly."""
        return 2 * uniform(words, batch["id"], self._config.noise_features) - 1

    def flops(self) -> Flops:
        # A step: of the generator a forward, and forward and backward; of the discriminator
        # forward and backward of both kinds, and in the generator's turn forward and half a
        # backward. (A backward costs two forwards.)
        picture = torch.empty(1, 1, IMAGE_SIZE, IMAGE_SIZE)
        noise = torch.empty(1, self._config.noise_features)
        draw = counted(self.modules["generator"], noise)
        judge = counted(self.modules["discriminator"], picture)
        return lambda num_samples, num_tokens: (
            draw(num_samples, num_tokens) * 4 / 3 + judge(num_samples, num_tokens) * 8 / 3
        )

    # Training.

    def step(self, trainer: Trainer, parts: Iterable[Batch], total: float) -> dict[str, float]:
        parts = list(parts)
        values = {}
        for name, turn in (("discriminator", self._judge), ("generator", self._draw)):
            share = 0.0
            for number, part in enumerate(parts):
                with trainer.placement.syncing(is_last=number == len(parts) - 1):
                    share += turn(trainer, part, total)
            trainer.update(name)
            values[f"{name}_loss"] = share
        return {"loss": sum(values.values()), **values}

    def _judge(self, trainer: Trainer, part: Batch, total: float) -> float:
        """Gradients of the discriminator; this part's share of its loss."""
        words = (trainer.config.seed, trainer.step, FOR_DISCRIMINATOR)
        judge = trainer.placement.modules["discriminator"]
        with trainer.placement.autocast():
            with torch.no_grad():
                drawn_BCHW = self.modules["generator"](self.noise(part, *words))
            # Both kinds in one forward, for DDP takes one for each backward.
            trainer.draws.at(trainer.step, torch.cat([2 * part["id"], 2 * part["id"] + 1]))
            logits_B = judge(torch.cat([part["real"], drawn_BCHW]))
            losses_B = losses_of_judge(*logits_B.float().chunk(2))
            loss = share_of_mean(losses_B, part["weight"], total)
        trainer.backward(loss)
        return loss.item()

    def _draw(self, trainer: Trainer, part: Batch, total: float) -> float:
        """Gradients of the generator; this part's share of its loss.

        Backwards in two halves: through the discriminator to the pictures, then on from them. So
        the discriminator's weights get no gradients, and what copies or shards it (whose own
        module is called, without DDP around it) does not wait for any.
        """
        words = (trainer.config.seed, trainer.step, FOR_GENERATOR)
        with trainer.placement.autocast():
            drawn_BCHW = trainer.placement.modules["generator"](self.noise(part, *words))
            seen_BCHW = drawn_BCHW.detach().requires_grad_()
            trainer.draws.at(trainer.step, 2 * part["id"] + 1)
            logits_B = self.modules["discriminator"](seen_BCHW).float()
            loss = share_of_mean(F.softplus(-logits_B), part["weight"], total)
        # Scaled before the first half, which would lose small slopes in fp16 otherwise.
        scaled = loss * trainer.optimization.loss_factor
        (slope_BCHW,) = torch.autograd.grad(scaled, seen_BCHW)
        (drawn_BCHW * slope_BCHW).sum().backward()
        return loss.item()

    # Evaluation.

    def forward(self, modules: Mapping[str, nn.Module], batch: Batch) -> Any:
        """A drawn picture for each real one, and the logits of both."""
        drawn_BCHW = modules["generator"](self.noise(batch, FOR_EVALUATION))
        judge = modules["discriminator"]
        return drawn_BCHW, judge(batch["real"]), judge(drawn_BCHW)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        _, real_B, drawn_B = outputs
        return losses_of_judge(real_B, drawn_B)

    def evaluate(self, outputs: Any, batch: Batch) -> Mapping[str, Tensor]:
        drawn_BCHW, real_B, drawn_B = outputs
        sums = {"fooled": ((drawn_B > 0) * batch["weight"]).sum()}
        sums["seen_through"] = ((real_B > 0) * batch["weight"]).sum()
        for name, images_BCHW in (("real", batch["real"]), ("drawn", drawn_BCHW)):
            features_BF = features(images_BCHW)
            weighted_BF = features_BF * batch["weight"][:, None].double()
            sums[f"{name}_sum"] = weighted_BF.sum(dim=0)
            sums[f"{name}_products"] = weighted_BF.T @ features_BF
        return sums

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        number = sums["weight"]
        real, drawn = (
            moments(sums[f"{name}_sum"], sums[f"{name}_products"], number)
            for name in ("real", "drawn")
        )
        return {
            "frechet_distance": frechet_distance(real, drawn),
            "taken_for_real": sums["fooled"] / number,
            "real_taken_for_real": sums["seen_through"] / number,
        }


def losses_of_judge(real_B: Tensor, drawn_B: Tensor) -> Tensor:
    """Minus the logarithms of the probabilities that the right ones are taken for real."""
    return F.softplus(-real_B) + F.softplus(drawn_B)


# The Fréchet distance.

Moments = tuple[Tensor, Tensor]
"""Mean (F,) and covariance (F, F)."""


def features(images_BCHW: Tensor) -> Tensor:
    """What pictures are compared by: means of 4 x 4 pixels, from 0 to 1; float64 (B, 49)."""
    return F.avg_pool2d((images_BCHW.double() + 1) / 2, POOLED).flatten(1)


def moments(sum_F: Tensor, products_FF: Tensor, number: float) -> Moments:
    mean_F = sum_F / number
    return mean_F, products_FF / number - torch.outer(mean_F, mean_F)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared distance of two normal distributions (Dowson and Landau, 1982): of the means, plus
    tr(A + B - 2 (A B)^½) of the covariances."""
    (mean_F, cov_FF), (other_mean_F, other_FF) = first, second
    root_FF = root(cov_FF)
    # (A B)^½ has the trace of (A^½ B A^½)^½, which is symmetric.
    mixed = torch.linalg.eigvalsh(root_FF @ other_FF @ root_FF).clamp(min=0).sqrt().sum()
    spread = cov_FF.trace() + other_FF.trace() - 2 * mixed
    return float(((mean_F - other_mean_F) ** 2).sum() + spread)


def root(matrix_FF: Tensor) -> Tensor:
    """The symmetric root of a covariance, whose eigenvalues are rounded up to 0."""
    values_F, vectors_FF = torch.linalg.eigh(matrix_FF)
    return (vectors_FF * values_F.clamp(min=0).sqrt()) @ vectors_FF.T
