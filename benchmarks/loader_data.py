"""What the loaders' benchmark reads: the same samples for every contender, made from a seed.

Needs numpy and simplejpeg alone, so that it works in the environment of the peers too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

TENSOR_BYTES = 3072
NUM_TOKENS = 2048
JPEG_SHAPE = (400, 500, 3)
BATCH = 256

Sample = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A bucket of an S3 server."""

    endpoint: str
    key: str
    secret: str
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """For clients that get no options."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }


@dataclass(frozen=True)
class Case:
    """One kind of data."""

    name: str
    num_samples: int
    column: str
    """Beside ``y``, the number of the sample."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def cases(*, quick: bool) -> dict[str, Case]:
    """By name. Peers get fewer of the same tensors, since they need a second for 20,000; a quick
    run has fewer of all but the tokens that are compared with a copy: fewer would lie in the
    processor's cache, which no data set does."""
    made = (
        Case("tensor3k", 16_384 if quick else 131_072, "x", (TENSOR_BYTES,), "uint8"),
        Case("peers3k", 6_144 if quick else 32_768, "x", (TENSOR_BYTES,), "uint8"),
        Case("tokens", 16_384, "tokens", (NUM_TOKENS,), "int32"),
        Case("peers8k", 4_096 if quick else 16_384, "tokens", (NUM_TOKENS,), "int32"),
        Case("jpeg115k", 512 if quick else 1_024, "jpeg", JPEG_SHAPE, "uint8"),
    )
    return {case.name: case for case in made}


def samples(case: Case) -> Iterator[Sample]:
    """All samples of *case*, in order: tensors, tokens, or JPEG files."""
    rng = np.random.default_rng(7)
    if case.name == "jpeg115k":
        files = list(_jpegs(rng))
        for number in range(case.num_samples):
            yield {case.column: files[number % len(files)], "y": number}
        return
    most = 100 if case.dtype == "uint8" else 50_000
    for number in range(case.num_samples):
        row = rng.integers(0, most, case.shape, dtype=case.dtype)
        yield {case.column: row, "y": number}


def _jpegs(rng: np.random.Generator, count: int = 8) -> Iterator[bytes]:
    """Noisy colour gradients of 500 x 400, each 105 to 125 KB."""
    import simplejpeg

    height, width, _ = JPEG_SHAPE
    down = np.linspace(0, 1, height)[:, None, None]
    across = np.linspace(0, 1, width)[None, :, None]
    for _ in range(count):
        colours = rng.uniform(40, 215, (3, 3))
        picture = colours[0] + (colours[1] - colours[0]) * down + (colours[2] - 128) * across
        noise = rng.integers(-25, 26, JPEG_SHAPE, dtype=np.int8)
        pixels = np.clip(picture + noise, 0, 255).astype(np.uint8)
        yield simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=84)


def decode(data: bytes) -> np.ndarray:
    """The pixels of a JPEG file: by the same decoder for all, which frees the interpreter."""
    import simplejpeg

    pixels: np.ndarray = simplejpeg.decode_jpeg(data)
    return pixels
