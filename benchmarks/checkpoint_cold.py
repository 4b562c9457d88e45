"""Files that the page cache has nothing of."""

from __future__ import annotations

import os
from pathlib import Path


def drop_cached(folder: Path) -> None:
    """Have nothing of the files of *folder* in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
