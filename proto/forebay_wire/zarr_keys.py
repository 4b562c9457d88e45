"""Which files below a folder are those of a zarr store, by their names: of both of its formats.

https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html#stores
"""

from __future__ import annotations

import re
from typing import Final

METADATA_NAMES: Final = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
"""JSON objects."""

ARRAY_NAMES: Final = ("zarr.json", ".zarray")
"""One of which lies in the folder of an array."""

_CHUNK: Final = re.compile(r"(?:^|/)(?:c(?:[/.]\d+)*|\d+(?:[/.]\d+)*)$")


def is_metadata(path: str) -> bool:
    """Whether *path* is that of a description of a group or an array."""
    return path.rpartition("/")[2] in METADATA_NAMES


def array_folders(path: str) -> list[str]:
    """Where the array may lie that *path* is a chunk or a shard of, the nearest folder first; empty
    if it looks like none."""
    match = _CHUNK.search(path)
    if match is None:
        return []
    found = []
    folder = path
    while folder and len(folder) > match.start():
        folder = folder.rpartition("/")[0]
        found.append(folder)
    return found


def is_key(path: str) -> bool:
    """Whether *path*, below the root of a store, looks like a key of it."""
    return is_metadata(path) or bool(array_folders(path))
