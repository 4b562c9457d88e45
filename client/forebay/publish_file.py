"""A file that is there as a whole, durably, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from forebay_wire.ids import new_random_name


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Inside, a new file to write; at the end it is *path*, durable. After an error, or a kill,
    *path* is as before; a killed process may leave ``.NAME.*.partial`` beside it.

    A file that is there is replaced.
    """
    partial = path.with_name(f".{path.name}.{new_random_name()[:8]}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
