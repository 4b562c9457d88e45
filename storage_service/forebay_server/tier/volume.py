"""The folder of a local tier: one tier's, one node's, and open in one daemon at a time."""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from forebay_server.tier.publication import FILE_MODE, fsync_folder
from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import new_random_name

VOLUME_FILE: Final = "volume.json"
LOCK_FILE: Final = "lock"

LOCK_PATIENCE_SECONDS: Final = 1.0
"""The kernel closes a killed daemon's files one by one: the next one may come in between."""


class Volume:
    """Thread-safe as far as a tier is: ``open`` and ``close`` by one thread at a time."""

    def __init__(self, folder: Path, tier: str, node: str, own_names: frozenset[str]) -> None:
        """*own_names*: what may lie in a folder that becomes a volume; *node* "": any node's."""
        self._folder = folder
        self._path = folder / VOLUME_FILE
        self._tier = tier
        self._node = node
        self._own_names = own_names | {LOCK_FILE}
        self._descriptor = -1

    def open(self) -> None:
        """Lock the folder; make it a volume if it is empty, else check whose it is. Idempotent.

        :class:`InvalidRequest` if it is in use, another tier's, another node's, or no volume and
        not empty; OSError. A refused folder stays as it is.
        """
        if self._descriptor >= 0:
            return
        self._read_or_refuse()
        # Not for writing: a file open for that keeps the volume from being remounted read-only.
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._folder / LOCK_FILE, flags, FILE_MODE)
        try:
            self._take(descriptor)
            found = self._read_or_refuse()  # by whoever was here in between
            if found is None or (self._node and "node" not in found):
                self._write(found or {})
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def close(self) -> None:
        """Let others have the folder. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_there(self) -> bool:
        """Whether the folder is where it was: not on a disk that is not mounted."""
        return self._path.exists()

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > deadline:
                raise InvalidRequest(
                    f"{self._folder} is in use as tier {self._tier} of another daemon: give each "
                    f"data folder a folder of its own ({self._tier}-path), or stop the other one"
                )
            time.sleep(0.02)

    def _read_or_refuse(self) -> dict[str, Any] | None:
        """What the volume file says; None in a folder that may become a volume."""
        try:
            found = json.loads(self._path.read_text())
            tier, node = found["tier"], found.get("node", "")
        except FileNotFoundError:
            self._refuse_strangers()
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidRequest(
                f"{self._path} is no volume file of Forebay: give tier {self._tier} another "
                "folder, or remove the file if all that lies beside it is this tier's"
            ) from None
        if tier != self._tier:
            raise InvalidRequest(
                f"{self._folder} is a volume of tier {tier}, not of tier {self._tier}: "
                "correct the folder in the configuration"
            )
        if node and self._node and node != self._node:
            raise InvalidRequest(
                f"{self._folder} is the {tier} volume of node {node}, this is node {self._node}: "
                f"its files are those of another data folder. Give tier {tier} a folder of its own "
                f"({tier}-path), or empty this one if that data folder is given up"
            )
        return dict(found)

    def _refuse_strangers(self) -> None:
        strangers = [
            entry.name
            for entry in os.scandir(self._folder)
            if entry.name not in self._own_names and not entry.name.startswith(f"{VOLUME_FILE}.")
        ]
        if strangers:
            raise InvalidRequest(
                f"{self._folder} is no volume of tier {self._tier} and holds {strangers[0]!r}: "
                "give the tier a folder of its own"
            )

    def _write(self, found: dict[str, Any]) -> None:
        """Write the volume file, whole or not at all and durably; the lock is held."""
        content = {"volume": new_random_name(), "tier": self._tier, **found}
        if self._node:
            content["node"] = self._node
        unfinished = self._path.with_name(f"{VOLUME_FILE}.{new_random_name()}")
        with unfinished.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._path)
        fsync_folder(self._folder)
        fsync_folder(self._folder.parent)
