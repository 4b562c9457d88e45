"""``forebay://``: datasets and generations as a read-only file system for fsspec.

The tree is in ``docs/files.md``. What is written goes through ``forebay.connect``: a file system
cannot commit.
"""

from __future__ import annotations

import errno
import io
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import wraps
from glob import has_magic
from hashlib import sha256
from typing import Any, Final, NoReturn, Self, TypeVar

from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.spec import AbstractFileSystem

from forebay.address import Address, FolderAddress, SocketAddress, TcpAddress, parse_address
from forebay.client import Client
from forebay.forking import watch
from forebay.tree import Found, Source, Tree, open_source
from forebay_wire.errors import IntegrityError, NotFound

CONNECT_SECONDS: Final = 30.0

COPY_BYTES: Final = 4 << 20
"""Piece in which a file is copied to a local one."""

LOOPBACK: Final = ("localhost", "127.0.0.1")

_SCHEME: Final = re.compile(r"^forebay:(?://|:)")
Method = TypeVar("Method", bound=Callable[..., Any])

_HOST: Final = re.compile(r"^/*(?P<host>[^/:]+):(?P<port>\d+)(?=/|$)")
"""No name in the tree has a colon. (IPv6 addresses have ``::``, which fsspec takes for its own.)"""


class DamagedFile(IntegrityError, OSError):
    """Stored bytes are not what was written, and no copy is; for readers that know only OSError."""


class _Clients:
    """The clients of this process, one for each daemon, as long as a file system uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[Address, Client] = weakref.WeakValueDictionary()
        watch(self)

    def get(self, address: Address, timeout: float) -> Client:
        with self._lock:
            found = self._known.get(address)
            if found is None:
                found = self._known[address] = Client(address)
        found.channel.connect(timeout)
        found.channel.attach()
        return found

    def forget_parent(self) -> None:
        """In a child of fork: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()


_clients: Final = _Clients()


def _one_look(method: Method) -> Method:
    """Have all that one call of *method* asks about be as it stood when it asked first."""

    @wraps(method)
    def call(self: ForebayFileSystem, *args: Any, **kwargs: Any) -> Any:
        if self._look.tree is not None:  # inside another call
            return method(self, *args, **kwargs)
        self._look.tree = Tree(self.client)
        try:
            return method(self, *args, **kwargs)
        finally:
            self._look.tree = None

    return call  # type: ignore[return-value]


class _Look(threading.local):
    """What the call that this thread is in has found out so far."""

    tree: Tree | None = None


def _read_only(verb: str) -> Callable[..., NoReturn]:
    def refuse(self: ForebayFileSystem, path: Any = "", *args: Any, **kwargs: Any) -> NoReturn:
        """Always fails: what is committed stays as it is."""
        raise _refusal(verb, path)

    return refuse


def _refusal(verb: str, path: Any) -> OSError:
    return OSError(
        errno.EROFS,
        f"forebay:// is read-only, {verb} is not possible: write datasets with "
        "client.create_dataset() or append_dataset(), checkpoints with forebay.Checkpointer, and "
        "delete with client.delete_dataset() or delete_checkpoints()",
        str(path),
    )


class ForebayFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Datasets and generations of one daemon, for reading. Thread-safe, fork-safe, picklable.

    The daemon is asked at each call, so nothing that is listed is ever stale, and one call sees one
    version or generation as ``latest``. A file that is not
    there is FileNotFoundError, damaged bytes are :class:`DamagedFile`, a daemon that is away is
    ConnectionError; only the first counts as absence.
    """

    protocol = "forebay"
    root_marker = ""
    cachable = False  # instances are light: the connection is what is shared

    def __init__(
        self,
        address: str | os.PathLike[str] | Address | None = None,
        token: str | None = None,
        timeout: float = CONNECT_SECONDS,
        **storage_options: Any,
    ) -> None:
        """*address*, *token* and *timeout* (seconds) as ``forebay.connect`` takes them; the
        environment is read here. Nobody is called before the first use."""
        super().__init__(**storage_options)
        is_parsed = isinstance(address, FolderAddress | SocketAddress | TcpAddress)
        self.address: Address = address if is_parsed else parse_address(address, token)  # type: ignore[arg-type,assignment]
        self._timeout = timeout
        self._used: Client | None = None
        self._look = _Look()

    @property
    def client(self) -> Client:
        """The connection, made at the first use and shared with other file systems."""
        if self._used is None:
            self._used = _clients.get(self.address, self._timeout)
        return self._used

    # What it is.

    @property
    def _fs_token(self) -> str:
        return sha256(repr(self.address).encode()).hexdigest()

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.address, self._timeout)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        text = _SCHEME.sub("", os.fspath(path))
        return _HOST.sub("", text).strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        found = _HOST.match(_SCHEME.sub("", path))
        if found is None:
            return {}
        scheme = "grpc" if found["host"] in LOOPBACK else "grpcs"
        return {"address": f"{scheme}://{found['host']}:{found['port']}"}

    # Looking.

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return _info(self._find(path))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        found = self._find(path)
        with _as_os_errors(found.path):
            listed = [found] if found.file is not None else list(found.children())
        return [_info(one) if detail else one.path for one in listed]

    def exists(self, path: str, **kwargs: Any) -> bool:
        return self._find_or_none(path) is not None

    def isdir(self, path: str) -> bool:
        found = self._find_or_none(path)
        return found is not None and found.file is None

    def isfile(self, path: str) -> bool:
        found = self._find_or_none(path)
        return found is not None and found.file is not None

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: Any = "omit",
        **kwargs: Any,
    ) -> Iterator[Any]:
        """As fsspec has it, but only what is missing is omitted: an error is not emptiness."""
        on_error = _raise_unless_missing if on_error == "omit" else on_error
        yield from super().walk(path, maxdepth, topdown, on_error, **kwargs)

    @_one_look
    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
        """As fsspec has it; ``latest`` becomes its number, so that all names are of one version."""
        return super().glob(self._without_latest(path), maxdepth=maxdepth, **kwargs)

    @_one_look
    def find(self, *args: Any, **kwargs: Any) -> Any:
        return super().find(*args, **kwargs)

    @_one_look
    def expand_path(self, *args: Any, **kwargs: Any) -> Any:
        return super().expand_path(*args, **kwargs)

    @_one_look
    def cat(self, *args: Any, **kwargs: Any) -> Any:
        return super().cat(*args, **kwargs)

    @_one_look
    def get(self, *args: Any, **kwargs: Any) -> None:
        super().get(*args, **kwargs)

    def created(self, path: str) -> datetime:
        """When the version of *path* was committed or its generation begun; of a folder above them,
        the first one's."""
        found = self._find(path)
        if found.created_unix is None:
            raise NotImplementedError(f"{found.path or '/'} has no time")
        return datetime.fromtimestamp(found.created_unix, UTC)

    def modified(self, path: str) -> datetime:
        """As :meth:`created`: nothing changes afterwards."""
        return self.created(path)

    def ukey(self, path: str) -> str:
        """64 hexadecimal digits: equal ones, equal bytes. A blob's id where the file is a blob."""
        info = self.info(path)
        return str(info.get("ukey") or sha256(str(info).encode()).hexdigest())

    def checksum(self, path: str) -> int:
        return int(self.ukey(path), 16)

    # Reading.

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        with self._open(self._strip_protocol(path)) as file:
            return file.slice(start, end)

    @_one_look
    def cat_ranges(
        self,
        paths: Any,
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[Any]:
        """The bytes of many ranges; each file is opened once. *max_gap* changes nothing here."""
        if not isinstance(paths, list):
            raise TypeError("paths must be a list")
        starts = starts if isinstance(starts, list) else [starts] * len(paths)
        ends = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(starts) == len(ends):
            raise ValueError("paths, starts and ends differ in length")
        files: dict[str, ForebayFile | Exception] = {}
        return [
            self._cat_range(files, path, start, end, on_error)
            for path, start, end in zip(paths, starts, ends, strict=True)
        ]

    def get_file(
        self,
        rpath: str,
        lpath: Any = None,
        callback: Any = DEFAULT_CALLBACK,
        outfile: Any = None,
        **kwargs: Any,
    ) -> None:
        """Copy one file to a local path or an open file. What fails leaves no half file."""
        if outfile is None and hasattr(lpath, "write"):
            outfile = lpath
        found = self._find(rpath)
        if found.file is None:
            if outfile is not None:
                raise _is_folder(found)
            os.makedirs(lpath, exist_ok=True)
            return
        with self._open_found(found) as file:
            if outfile is not None:
                _copy_out(file, outfile, callback)
                return
            os.makedirs(os.path.dirname(os.path.abspath(lpath)), exist_ok=True)
            with open(lpath, "wb") as local:
                try:
                    _copy_out(file, local, callback)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(lpath)
                    raise

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> ForebayFile:
        if mode != "rb":
            raise _refusal(f"open for {mode!r}", path)
        return self._open_found(self._find(path))

    # What cannot be.

    mkdir = _read_only("mkdir")
    makedirs = _read_only("makedirs")
    rmdir = _read_only("rmdir")
    rm = _read_only("rm")
    rm_file = _read_only("rm_file")
    _rm = _read_only("rm")
    cp_file = _read_only("cp_file")
    copy = _read_only("copy")
    mv = _read_only("mv")
    pipe = _read_only("pipe")
    pipe_file = _read_only("pipe_file")
    put = _read_only("put")
    put_file = _read_only("put_file")
    touch = _read_only("touch")

    # Inside.

    def _find(self, path: str) -> Found:
        stripped: str = self._strip_protocol(path)
        with _as_os_errors(stripped):
            return (self._look.tree or Tree(self.client)).find(stripped)

    def _find_or_none(self, path: str) -> Found | None:
        try:
            return self._find(path)
        except FileNotFoundError:
            return None

    def _without_latest(self, path: Any) -> str:
        """*path* with a number instead of ``latest``, its slash at the end kept for patterns."""
        text = os.fspath(path)
        stripped: str = self._strip_protocol(text)
        ending = "/" if text.endswith("/") and stripped else ""
        if any(has_magic(name) for name in stripped.split("/")[:3]):
            return stripped + ending
        try:
            return (self._look.tree or Tree(self.client)).without_latest(stripped) + ending
        except NotFound:
            return stripped + ending  # where it is used says what is missing

    def _open_found(self, found: Found) -> ForebayFile:
        if found.file is None:
            raise _is_folder(found)
        with _as_os_errors(found.path):
            client = self.client
            source = open_source(found.file, client.endpoint, client.read_manifest, found.context)
        return ForebayFile(source, _info(found))

    def _cat_range(
        self,
        files: dict[str, ForebayFile | Exception],
        path: str,
        start: int | None,
        end: int | None,
        on_error: str,
    ) -> bytes | Exception:
        try:
            if path not in files:
                files[path] = self._open(self._strip_protocol(path))
            found = files[path]
            if isinstance(found, Exception):
                raise found
            return found.slice(start, end)
        except Exception as error:
            if on_error != "return":
                raise
            files.setdefault(path, error)
            return error


class ForebayFile(io.BufferedIOBase):
    """One open file. Not thread-safe; it may be pickled, and inherited by a child of fork.

    Reading needs no control call: what the file is was settled when it was opened, and stays even
    if its dataset is deleted, until the daemon drops the bytes.
    """

    mode = "rb"

    def __init__(self, source: Source, details: dict[str, Any], position: int = 0) -> None:
        self._source: Source | None = source
        self._position = position
        self.details = details
        """What ``info()`` said."""
        self.size: int = details["size"]
        self.path: str = details["name"]

    @property
    def name(self) -> str:
        return self.path

    @property
    def full_name(self) -> str:
        return f"forebay://{self.path}"

    def info(self) -> dict[str, Any]:
        return self.details

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._opened()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._opened()
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"whence {whence} is none of 0, 1 and 2")
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise ValueError(f"position {position} lies before the file")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        start, stop = self._next(size)
        data = self.slice(start, stop)
        self._position = max(self._position, stop)
        return data

    def read1(self, size: int = -1) -> bytes:
        return self.read(min(size, COPY_BYTES) if size >= 0 else COPY_BYTES)

    def peek(self, size: int = 0) -> bytes:
        start, stop = self._next(max(size, io.DEFAULT_BUFFER_SIZE))
        return self.slice(start, stop)

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        start, stop = self._next(len(target))
        if stop > start:
            with _as_os_errors(self.path):
                self._opened().read_into(start, target[: stop - start])
            self._position = stop
        return stop - start

    readinto1 = readinto

    def read_buffer(self, size: int = -1) -> memoryview:
        """:meth:`read` without a copy where the bytes can be mapped. Arrow asks for this."""
        start, stop = self._next(size)
        view = self.map(start, stop)
        self._position = max(self._position, stop)
        return view

    def map(self, start: int = 0, stop: int | None = None) -> memoryview:
        """A read-only view of the bytes [start, stop), counted as slices are.

        No copy on the daemon's host, where a file lies in one piece; it outlives this file.
        """
        start, stop, _ = slice(start, stop).indices(self.size)
        source = self._opened()
        if stop <= start:
            return memoryview(b"")
        with _as_os_errors(self.path):
            view = source.view(start, stop - start)
            if len(view) == stop - start:
                return view
            whole = memoryview(bytearray(stop - start))
            whole[: len(view)] = view
            source.read_into(start + len(view), whole[len(view) :])
            return whole.toreadonly()

    def slice(self, start: int | None, stop: int | None) -> bytes:
        """The bytes [start, stop), counted as slices are."""
        return bytes(self.map(start or 0, stop))

    def close(self) -> None:
        self._source = None
        super().close()

    def __reduce__(self) -> Any:
        return ForebayFile, (self._opened(), self.details, self._position)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.full_name} of {self.size} bytes>"

    def __enter__(self) -> Self:
        self._opened()
        return self

    def _next(self, size: int | None) -> tuple[int, int]:
        """The range that a read of *size* bytes means."""
        self._opened()
        start = min(self._position, self.size)
        return start, self.size if size is None or size < 0 else min(self.size, start + size)

    def _opened(self) -> Source:
        if self._source is None:
            raise ValueError(f"I/O operation on closed file {self.full_name}")
        return self._source


def _rebuild(kind: type[ForebayFileSystem], address: Address, timeout: float) -> ForebayFileSystem:
    return kind(address=address, timeout=timeout)


def _info(found: Found) -> dict[str, Any]:
    entry: dict[str, Any] = {
        **found.notes,
        "name": found.path,
        "size": 0 if found.file is None else found.file.num_bytes,
        "type": "directory" if found.file is None else "file",
    }
    if found.created_unix is not None:
        entry["created"] = entry["mtime"] = found.created_unix
    if found.file is not None:
        entry["ukey"] = found.file.key
    return entry


def _is_folder(found: Found) -> OSError:
    return IsADirectoryError(errno.EISDIR, "this is a folder", found.path)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def _as_os_errors(path: str) -> Iterator[None]:
    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(errno.ENOENT, error.message, path) from error
    except IntegrityError as error:
        raise DamagedFile(error.message) from error


def _copy_out(file: ForebayFile, out: Any, callback: Any) -> None:
    callback.set_size(file.size)
    for start in range(0, file.size, COPY_BYTES):
        part = file.map(start, min(file.size, start + COPY_BYTES))
        done = 0
        while done < len(part):  # a raw file may take less
            count = out.write(part[done:])
            done += len(part) - done if count is None else count
        callback.relative_update(len(part))
