"""Two convolutional networks that play against each other over pictures of 28 x 28. Shape letters:
B pictures, Z numbers of noise, C channels, H height, W width.

After Radford, Metz and Chintala (2015, section 3): strides in place of pooling, ReLU in the
generator and leaky ReLU in the discriminator. Instead of batch normalisation the generator has
group normalisation (Wu and He, 2018), and the discriminator none: so a picture does not depend on
what else is in its batch, and the outcome not on how many ranks share a batch out.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

IMAGE_SIZE: Final = 28
"""Height and width: 7 doubled twice."""

NUM_GROUPS: Final = 8
SLOPE: Final = 0.2
"""Of the leaky ReLU."""


class Generator(nn.Module):
    """Noise to pictures with pixels from -1 to 1."""

    def __init__(self, *, noise_features: int, channels: int) -> None:
        super().__init__()
        smallest = IMAGE_SIZE // 4
        self.layers = nn.Sequential(
            nn.Linear(noise_features, 2 * channels * smallest**2),
            nn.Unflatten(1, (2 * channels, smallest, smallest)),
            nn.GroupNorm(NUM_GROUPS, 2 * channels),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * channels, channels, kernel_size=4, stride=2, padding=1),
            nn.GroupNorm(NUM_GROUPS, channels),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, 1, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise_BZ: Tensor) -> Tensor:
        images_BCHW: Tensor = self.layers(noise_BZ)
        return images_BCHW


class Discriminator(nn.Module):
    """Pictures to a logit: above 0 for what it takes for real."""

    def __init__(self, *, channels: int, dropout: float) -> None:
        super().__init__()
        smallest = IMAGE_SIZE // 4
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(channels, 2 * channels, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * channels * smallest**2, 1),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_B: Tensor = self.layers(images_BCHW)[:, 0]
        return logits_B
