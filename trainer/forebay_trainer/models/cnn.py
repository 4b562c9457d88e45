"""A small convolutional classifier. Shape letters: B batch, C channels, H height, W width,
F flattened features, K classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions that each halve the image, then two linear layers."""

    def __init__(
        self,
        *,
        image_shape: Sequence[int],
        num_classes: int,
        channels: Sequence[int],
        hidden_features: int,
        dropout: float,
    ) -> None:
        super().__init__()
        *colours, height, width = image_shape
        num_inputs = colours[0] if colours else 1
        blocks: list[nn.Module] = []
        for num_outputs in channels:
            blocks += [
                nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            num_inputs, height, width = num_outputs, height // 2, width // 2
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            nn.Linear(num_inputs * height * width, hidden_features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_features, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images as (B, H, W) or (B, C, H, W) floats; returns the logits (B, K)."""
        x_BCHW = images.unsqueeze(1) if images.dim() == 3 else images
        x_BF = self.features(x_BCHW).flatten(1)
        logits_BK: Tensor = self.classifier(x_BF)
        return logits_BK
