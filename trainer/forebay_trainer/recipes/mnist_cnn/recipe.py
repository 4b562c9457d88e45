"""A convolutional network that classifies small pictures: handwritten digits, as they come.

Shape letters: B samples, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from forebay_trainer.config import setting
from forebay_trainer.metrics.flops import Flops, counted
from forebay_trainer.models.cnn import ConvNet
from forebay_trainer.task import Batch, Task
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Config:
    image_column: str = setting("image", "column of the images")
    label_column: str = setting("label", "column of the labels")
    mean: float = setting(0.0, "subtracted from the pixels, which lie in 0 to 1")
    std: float = setting(1.0, "the pixels are divided by it")
    image_shape: tuple[int, ...] = setting(
        (28, 28), "height, width of an image; with channels in front for colour"
    )
    num_classes: int = setting(10, "how many labels there are, counted from 0")
    channels: tuple[int, ...] = setting(
        (16, 32), "feature maps of each convolution; each one halves height and width"
    )
    hidden_features: int = setting(128, "width of the layer before the classes")
    dropout: float = setting(0.1, "share of hidden features dropped in training")

    def __post_init__(self) -> None:
        if len(self.image_shape) not in (2, 3):
            raise InvalidRequest(f"image_shape needs 2 or 3 numbers, not {self.image_shape}")
        if min(self.image_shape[-2:]) < 2 ** len(self.channels):
            raise InvalidRequest(
                f"channels has {len(self.channels)} convolutions, too many for images of "
                f"{self.image_shape}: each one halves them; take fewer"
            )
        if not 0 <= self.dropout < 1:
            raise InvalidRequest(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.std <= 0:
            raise InvalidRequest(f"std must be above 0, not {self.std}")


def build(config: Config) -> Task:
    return Classification(config)


class Classification(Task):
    """Cross entropy; the share of samples whose likeliest class is the right one."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            ConvNet(
                image_shape=config.image_shape,
                num_classes=config.num_classes,
                channels=config.channels,
                hidden_features=config.hidden_features,
                dropout=config.dropout,
            )
        )
        self._config = config

    def prepare(self, batch: Batch) -> Batch:
        config = self._config
        pixels: Tensor = batch[config.image_column]
        scale = 255.0 if pixels.dtype.is_floating_point is False else 1.0
        images_BHW = (pixels.float() / scale - config.mean) / config.std
        labels_B = batch[config.label_column].long()
        return {**batch, "images": images_BHW, "labels": labels_B}

    def flops(self) -> Flops:
        return counted(self.modules["model"], torch.empty(1, *self._config.image_shape))

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (batch["images"],)

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="none")

    def evaluate(self, outputs: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        hits_B = (outputs.argmax(dim=1) == batch["labels"]).float()
        return {"hits": (hits_B * batch["weight"]).sum()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"accuracy": sums["hits"] / max(1.0, sums["weight"])}
