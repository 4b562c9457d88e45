"""Objects as files of a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from forebay_server.tier.medium import open_medium
from forebay_server.tier.place import UNFINISHED_FOLDER, Place
from forebay_server.tier.publication import DescriptorReader, PublicationFolder, allocated_bytes
from forebay_server.tier.space import Device, SpaceLedger, device_of, free_in_folder
from forebay_server.tier.store import FileInfo, TierReader, TierWriter, from_os_error
from forebay_wire.errors import NotFound


class FolderPlace(Place):
    """A directory, on a disk or mounted from elsewhere. Thread-safe."""

    def __init__(self, root: Path, where: str) -> None:
        self._root = root
        self._where = where
        self._publication = PublicationFolder(root, root / UNFINISHED_FOLDER, where)

    def connect(self) -> None:
        """A directory is found when it is used."""

    def has_any(self, prefix: str) -> bool:
        try:
            return bool(os.listdir(self._root / prefix))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_os_error(error, f"listing {prefix}", self._where) from error

    def open(self) -> None:
        self._publication.open()

    def close(self) -> None:
        """Nothing is held."""

    def create(self, name: str, expected_bytes: int, ledger: SpaceLedger) -> TierWriter:
        return self._publication.create(self._root / name, name, expected_bytes, ledger)

    def read(self, name: str, where: str) -> TierReader:
        try:
            return DescriptorReader.open(self._root / name, where)
        except NotFound:
            self._publication.check_present()
            raise

    def read_medium(self, name: str, where: str) -> TierReader:
        try:
            return open_medium(self._root / name, where)
        except NotFound:
            self._publication.check_present()
            raise

    def head(self, name: str) -> int | None:
        try:
            return os.stat(self._root / name).st_size
        except FileNotFoundError:
            self._publication.check_present()
            return None
        except OSError as error:
            raise from_os_error(error, f"looking up file {name}", self._where) from error

    def delete(self, name: str) -> int | None:
        path = self._root / name
        try:
            num_bytes = allocated_bytes(os.stat(path))
            path.unlink()
        except FileNotFoundError:
            self._publication.check_present()
            return None
        except OSError as error:
            raise from_os_error(error, f"deleting file {name}", self._where) from error
        return num_bytes

    def list(self, prefix: str) -> Iterator[FileInfo]:
        folder = self._root / prefix.rpartition("/")[0]
        if not folder.is_dir():
            self._publication.check_present()
        try:
            for top, folders, files in os.walk(folder, onerror=_raise_unless_missing):
                if Path(top) == self._root and UNFINISHED_FOLDER in folders:
                    folders.remove(UNFINISHED_FOLDER)
                yield from self._named(Path(top), files, prefix)
        except OSError as error:
            raise from_os_error(error, "listing files", self._where) from error

    def sweep(self) -> None:
        """What lies in ``tmp`` has locks, and opening sweeps it: its age says nothing."""

    def held_bytes(self, info: FileInfo) -> int:
        try:
            return allocated_bytes(os.stat(self._root / info.name))
        except FileNotFoundError:
            return 0

    def free_bytes(self) -> int:
        return free_in_folder(self._root)

    def device(self) -> Device:
        return device_of(self._root)

    def _named(self, folder: Path, files: Sequence[str], prefix: str) -> Iterator[FileInfo]:
        for file in files:
            path = folder / file
            name = path.relative_to(self._root).as_posix()
            if not name.startswith(prefix):
                continue
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # deleted meanwhile
            yield FileInfo(name, found.st_size, found.st_mtime)


def _raise_unless_missing(error: OSError) -> None:
    """A folder that is not there has no files; one that cannot be read may have some."""
    if not isinstance(error, FileNotFoundError):
        raise error
