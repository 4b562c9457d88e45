"""Where the object tier's objects lie: what a directory and a store both do for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

from forebay_server.tier.space import Device, SpaceLedger
from forebay_server.tier.store import FileInfo, TierReader, TierWriter

UNFINISHED_FOLDER: Final = "tmp"
"""Of a directory: files that are being written. No object's name may start so."""


class Place(ABC):
    """Thread-safe. Names are checked already; errors are those that :class:`Tier` promises."""

    @abstractmethod
    def connect(self) -> None:
        """Find the place, and change nothing in it."""

    @abstractmethod
    def has_any(self, prefix: str) -> bool:
        """Whether there is an object below the folder *prefix*."""

    @abstractmethod
    def open(self) -> None:
        """Make or check the place, and sweep it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Idempotent."""

    @abstractmethod
    def create(self, name: str, expected_bytes: int, ledger: SpaceLedger) -> TierWriter:
        """A writer, with its room reserved in *ledger*."""

    @abstractmethod
    def read(self, name: str, where: str) -> TierReader:
        """A reader; *where* names the file in messages."""

    def read_whole(self, name: str, where: str, num_bytes: int) -> TierReader:
        """:meth:`read`, of a file of up to *num_bytes* that is read whole next."""
        return self.read(name, where)

    def read_medium(self, name: str, where: str) -> TierReader:
        """:meth:`read`, around the caches of this machine where there are any."""
        return self.read(name, where)

    @abstractmethod
    def head(self, name: str) -> int | None:
        """Size in bytes; :class:`StorageError` instead of None where the whole place is away."""

    @abstractmethod
    def delete(self, name: str) -> int | None:
        """Bytes that were freed, None if there was nothing."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[FileInfo]:
        """The published objects whose names start with *prefix*."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what writers that died long ago left unfinished."""

    @abstractmethod
    def held_bytes(self, info: FileInfo) -> int:
        """What an object takes there."""

    @abstractmethod
    def free_bytes(self) -> int:
        """What the place has left."""

    def device(self) -> Device | None:
        """The file system whose room it shares with others; None: it shares none."""
        return None
