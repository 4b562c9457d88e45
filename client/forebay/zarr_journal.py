"""What was set and deleted in a layer of a session, so that a power cut takes no value unseen.

A line of JSON for each step, appended and synced before a change returns: [key, value, is done, is
below], where the value is its XXH3-64, or "" of a deletion. What a change is about to do comes
first, as one may be cut off in its midst: then either value counts, that of before or its own.
Lines that are cut short, of changes that never returned, are passed over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from forebay.publish_file import sync_folder

NAME: Final = "journal"

ABSENT: Final = ""


class Journal:
    """Of one layer, open. For one thread; many processes may have it open."""

    def __init__(self, layer: Path) -> None:
        """FileNotFoundError if the layer was dropped."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(layer / NAME, flags)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else changes the layer. Let go by name: children of a fork inherit it."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextmanager
    def change(self, key: str, value: str, is_below: bool = False) -> Iterator[None]:
        """Around what gives *key* this *value*: durable on return, or named when it is lost."""
        with self.alone():
            self._append(key, value, False, is_below)
            yield
            self._append(key, value, True, is_below)
        getattr(os, "fdatasync", os.fsync)(self._file)  # macOS has none

    def _append(self, *record: str | bool) -> None:
        line = b"\n" + json.dumps(record).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), NAME)

    def allowed(self) -> dict[str, tuple[set[str], bool]]:
        """By key which values it may have, and whether a deletion has to hide one below."""
        found: dict[str, tuple[set[str], bool]] = {}
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                try:
                    key, value, is_done, is_below = json.loads(line)
                except ValueError:
                    continue
                if is_done:
                    found[key] = {value}, is_below
                else:
                    found.setdefault(key, ({ABSENT}, False))[0].add(value)
        return found


def make_layer(layer: Path) -> None:
    """With an empty journal, on disk on return."""
    layer.mkdir(parents=True)
    (layer / NAME).touch()
    for folder in (layer, layer.parent, layer.parent.parent):
        sync_folder(folder)
