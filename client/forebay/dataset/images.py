"""Pictures in a column of bytes, decoded on their way to the trainer."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from forebay.dataset.holes import Hole
from forebay.dataset.memory import batch_memory
from forebay.dataset.transforms import Batch, BySample, Rows
from forebay_wire.errors import ForebayError, IntegrityError, InvalidRequest

Mode = Literal["RGB", "GRAY"]

JPEG_MAGIC: Final = b"\xff\xd8\xff"


class DecodeImages(BySample):
    """See :func:`decode_images`. Thread-safe, picklable."""

    def __init__(self, column: str, mode: Mode) -> None:
        super().__init__()
        if mode not in ("RGB", "GRAY"):
            raise InvalidRequest(f'mode={mode!r} is unknown: use "RGB" or "GRAY"')
        self.column = column
        self.mode: Mode = mode

    def __call__(self, batch: Batch) -> Batch:
        """Outside of a loader: what ``_mask`` leaves out is a hole."""
        files = self._files(batch)
        mask = batch.get("_mask")
        present = np.ones(len(files), np.bool_) if mask is None else mask.numpy().astype(np.bool_)
        found = self._decoded(files, present)
        if found.failed:
            position, error = found.failed[0]
            raise self._broken(f"sample {position} of the batch", error) from error
        return {**batch, self.column: found.pictures}

    def apply(
        self, batch: Batch, rows: Rows, present: NDArray[np.bool_], *, masks: bool
    ) -> tuple[Batch, list[Hole]]:
        found = self._decoded(self._files(batch), present)
        if found.failed and not masks:
            position, error = found.failed[0]
            raise self._broken(f"row {rows.ids[position]} of {rows.where}", error) from error
        holes = [
            self._hole(position, rows, f"its picture cannot be decoded: {error}")
            for position, error in found.failed
        ]
        return {**batch, self.column: found.pictures}, holes

    def makes(self, batch: Batch) -> list[str]:
        return [self.column]

    def _files(self, batch: Batch) -> list[bytes | None]:
        if self.column not in batch:
            raise InvalidRequest(
                f"decode_images({self.column!r}): the batch has no such column; it has "
                f"{', '.join(sorted(batch))}"
            )
        values = batch[self.column]
        kind = ""
        if isinstance(values, torch.Tensor):
            kind = f"numbers ({values.dtype})"
        else:
            other = {type(one).__name__ for one in values if not isinstance(one, _FILE)}
            kind = ", ".join(sorted(other))
        if kind:
            raise InvalidRequest(
                f"decode_images({self.column!r}): the column holds {kind}, not files: name the one "
                "of the encoded pictures, as bytes"
            )
        files: list[bytes | None] = values
        return files

    def _decoded(self, files: list[bytes | None], present: NDArray[np.bool_]) -> _Decoded:
        """What *files* show. Of those that are None, *present* ones are missing values."""
        shapes: dict[int, _Shape | None] = {}
        failed: dict[int, IntegrityError] = {}
        for position, data in enumerate(files):
            if data is not None:
                try:
                    shapes[position] = self._shape(data)
                except IntegrityError as error:
                    failed[position] = error
        is_missing = any(
            data is None and there for data, there in zip(files, present.tolist(), strict=True)
        )
        same = set(shapes.values())
        shape = same.pop() if len(same) == 1 and not is_missing else None
        whole = batch_memory.empty((len(files), *shape), np.dtype(np.uint8)) if shape else None
        pictures: dict[int, NDArray[np.uint8]] = {}
        for position, own in shapes.items():
            data = files[position]
            assert data is not None, "it has a shape"
            out = None if whole is None else whole[position]
            try:
                pictures[position] = self._picture(data, own, out)
            except IntegrityError as error:
                failed[position] = error
        in_order = [(position, failed[position]) for position in sorted(failed)]
        if whole is None:
            return _Decoded(_joined(pictures, len(files), is_missing), in_order)
        for position in set(range(len(files))) - set(pictures):
            whole[position] = 0
        return _Decoded(torch.from_numpy(whole), in_order)

    def _shape(self, data: bytes) -> _Shape | None:
        """Of a JPEG file, if it can be decoded by the fast decoder."""
        if data[:3] != JPEG_MAGIC or _simplejpeg() is None:
            return None
        try:
            height, width, colours, _ = _simplejpeg().decode_jpeg_header(data)
        except ValueError as error:
            raise IntegrityError(str(error)) from error
        if colours in ("CMYK", "YCCK"):
            return None
        return height, width, 3 if self.mode == "RGB" else 1

    def _picture(
        self, data: bytes, shape: _Shape | None, out: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """Into *out*, if that is given."""
        if shape is None:
            return _decode_other(data, self.mode)
        pixels = np.empty(shape, dtype=np.uint8) if out is None else out
        _decode_jpeg(data, self.mode, pixels)
        return pixels

    def _broken(self, which: str, error: Exception) -> ForebayError:
        return IntegrityError(
            f"{which}, column {self.column!r}: its picture cannot be decoded: {error}; write the "
            'sample again, or mask it: on_error="mask"'
        )


def decode_images(column: str, *, mode: Mode = "RGB") -> DecodeImages:
    """A ``transform=`` for loaders that decodes the JPEG, PNG, WebP, … files in *column*.

        forebay.DataLoader(dataset, transform=forebay.decode_images("image"), ...)

    Pictures come as uint8 tensors ``(height, width, 3)``, or 1 with mode "GRAY"; as one tensor
    ``(rows, height, width, 3)`` if all of the batch have the same size, else as a list. JPEG files
    are decoded by ``simplejpeg`` (libjpeg-turbo), which lets other threads run meanwhile, straight
    into the batch; others by Pillow: ``pip install forebay[images]``. Of 16 bits a channel the
    upper 8 are taken.

    A file that cannot be decoded raises IntegrityError, or is a hole with ``on_error="mask"``.
    Holes are zeros in a tensor and None in a list. A picture that is missing in the dataset is no
    hole: it is None in a list.
    """
    return DecodeImages(column, mode)


_Shape = tuple[int, int, int]

_FILE: Final = (bytes, bytearray, memoryview, type(None))


class _Decoded(NamedTuple):
    pictures: Any
    """A tensor or a list, as the batch has them."""
    failed: Sequence[tuple[int, IntegrityError]]
    """Position and reason, in order."""


def _joined(pictures: dict[int, NDArray[np.uint8]], count: int, is_missing: bool) -> Any:
    """One tensor of *pictures* at their places, if they are of one size and none *is_missing*."""
    shapes = {one.shape for one in pictures.values()}
    if len(shapes) != 1 or is_missing:
        return [
            torch.from_numpy(pictures[place]) if place in pictures else None
            for place in range(count)
        ]
    whole = batch_memory.empty((count, *shapes.pop()), np.dtype(np.uint8))
    for place in range(count):
        whole[place] = pictures.get(place, 0)
    return torch.from_numpy(whole)


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
        raise IntegrityError(str(error)) from error


def _decode_other(data: bytes, mode: Mode) -> NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as error:
        raise InvalidRequest(
            "decoding pictures needs simplejpeg and Pillow: pip install forebay[images]"
        ) from error
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = _pixels(picture, "RGB" if mode == "RGB" else "L")
    except (IntegrityError, MemoryError):
        raise
    except Exception as error:  # each of Pillow's formats has its own ones
        raise IntegrityError(f"{type(error).__name__}: {error}") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _pixels(picture: Any, mode: str) -> NDArray[np.uint8]:
    """Of 8 bits; Pillow's `convert` clips larger ones."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        grey = (np.array(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2) if mode == "RGB" else grey
    if picture.mode in ("I", "F"):
        raise IntegrityError(
            f"it has pixels of 32 bits (Pillow's mode {picture.mode!r}), of which nobody says what "
            "is white: store it with 8 or 16 bits, or as an array"
        )
    return np.array(picture.convert(mode))
