"""The models that a recipe can name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from forebay_trainer.config import setting
from forebay_trainer.models.cnn import ConvNet
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: Literal["cnn"] = setting("cnn", "which model")
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

    def build(self) -> nn.Module:
        return ConvNet(
            image_shape=self.image_shape,
            num_classes=self.num_classes,
            channels=self.channels,
            hidden_features=self.hidden_features,
            dropout=self.dropout,
        )
