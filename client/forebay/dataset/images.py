"""Pictures in a column of bytes, decoded on their way to the trainer."""

from __future__ import annotations

import functools
import io
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.memory import batch_memory
from forebay.dataset.transforms import Batch
from forebay_wire.errors import ForebayError, IntegrityError, InvalidRequest

Mode = Literal["RGB", "GRAY"]

JPEG_MAGIC: Final = b"\xff\xd8\xff"


class DecodeImages:
    """See :func:`decode_images`. Thread-safe, picklable."""

    def __init__(self, column: str, mode: Mode) -> None:
        if mode not in ("RGB", "GRAY"):
            raise InvalidRequest(f'mode={mode!r} is unknown: use "RGB" or "GRAY"')
        self.column = column
        self.mode: Mode = mode

    def __call__(self, batch: Batch) -> Batch:
        if self.column not in batch:
            raise InvalidRequest(
                f"decode_images({self.column!r}): the batch has no such column; it has "
                f"{', '.join(sorted(batch))}"
            )
        return {**batch, self.column: self._decoded(batch[self.column])}

    def _decoded(self, files: list[bytes | None]) -> Any:
        shapes = {self._shape(data) for data in files if data is not None}
        if len(shapes) == 1 and None not in shapes:  # decoded into the batch itself
            (shape,) = shapes
            assert shape is not None
            stacked = batch_memory.empty((len(files), *shape), np.dtype(np.uint8))
            for row, data in zip(stacked, files, strict=True):
                if data is None:  # a hole
                    row[:] = 0
                else:
                    _decode_jpeg(data, self.mode, row)
            return torch.from_numpy(stacked)
        pictures = [None if data is None else self._picture(data) for data in files]
        first = next((one for one in pictures if one is not None), None)
        if first is None or any(one is None or one.shape != first.shape for one in pictures):
            return pictures
        return torch.stack([one for one in pictures if one is not None])

    def _shape(self, data: bytes) -> tuple[int, int, int] | None:
        """Of a JPEG file, if it can be decoded by the fast decoder."""
        if data[:3] != JPEG_MAGIC or _simplejpeg() is None:
            return None
        try:
            height, width, colours, _ = _simplejpeg().decode_jpeg_header(data)
        except ValueError as error:
            raise _broken(error) from error
        if colours == "CMYK":
            return None
        return height, width, 3 if self.mode == "RGB" else 1

    def _picture(self, data: bytes) -> torch.Tensor:
        shape = self._shape(data)
        if shape is None:
            return torch.from_numpy(_decode_other(data, self.mode))
        pixels = np.empty(shape, dtype=np.uint8)
        _decode_jpeg(data, self.mode, pixels)
        return torch.from_numpy(pixels)


def decode_images(column: str, *, mode: Mode = "RGB") -> DecodeImages:
    """A ``transform=`` for loaders that decodes the JPEG, PNG, WebP, … files in *column*.

        forebay.DataLoader(dataset, transform=forebay.decode_images("image"), ...)

    Pictures come as uint8 tensors ``(height, width, 3)``, or 1 with mode "GRAY"; as one tensor
    ``(rows, height, width, 3)`` if all of the batch have the same size, else as a list. JPEG files
    are decoded by ``simplejpeg`` (libjpeg-turbo), which lets other threads run meanwhile, straight
    into the batch; others by Pillow: ``pip install forebay[images]``. A file that cannot be
    decoded raises IntegrityError.
    """
    return DecodeImages(column, mode)


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(data: bytes, mode: Mode, out: NDArray[np.uint8]) -> None:
    try:
        _simplejpeg().decode_jpeg(data, colorspace=mode, buffer=out)
    except ValueError as error:
        raise _broken(error) from error


def _decode_other(data: bytes, mode: Mode) -> NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise InvalidRequest(
            "decoding pictures needs simplejpeg and Pillow: pip install forebay[images]"
        ) from error
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.array(picture.convert("RGB" if mode == "RGB" else "L"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise _broken(error) from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _broken(error: Exception) -> ForebayError:
    return IntegrityError(f"a picture cannot be decoded: {error}; write the sample again")
