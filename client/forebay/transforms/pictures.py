"""Pictures cut, mirrored, resized and recoloured at random, alike for the same sample anywhere."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.transforms import Batch, Draw, PerRow
from forebay.transforms.columns import CACHED_NUMBERS, column_of, joined
from forebay_wire.errors import InvalidRequest

Layout = Literal["HWC", "CHW"]

Draws = NDArray[np.float64]

GREY: Final = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in the brightness that people see (ITU-R BT.601)."""


class Pictures(PerRow):
    """Changes pictures of one or several columns, all columns alike.

    A column is a tensor ``(rows, height, width)`` or with channels, or a list of tensors.
    """

    who: str
    num_draws = 0

    def __init__(self, columns: tuple[str, ...], layout: str) -> None:
        if not columns:
            raise InvalidRequest(f"{self.who}: name at least one column")
        if layout not in ("HWC", "CHW"):
            raise InvalidRequest(f'{self.who}: layout={layout!r}: "HWC" or "CHW"')
        self.columns = columns
        self.layout = layout

    def apply(self, batch: Batch, draw: Draw) -> Batch:
        numbers = draw(self.num_draws)
        changed = {
            column: self._column(column_of(batch, column, self.who), numbers)
            for column in self.columns
        }
        return batch | changed

    def _column(self, values: Any, numbers: Draws) -> Any:
        if isinstance(values, torch.Tensor):
            return self._whole(values, numbers)
        return joined(
            [
                None if one is None else self._whole(one[None], numbers[row : row + 1])[0]
                for row, one in enumerate(values)
            ]
        )

    def _whole(self, values: torch.Tensor, numbers: Draws) -> torch.Tensor:
        if values.dim() == 3:
            return self.change(values.unsqueeze(3), numbers).squeeze(3)
        if values.dim() != 4:
            raise InvalidRequest(
                f"{self.who}: pictures have two or three dimensions, not {values.dim() - 1}"
            )
        if self.layout == "CHW":
            return self.change(values.permute(0, 2, 3, 1), numbers).permute(0, 3, 1, 2).contiguous()
        return self.change(values, numbers)

    @abstractmethod
    def change(self, pictures: torch.Tensor, numbers: Draws) -> torch.Tensor:
        """New pictures of *pictures* ``(rows, height, width, channels)``."""


class RandomCrop(Pictures):
    """See :func:`random_crop`."""

    who = "random_crop"
    num_draws = 2

    def __init__(self, columns: tuple[str, ...], size: Any, padding: int, layout: str) -> None:
        super().__init__(columns, layout)
        self.size = _size(self.who, size)
        if padding < 0:
            raise InvalidRequest(f"random_crop: padding={padding}: at least 0")
        self.padding = padding

    def change(self, pictures: torch.Tensor, numbers: Draws) -> torch.Tensor:
        height, width = self.size
        around = (0, 0, self.padding, self.padding, self.padding, self.padding)
        if self.padding:
            pictures = torch.nn.functional.pad(pictures, around)
        rows, there_height, there_width, channels = pictures.shape
        if there_height < height or there_width < width:
            raise InvalidRequest(
                f"random_crop: {height} x {width} does not fit a picture of {there_height} x "
                f"{there_width}, padding included: resize it first, or pad more"
            )
        tops = (numbers[:, 0] * (there_height - height + 1)).astype(np.int64).tolist()
        lefts = (numbers[:, 1] * (there_width - width + 1)).astype(np.int64).tolist()
        found = pictures.new_empty((rows, height, width, channels))
        for out, one, top, left in zip(found, pictures, tops, lefts, strict=True):
            out.copy_(one[top : top + height, left : left + width])
        return found


class RandomFlip(Pictures):
    """See :func:`random_flip`."""

    who = "random_flip"
    num_draws = 1

    def __init__(
        self, columns: tuple[str, ...], direction: str, chance: float, layout: str
    ) -> None:
        super().__init__(columns, layout)
        if direction not in ("horizontal", "vertical"):
            raise InvalidRequest(f'direction={direction!r}: "horizontal" or "vertical"')
        if not 0 <= chance <= 1:
            raise InvalidRequest(f"chance={chance}: from 0 to 1")
        self.axis = 2 if direction == "horizontal" else 1
        self.chance = chance

    def change(self, pictures: torch.Tensor, numbers: Draws) -> torch.Tensor:
        flipped = torch.from_numpy(np.flatnonzero(numbers[:, 0] < self.chance))
        found = pictures.clone()
        found[flipped] = pictures[flipped].flip(self.axis)
        return found


class JitterColors(Pictures):
    """See :func:`jitter_colors`."""

    who = "jitter_colors"
    num_draws = 3

    def __init__(
        self, columns: tuple[str, ...], strengths: tuple[float, float, float], layout: str
    ) -> None:
        super().__init__(columns, layout)
        if not all(0 <= one <= 1 for one in strengths):
            raise InvalidRequest("brightness, contrast and saturation: from 0 to 1")
        self.strengths = np.array(strengths)

    def change(self, pictures: torch.Tensor, numbers: Draws) -> torch.Tensor:
        if pictures.dtype != torch.uint8:
            raise InvalidRequest(f"jitter_colors: pictures of uint8, not {pictures.dtype}")
        found = torch.empty_like(pictures)
        factors = torch.from_numpy(1 + self.strengths * (2 * numbers - 1)).float()
        some = max(1, CACHED_NUMBERS // max(1, pictures[:1].numel()))
        for start in range(0, len(pictures), some):
            part = slice(start, start + some)
            found[part] = self._jittered(pictures[part], factors[part])
        return found

    def _jittered(self, pictures: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        rows, height, width, channels = pictures.shape
        brightness, contrast, saturation = factors.T.reshape(3, rows, 1, 1, 1)
        # Sums of whole numbers are exact, whatever the batch: so all that follows is, too.
        sums = pictures.sum(dim=(1, 2), dtype=torch.int64).double()
        means = (sums * _shares(channels)).sum(1) / max(1, height * width)
        found = pictures.float().mul_(brightness * contrast)
        found += means.float().view(rows, 1, 1, 1) * brightness * (1 - contrast)
        if channels == 3 and self.strengths[2]:
            red, green, blue = found.unbind(3)
            grey = red * GREY[0] + green * GREY[1] + blue * GREY[2]
            found.mul_(saturation).add_(grey.unsqueeze(3) * (1 - saturation))
        return found.round_().clamp_(0, 255).to(torch.uint8)


class Resize(Pictures):
    """See :func:`resize`, and :func:`random_resized_crop`."""

    who = "resize"

    def __init__(self, columns: tuple[str, ...], size: Any, layout: str) -> None:
        super().__init__(columns, layout)
        self.size = _size(self.who, size)

    def change(self, pictures: torch.Tensor, numbers: Draws) -> torch.Tensor:
        found = pictures.new_empty((len(pictures), *self.size, pictures.shape[3]))
        # One by one: the same result in any batch.
        for out, one, own in zip(found, pictures, numbers, strict=True):
            out.copy_(_resized(self._part(one, own), self.size))
        return found

    def _part(self, picture: torch.Tensor, numbers: Draws) -> torch.Tensor:
        del numbers
        return picture


class RandomResizedCrop(Resize):
    """See :func:`random_resized_crop`."""

    who = "random_resized_crop"
    num_draws = 4

    def __init__(
        self,
        columns: tuple[str, ...],
        size: Any,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        layout: str,
    ) -> None:
        super().__init__(columns, size, layout)
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise InvalidRequest(f"random_resized_crop: scale={scale}, ratio={ratio}: low, high")
        self.scale = scale
        self.ratio = ratio

    def _part(self, picture: torch.Tensor, numbers: Draws) -> torch.Tensor:
        height, width, _ = picture.shape
        low, high = self.scale
        area = height * width * (low + float(numbers[0]) * (high - low))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = math.exp(low + float(numbers[1]) * (high - low))
        part_width = min(width, max(1, round(math.sqrt(area * ratio))))
        part_height = min(height, max(1, round(math.sqrt(area / ratio))))
        top = int(numbers[2] * (height - part_height + 1))
        left = int(numbers[3] * (width - part_width + 1))
        return picture[top : top + part_height, left : left + part_width]


def random_crop(
    *columns: str, size: int | tuple[int, int], padding: int = 0, layout: Layout = "HWC"
) -> RandomCrop:
    """A ``transform=`` that cuts a piece of *size* (height, width) out of each picture, at random,
    after *padding* zeros were put around it. Several *columns* (picture and mask) are cut alike."""
    return RandomCrop(columns, size, padding, layout)


def random_flip(
    *columns: str,
    direction: Literal["horizontal", "vertical"] = "horizontal",
    chance: float = 0.5,
    layout: Layout = "HWC",
) -> RandomFlip:
    """A ``transform=`` that mirrors pictures with this *chance*; several *columns* alike."""
    return RandomFlip(columns, direction, chance, layout)


def jitter_colors(
    *columns: str,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    layout: Layout = "HWC",
) -> JitterColors:
    """A ``transform=`` that multiplies each of the three by a random factor of 1 ± its strength.
    Pictures are uint8."""
    return JitterColors(columns, (brightness, contrast, saturation), layout)


def resize(*columns: str, size: int | tuple[int, int], layout: Layout = "HWC") -> Resize:
    """A ``transform=`` that makes all pictures of one *size* (height, width), smoothly."""
    return Resize(columns, size, layout)


def random_resized_crop(
    *columns: str,
    size: int | tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    layout: Layout = "HWC",
) -> RandomResizedCrop:
    """A ``transform=`` that cuts a random part out of each picture, of *scale* of its area and
    *ratio* of width to height, and makes it of one *size* (height, width)."""
    return RandomResizedCrop(columns, size, scale, ratio, layout)


def _resized(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    whole = picture.permute(2, 0, 1)[None]
    if picture.dtype != torch.uint8:  # which torch resizes three times as fast as floats
        whole = whole.float()
    found = torch.nn.functional.interpolate(
        whole, size, mode="bilinear", antialias=True, align_corners=False
    )
    if not picture.is_floating_point() and picture.dtype != torch.uint8:
        found = found.round_()
    return found[0].permute(1, 2, 0).to(picture.dtype)


def _shares(channels: int) -> torch.Tensor:
    shares = GREY if channels == 3 else (1 / max(1, channels),) * channels
    return torch.tensor(shares, dtype=torch.float64)


def _size(who: str, size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InvalidRequest(f"{who}: size={size}: at least 1")
    return height, width
