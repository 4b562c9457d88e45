"""The seal of a closed SQLite file: its digest, in a small file beside it while nobody uses it.

A large file that still has its seal opens fast: one digest proves it. Without one it is checked by
its contents (``sqlite.check``). The seal is broken before the first change.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from blake3 import blake3

SUFFIX: Final = "-seal"


def seal_path(path: Path) -> Path:
    """Where the seal of the catalog *path* lies."""
    return path.with_name(path.name + SUFFIX)


def put_seal(path: Path) -> None:
    """Seal the file *path*, which nobody writes any more; durable on return."""
    target = seal_path(path)
    part = target.with_name(target.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, json.dumps(_seal_of(path)).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    part.replace(target)
    sync_folder(path.parent)


def is_sealed(path: Path) -> bool:
    """Whether *path* is, bit for bit, what was sealed.

    If not, it may be damaged, or somebody put another file there: its contents have to tell.
    """
    try:
        wanted = json.loads(seal_path(path).read_bytes())
        return bool(wanted == _seal_of(path))
    except (FileNotFoundError, ValueError):
        return False


def break_seal(path: Path) -> None:
    """Remove the seal, durably: the file is about to change."""
    with suppress(FileNotFoundError):
        seal_path(path).unlink()
        sync_folder(path.parent)


def _seal_of(path: Path) -> dict[str, object]:
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return {"bytes": path.stat().st_size, "blake3": hasher.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
