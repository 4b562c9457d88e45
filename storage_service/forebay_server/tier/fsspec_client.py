"""Any fsspec file system: exclusively, where it can create a whole object so in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

import fsspec

from forebay_server.tier.store import NO_SPACE
from forebay_server.tier.store_client import FaultKind, ObjectInfo, StoreClient, StoreFault

T = TypeVar("T")

_MODIFIED: Final = ("mtime", "LastModified", "modified", "created", "modification_time")


class FsspecClient(StoreClient):
    """Objects below one path. As thread-safe as the file system; those of fsspec are."""

    def __init__(self, file_system: Any, root: str) -> None:
        self.files = file_system
        self._root = root.rstrip("/")

    def open(self) -> None:
        """Nothing to do: the file system connects by itself."""

    def close(self) -> None:
        """Nothing is held."""

    def check_place(self) -> None:
        """A path needs not be there before the first object is."""

    @property
    def may_create_exclusively(self) -> bool:
        """False where the file system has nothing but fsspec's own way: to look whether the name
        is free and then write, which another daemon may do meanwhile."""
        own = type(self.files)
        default = fsspec.AbstractFileSystem.pipe_file
        return own.pipe_file is not default or hasattr(own, "_pipe_file")

    def put(self, key: str, data: memoryview, mark: str) -> None:
        path = self._path(key)
        if self.is_exclusive:
            self._call(self.files.pipe_file, path, bytes(data), mode="create")
            return
        self._call(self.files.makedirs, path.rpartition("/")[0], exist_ok=True)
        self._call(self.files.pipe_file, path, bytes(data))

    def is_ours(self, key: str, data: memoryview | None, mark: str) -> bool:
        return bool(self._call(self.files.cat_file, self._path(key)) == data)

    def read_into(self, key: str, etag: str, offset: int, view: memoryview) -> int:
        end = offset + view.nbytes
        data = self._call(self.files.cat_file, self._path(key), start=offset, end=end)
        view[: len(data)] = data
        return len(data)

    def head(self, key: str) -> ObjectInfo | None:
        try:
            found = self._call(self.files.info, self._path(key))
        except StoreFault as fault:
            if fault.kind == "missing":
                return None
            raise
        return self._info(key, found) if found.get("type", "file") == "file" else None

    def delete(self, key: str) -> None:
        try:
            self._call(self.files.rm_file, self._path(key))
        except StoreFault as fault:
            if fault.kind != "missing":
                raise

    def list_page(self, prefix: str, after: str) -> tuple[list[ObjectInfo], str]:
        folder = prefix.rpartition("/")[0]
        top = f"{self._root}/{folder}" if folder else self._root
        found = self._call(self.files.find, top, detail=True)
        named = {path.removeprefix(self._root).lstrip("/"): info for path, info in found.items()}
        infos = [self._info(key, info) for key, info in named.items() if key.startswith(prefix)]
        return infos, ""

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _info(self, key: str, found: dict[str, Any]) -> ObjectInfo:
        etag = str(found.get("ETag") or found.get("etag") or "")
        return ObjectInfo(key, int(found["size"]), etag, _modified(found))

    def _call(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        try:
            return call(*arguments, **named)
        except Exception as error:
            raise fault_of(error) from error


def fault_of(error: BaseException) -> StoreFault:
    """Our fault for what a file system raised."""
    return StoreFault(_kind(error), f"{type(error).__name__}: {error}")


def _kind(error: BaseException) -> FaultKind:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, FileExistsError):
        return "taken"
    if isinstance(error, PermissionError):
        return "denied"
    if isinstance(error, NotImplementedError):
        return "misconfigured"
    if isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError):
        return "busy"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return "full"
    return "refused"


def _modified(entry: dict[str, Any]) -> float:
    """Seconds since 1970: file systems call it differently."""
    for key in _MODIFIED:
        value = entry.get(key)
        if value is not None:
            return float(value) if isinstance(value, int | float) else float(value.timestamp())
    return 0.0
