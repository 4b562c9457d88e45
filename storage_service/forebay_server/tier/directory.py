"""A tier that is a folder on a local disk: ``ssd`` and ``hdd``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from forebay_server.tier.publication import (
    DescriptorReader,
    PublicationFolder,
    PublicationWriter,
    allocated_bytes,
    fsync_folder,
    make_folders,
)
from forebay_server.tier.space import SpaceLedger, free_in_folder
from forebay_server.tier.store import FileInfo, Tier, TierReader, TierSpace, from_os_error
from forebay_wire.errors import InvalidRequest, NotFound, StorageError
from forebay_wire.ids import check_random_name, new_random_name
from forebay_wire.limits import GIB

VOLUME_FILE: Final = "volume.json"
FILES_FOLDER: Final = "files"
UNFINISHED_FOLDER: Final = "tmp"
OWN_NAMES: Final = frozenset({FILES_FOLDER, UNFINISHED_FOLDER, "lost+found"})
"""What may lie in a new volume: what we make, and what mkfs makes."""
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
    ) -> None:
        """*limit_bytes* 0: as much as the device has; *reserve_bytes* stay free on it."""
        self.name = name
        self.kind = kind
        self.location = str(folder)
        self._folder = Path(folder)
        self._files = self._folder / FILES_FOLDER
        self._where = f"tier {name} at {folder}"
        self._ledger = SpaceLedger(
            self._where, limit_bytes, reserve_bytes, lambda: free_in_folder(self._folder)
        )
        self._publication = PublicationFolder(
            self._files, self._folder / UNFINISHED_FOLDER, self._where
        )

    def open(self) -> None:
        try:
            make_folders(self._folder)
            self._check_volume()
        except OSError as error:
            raise from_os_error(error, "opening the volume", self._where) from error
        self._publication.open()
        self._count()

    def close(self) -> None:
        """Nothing is held between calls."""

    def create(self, name: str, expected_bytes: int) -> PublicationWriter:
        return self._publication.create(self._path(name), name, expected_bytes, self._ledger)

    def read(self, name: str) -> TierReader:
        try:
            return DescriptorReader.open(self._path(name), f"tier {self.name}, file {name}")
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

    def _check_present(self) -> None:
        """Raise :class:`StorageError` where the whole volume is away: no file of it is gone."""
        self._publication.check_present()
        if not (self._folder / VOLUME_FILE).exists():
            raise StorageError(
                f"{self._where} is away: it has no {VOLUME_FILE}; is the disk mounted? Nothing in "
                "it is given up"
            )

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

    def _check_volume(self) -> None:
        """Refuse a folder that is another tier's; write the volume file of a new one."""
        path = self._folder / VOLUME_FILE
        try:
            volume = json.loads(path.read_text())
            tier = volume["tier"]
        except FileNotFoundError:
            self._make_volume(path)
            return
        except (ValueError, KeyError, TypeError):
            raise InvalidRequest(
                f"{path} is no volume file of Forebay: give tier {self.name} another folder, or "
                "remove the file if all that lies beside it is this tier's"
            ) from None
        if tier != self.name:
            raise InvalidRequest(
                f"{self._folder} is a volume of tier {tier}, not of tier {self.name}: "
                "correct the folder in the configuration"
            )

    def _make_volume(self, path: Path) -> None:
        strangers = [
            entry.name
            for entry in os.scandir(self._folder)
            if entry.name not in OWN_NAMES and not entry.name.startswith(f"{VOLUME_FILE}.")
        ]
        if strangers:
            raise InvalidRequest(
                f"{self._folder} is no volume of tier {self.name} and holds {strangers[0]!r}: "
                "give the tier a folder of its own"
            )
        unfinished = path.with_name(f"{VOLUME_FILE}.{new_random_name()}")
        with unfinished.open("w") as file:
            json.dump({"volume": new_random_name(), "tier": self.name}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
        fsync_folder(self._folder)
        fsync_folder(self._folder.parent)
