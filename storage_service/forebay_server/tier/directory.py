"""A tier that is a folder on a local disk: ``ssd`` and ``hdd``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from forebay_server.tier.medium import open_medium
from forebay_server.tier.publication import (
    DescriptorReader,
    PublicationFolder,
    PublicationWriter,
    allocated_bytes,
    away,
    make_folders,
)
from forebay_server.tier.space import SpaceLedger, device_of, free_in_folder
from forebay_server.tier.store import (
    FileInfo,
    RoomPromise,
    Tier,
    TierReader,
    TierSpace,
    from_os_error,
)
from forebay_server.tier.volume import VOLUME_FILE, Volume
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.ids import check_random_name
from forebay_wire.limits import GIB

FILES_FOLDER: Final = "files"
UNFINISHED_FOLDER: Final = "tmp"
OWN_NAMES: Final = frozenset({FILES_FOLDER, UNFINISHED_FOLDER, "lost+found"})
"""What may lie in a new volume beside the volume's own: what we make, and what mkfs makes."""
DEFAULT_RESERVE_BYTES: Final = 1 * GIB
"""Kept free on the device for the catalog and everybody else."""


class DirectoryTier(Tier):
    """Files under random names in ``files/<first two digits>/``. Thread-safe.

    Publishing follows ``docs/data-path.md``: unfinished file, allocation, direct writes, fsync,
    link under the final name (create-only), unlink, fsync of the folder.
    """

    kind: Literal["ssd", "hdd"]

    def __init__(
        self,
        name: str,
        kind: Literal["ssd", "hdd"],
        folder: str | os.PathLike[str],
        *,
        limit_bytes: int = 0,
        reserve_bytes: int = DEFAULT_RESERVE_BYTES,
        node: str = "",
    ) -> None:
        """*limit_bytes* 0: as much as the device has; *reserve_bytes* stay free on it. The volume
        belongs to *node*, if one is given."""
        self.name = name
        self.kind = kind
        self.location = str(folder)
        self._folder = Path(folder)
        self._files = self._folder / FILES_FOLDER
        self._where = f"tier {name} at {folder}"
        self._ledger = SpaceLedger(
            self._where, limit_bytes, reserve_bytes, lambda: free_in_folder(self._folder)
        )
        self._volume = Volume(self._folder, name, node, OWN_NAMES)
        self._publication = PublicationFolder(
            self._files, self._folder / UNFINISHED_FOLDER, self._where
        )

    def open(self) -> None:
        try:
            make_folders(self._folder)
            self._check_limit()
            self._volume.open()
            self._ledger.join(device_of(self._folder))
        except OSError as error:
            raise from_os_error(error, "opening the volume", self._where) from error
        try:
            self._publication.open()
            self._count()
        except BaseException:
            self._volume.close()
            raise

    def _check_limit(self) -> None:
        """Refuse a limit that could never be what ends the room: somebody meant another disk."""
        device = os.statvfs(self._folder)
        device_bytes = device.f_blocks * device.f_frsize
        if device_bytes and self._ledger.limit_bytes > device_bytes:
            raise InvalidRequest(
                f"{self._where} is to hold {self._ledger.limit_bytes} bytes, its disk has "
                f"{device_bytes} in all: is it mounted? Lower {self.name}-bytes, or leave it out "
                "to use what the disk has"
            )

    def close(self) -> None:
        self._volume.close()

    def create(self, name: str, expected_bytes: int) -> PublicationWriter:
        return self._publication.create(self._path(name), name, expected_bytes, self._ledger)

    def read(self, name: str) -> TierReader:
        try:
            return DescriptorReader.open(self._path(name), f"tier {self.name}, file {name}")
        except NotFound:
            self._check_present()
            raise

    def read_medium(self, name: str) -> TierReader:
        try:
            return open_medium(self._path(name), f"tier {self.name}, file {name}")
        except NotFound:
            self._check_present()
            raise

    def head(self, name: str) -> int | None:
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            self._check_present()
            return None
        except OSError as error:
            raise from_os_error(error, f"looking up file {name}", self._where) from error

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            num_bytes = allocated_bytes(path.stat())
            path.unlink()
        except FileNotFoundError:
            self._check_present()
            return
        except OSError as error:
            raise from_os_error(error, f"deleting file {name}", self._where) from error
        self._ledger.freed(num_bytes)

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        for entry in self._entries(prefix[:2]):
            if entry.name.startswith(prefix):
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue
                yield FileInfo(entry.name, found.st_size, found.st_mtime)

    def space(self) -> TierSpace:
        return self._ledger.space()

    def reserve(self, num_bytes: int) -> RoomPromise:
        return self._ledger.reserve(num_bytes)

    def _check_present(self) -> None:
        """Raise :class:`StorageError` where the whole volume is away: no file of it is gone."""
        self._publication.check_present()
        if not self._volume.is_there():
            raise away(self._where, f"it has no {VOLUME_FILE}")

    def _path(self, name: str) -> Path:
        return self._files / check_random_name("file", name)[:2] / name

    def _entries(self, folder_prefix: str) -> Iterator[os.DirEntry[str]]:
        try:
            folders = [
                entry.path
                for entry in os.scandir(self._files)
                if entry.name.startswith(folder_prefix) and entry.is_dir()
            ]
            for folder in folders:
                yield from os.scandir(folder)
        except OSError as error:
            raise from_os_error(error, "listing files", self._where) from error

    def _count(self) -> None:
        used_bytes = num_files = 0
        for entry in self._entries(""):
            try:
                used_bytes += allocated_bytes(entry.stat())
            except FileNotFoundError:
                continue
            num_files += 1
        self._ledger.reset(used_bytes, num_files)
