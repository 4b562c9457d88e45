"""The ``object`` tier: whole objects in any fsspec file system that can create exclusively."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from forebay_server.tier.publication import (
    DescriptorReader,
    PublicationFolder,
    allocated_bytes,
)
from forebay_server.tier.space import UNBOUNDED, Reservation, SpaceLedger, free_in_folder
from forebay_server.tier.store import (
    NO_SPACE,
    FileInfo,
    Tier,
    TierReader,
    TierSpace,
    TierWriter,
    from_os_error,
)
from forebay_wire.errors import (
    AlreadyExists,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    StorageError,
)
from forebay_wire.ids import new_random_name
from forebay_wire.limits import GIB, check_limit

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

DATA_FOLDER: Final = "data"
"""Blob files lie at ``data/<file>``."""
UNFINISHED_FOLDER: Final = "tmp"
"""Of a directory: files that are being written. No object's name may start so."""
MAX_OBJECT_BYTES: Final = 1 * GIB
"""Largest object where it has to be sent in one call; directories have no such limit."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*\Z")
_CREDENTIALS: Final = re.compile(r"//[^/@]*@")


class RemoteTier(Tier):
    """Objects below one URL, published whole and create-only. Thread-safe.

    A directory (``file://``) publishes like the local tiers: fsspec's local file system would write
    the final name in place, without fsync. Others create exclusively in one call; one that cannot
    is refused by ``open``. Listings are never cached.
    """

    kind: Literal["object"]

    def __init__(
        self,
        name: str,
        url: str,
        *,
        limit_bytes: int = 0,
        reserve_bytes: int = 0,
        options: dict[str, Any] | None = None,
        must_have: str = "",
    ) -> None:
        """*options* go to the fsspec file system; *reserve_bytes* stay free where *url* is a
        directory. With *must_have*, a prefix like ``manifests/``: ``open`` makes nothing in a place
        without such objects and raises :class:`NotFound`."""
        self.name = name
        self.kind = "object"
        self.location = _CREDENTIALS.sub("//", url)
        self._url = url
        self._options = options or {}
        self._must_have = must_have
        self._where = f"tier {name} at {self.location}"
        self._ledger = SpaceLedger(self._where, limit_bytes, reserve_bytes, self._measure)
        self._file_system: Any = None
        self._root = ""
        self._publication: PublicationFolder | None = None

    def blob_name(self, file: str) -> str:
        return f"{DATA_FOLDER}/{file}"

    def open(self) -> None:
        try:
            # An own instance without a listing cache: others' caches must not answer for us.
            self._file_system, root = fsspec.core.url_to_fs(
                self._url, use_listings_cache=False, skip_instance_cache=True, **self._options
            )
        except (ValueError, ImportError, TypeError) as error:
            raise InvalidRequest(
                f"object URL {self.location} cannot be opened: {error}; use a URL that fsspec "
                "knows, like file:///some/folder, and install what it needs"
            ) from error
        self._root = root.rstrip("/")
        if self._must_have:
            self._check_not_empty()
        if isinstance(self._file_system, LocalFileSystem):
            folder = Path(self._root)
            self._publication = PublicationFolder(folder, folder / UNFINISHED_FOLDER, self._where)
            self._publication.open()
        else:
            with self._translated("checking that objects can be created exclusively"):
                self._check_exclusive()
        held = [self._held_bytes(info) for info in self.list()]
        self._ledger.reset(sum(held), len(held))

    def close(self) -> None:
        self._file_system = None

    def create(self, name: str, expected_bytes: int) -> TierWriter:
        path = self._path(name)
        if self._publication is not None:
            return self._publication.create(Path(path), name, expected_bytes, self._ledger)
        check_limit(
            f"bytes of object {name}",
            expected_bytes,
            MAX_OBJECT_BYTES,
            "write smaller blobs, or use a directory as the object tier",
        )
        return _ObjectWriter(self, path, name, self._ledger.reserve(expected_bytes))

    def read(self, name: str) -> TierReader:
        path, where = self._path(name), f"tier {self.name}, file {name}"
        if self._publication is not None:
            try:
                return DescriptorReader.open(Path(path), where)
            except NotFound:
                self._publication.check_present()
                raise
        with self._translated(f"opening file {name}"):
            return _ObjectReader(self, path, self._file_system.info(path)["size"], where)

    def head(self, name: str) -> int | None:
        try:
            with self._translated(f"looking up file {name}"):
                return int(self._file_system.info(self._path(name))["size"])
        except NotFound:
            self._check_present()
            return None

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            with self._translated(f"deleting file {name}"):
                if self._publication is not None:
                    num_bytes = allocated_bytes(os.stat(path))
                else:
                    num_bytes = self._file_system.info(path)["size"]
                self._file_system.rm_file(path)
        except NotFound:
            self._check_present()
            return
        self._ledger.freed(num_bytes)

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        folder = prefix.rpartition("/")[0]
        top = f"{self._root}/{folder}" if folder else self._root
        with self._translated("listing files"):
            found = self._file_system.find(top, detail=True)
        for path, entry in found.items():
            name = path.removeprefix(self._root).lstrip("/")
            if not name.startswith(prefix) or name.startswith(f"{UNFINISHED_FOLDER}/"):
                continue
            yield FileInfo(name, int(entry["size"]), _modified(entry))

    def space(self) -> TierSpace:
        return self._ledger.space()

    def _path(self, name: str) -> str:
        if not _NAME.match(name) or name.startswith(f"{UNFINISHED_FOLDER}/"):
            raise InvalidRequest(
                f"object name {name!r} is not allowed: use letters, digits, '.', '_', '-' and '/', "
                f"each part starting with a letter or digit, and not {UNFINISHED_FOLDER}/"
            )
        return f"{self._root}/{name}"

    def _check_present(self) -> None:
        """Raise :class:`StorageError` where the whole folder is away: no object of it is gone."""
        if self._publication is not None:
            self._publication.check_present()

    def _measure(self) -> int:
        return UNBOUNDED if self._publication is None else free_in_folder(self._root)

    def _held_bytes(self, info: FileInfo) -> int:
        """What a listed object takes: of a store nobody knows more than its size."""
        if self._publication is None:
            return info.size_bytes
        try:
            return allocated_bytes(os.stat(self._path(info.name)))
        except FileNotFoundError:
            return 0

    def _check_not_empty(self) -> None:
        folder = f"{self._root}/{self._must_have.rstrip('/')}"
        try:
            if isinstance(self._file_system, LocalFileSystem):
                is_there = bool(os.listdir(folder))  # fsspec's would hide why not
            else:
                is_there = next(self.list(self._must_have), None) is not None
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            raise from_os_error(error, f"listing {self._must_have}", self._where) from error
        if not is_there:
            raise NotFound(
                f"{self._where} holds no {self._must_have}: is the URL right? Nothing was made"
            )

    def _check_exclusive(self) -> None:
        """Create an object twice: the second time has to fail.

        The default of fsspec only looks whether the name is free, and then writes: another daemon
        may do the same meanwhile.
        """
        files = self._file_system
        own = type(files)
        default = fsspec.AbstractFileSystem.pipe_file
        exclusive = own.pipe_file is not default or hasattr(own, "_pipe_file")
        if exclusive:
            probe = self._path(f"probe-{new_random_name()}")
            try:
                files.pipe_file(probe, b"probe", mode="create")
                exclusive = self._is_refused(probe)
                files.rm_file(probe)
            except NotImplementedError:
                exclusive = False
        if not exclusive:
            raise InvalidRequest(
                f"{self._where} cannot be the object tier: the file system of its URL cannot "
                "create an object only if it does not exist; use file:///some/folder"
            )

    def _is_refused(self, path: str) -> bool:
        try:
            self._file_system.pipe_file(path, b"again", mode="create")
        except FileExistsError:
            return True
        return False

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Our errors for those of the file system, each of which has its own."""
        try:
            yield
        except ForebayError:
            raise
        except FileNotFoundError:
            raise NotFound(f"there is no such file ({self._where}, {doing})") from None
        except Exception as error:
            is_local = self._publication is not None
            if isinstance(error, OSError) and (is_local or error.errno in NO_SPACE):
                raise from_os_error(error, doing, self._where) from error
            raise StorageError(
                f"{self._where} failed {doing}: {type(error).__name__}: {error}; check that its "
                "URL, credentials and network are right"
            ) from error


class _ObjectWriter(TierWriter):
    """Collects one object in memory and sends it whole."""

    def __init__(self, tier: RemoteTier, path: str, name: str, reservation: Reservation) -> None:
        self.num_bytes = 0
        self._tier = tier
        self._path = path
        self._name = name
        self._reservation: Reservation | None = reservation
        self._data = bytearray()

    def write(self, buffer: ReadableBuffer) -> None:
        reservation = self._check_open()
        view = memoryview(buffer).cast("B")
        total = self.num_bytes + view.nbytes
        advice = "write smaller blobs, or use a directory as the object tier"
        check_limit(f"bytes of object {self._name}", total, MAX_OBJECT_BYTES, advice)
        if total > reservation.num_bytes:
            reservation.grow(total - reservation.num_bytes)
        self._data += view
        self.num_bytes = total

    def publish(self) -> None:
        reservation = self._check_open()
        tier = self._tier
        try:
            with tier._translated(f"publishing file {self._name}"):
                tier._file_system.pipe_file(self._path, bytes(self._data), mode="create")
        except StorageError as error:
            self.abort()
            if isinstance(error.__cause__, FileExistsError):
                raise AlreadyExists(
                    f"{tier._where} already has file {self._name}; it stays as it is"
                ) from None
            raise
        except ForebayError:
            self.abort()
            raise
        reservation.settle(self.num_bytes)
        self._reservation = None
        self._data = bytearray()

    def abort(self) -> None:
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None
        self._data = bytearray()

    def _check_open(self) -> Reservation:
        if self._reservation is None:
            raise StorageError(
                f"file {self._name} of {self._tier._where} was published or aborted already"
            )
        return self._reservation


class _ObjectReader(TierReader):
    """Reads one object by ranges."""

    def __init__(self, tier: RemoteTier, path: str, size_bytes: int, where: str) -> None:
        self.size_bytes = size_bytes
        self.where = where
        self._tier = tier
        self._path = path

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        if not view.nbytes:
            return
        with self._tier._translated(f"reading at byte {offset} of {self._path}"):
            data = self._tier._file_system.cat_file(
                self._path, start=offset, end=offset + view.nbytes
            )
        if len(data) != view.nbytes:
            raise IntegrityError(
                f"file is cut short: it ends before byte {offset + view.nbytes} ({self.where}); "
                "another replica or generation has to serve"
            )
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(data, np.uint8))

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        """Nothing is held between calls."""


def _modified(entry: dict[str, Any]) -> float:
    """Seconds since 1970: file systems call it differently."""
    for key in ("mtime", "LastModified", "modified", "created"):
        value = entry.get(key)
        if value is not None:
            return float(value) if isinstance(value, int | float) else float(value.timestamp())
    return 0.0
