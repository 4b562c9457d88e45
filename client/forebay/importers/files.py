"""Files at local paths and fsspec URLs: found, described, opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec

from forebay_wire.errors import ForebayError, InvalidRequest, NotFound, StorageError


@dataclass(frozen=True)
class File:
    """A file as it was when it was found."""

    path: str
    """Local path or URL, as it can be opened again in any process."""
    num_bytes: int
    stamp: str
    """Changes when the file does: its ETag, or the time of its last change; empty: unknown."""

    @property
    def name(self) -> str:
        """Without its folder."""
        return self.path.rstrip("/").rpartition("/")[2]


@contextmanager
def open_file(path: str) -> Iterator[IO[bytes]]:
    """Open for reading. NotFound, InvalidRequest for what cannot be opened, StorageError."""
    with _explained(path):
        filesystem, inner = fsspec.core.url_to_fs(path)
        file = filesystem.open(inner, "rb")
    with file:
        yield file


def read_file(path: str) -> bytes:
    """All of a small file."""
    with open_file(path) as file, _explained(path):
        data: bytes = file.read()
        return data


def look(path: str) -> File:
    """The file at *path*. NotFound."""
    with _explained(path):
        filesystem, inner = fsspec.core.url_to_fs(path)
        return _file(filesystem, filesystem.info(inner))


def is_folder(path: str) -> bool:
    """Whether *path* is a folder now, whatever was listed before."""
    with _explained(path):
        filesystem, inner = fsspec.core.url_to_fs(path)
        filesystem.invalidate_cache()
        return bool(filesystem.isdir(inner))


def exists(folder: str, name: str) -> bool:
    """Whether *folder* has a file called *name*."""
    with _explained(folder):
        filesystem, inner = fsspec.core.url_to_fs(folder)
        return bool(filesystem.isfile(f"{inner.rstrip('/')}/{name}"))


def list_files(folder: str) -> list[File]:
    """All files below *folder*, by path. Hidden ones (a name that begins with a dot) are left
    out."""
    return [file for path, file in list_all(folder) if not _is_hidden(path)]


def list_all(folder: str) -> list[tuple[str, File]]:
    """All files below *folder* by their paths from there, and these."""
    with _explained(folder):
        filesystem, inner = fsspec.core.url_to_fs(folder)
        found: dict[str, dict[str, Any]] = filesystem.find(inner, detail=True)
        start = len(inner.rstrip("/")) + 1
        return [(path[start:], _file(filesystem, found[path])) for path in sorted(found)]


def expand(paths: Sequence[str]) -> list[str]:
    """*paths* with patterns (``*``, ``?``, ``[``) replaced by the paths that match, in order."""
    found: list[str] = []
    for path in paths:
        with _explained(path):
            filesystem, inner = fsspec.core.url_to_fs(path)
            if not any(letter in inner for letter in "*?[") or filesystem.exists(inner):
                found.append(path)
                continue
            matching = sorted(filesystem.glob(inner))
        if not matching:
            raise NotFound(f"no file matches {path}")
        found.extend(filesystem.unstrip_protocol(one) for one in matching)
    return [one.removeprefix("file://") for one in found]


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _file(filesystem: Any, info: dict[str, Any]) -> File:
    path = filesystem.unstrip_protocol(info["name"]).removeprefix("file://")
    stamp = next(
        (str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified") if info.get(key)), ""
    )
    return File(path, int(info.get("size") or 0), stamp)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except (
        ImportError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
        ValueError,
    ) as error:
        if isinstance(error, ForebayError):
            raise
        raise InvalidRequest(f"{path} cannot be opened: {error}") from error
    except OSError as error:
        if isinstance(error, ForebayError):
            raise
        raise StorageError(f"{path} cannot be read: {error}") from error


def as_path(path: str | os.PathLike[str]) -> str:
    """Local paths absolute, as another process may have another current folder."""
    text = os.fspath(path)
    return text if "://" in text or "::" in text else os.path.abspath(text)


@dataclass(frozen=True)
class WholeFile:
    """A piece that is one file, not cut: how it is called, how large it is, what it is told by."""

    file: File

    @property
    def name(self) -> str:
        return self.file.path

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    @property
    def stamp(self) -> str:
        return self.file.stamp
