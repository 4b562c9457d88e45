"""Files that users keep elsewhere: found, looked at and read where they lie, never written.

The daemon reads with its own rights, so only what lies below the configured prefixes is touched:
else a client could read any file of the daemon's user, or of its cloud account, through it.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from forebay_server.tier.origin_stores import make_client
from forebay_server.tier.remote import ObjectClientName
from forebay_server.tier.retry import Retrier
from forebay_server.tier.store_client import ObjectInfo, StoreClient, StoreFault
from forebay_wire.errors import (
    ForebayError,
    InvalidRequest,
    NotFound,
    OriginChanged,
    PermissionDenied,
    StorageError,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

FILE: Final = "file://"
SETTING: Final = "origin-prefixes"

Validator = Mapping[str, str | int]


@dataclass(frozen=True)
class Looked:
    """A file as it is now."""

    url: str
    num_bytes: int
    validator: dict[str, str | int]

    def check(self, num_bytes: int, validator: Validator) -> None:
        """:class:`OriginChanged` unless it is the one that had these."""
        pairs: list[tuple[str, object, object]] = [("size", num_bytes, self.num_bytes)]
        pairs += [(name, then, self.validator.get(name)) for name, then in validator.items()]
        changes = [f"{name} {then!r}, now {now!r}" for name, then, now in pairs if then != now]
        if changes:
            raise changed(self.url, ", ".join(changes))


def changed(url: str, what: str) -> OriginChanged:
    """The error for an origin of which *what* differs."""
    return OriginChanged(
        f"origin {url} has changed since it was registered ({what}): put the file back as it was, "
        "or register the dataset anew"
    )


class OriginFile(ABC):
    """One origin, open for reading. Thread-safe, except for :meth:`close`."""

    url: str
    num_bytes: int

    @abstractmethod
    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        """Fill all of *buffer* from *offset*. :class:`OriginChanged` if the file is another one by
        now; :class:`StorageError`."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""

    def read(self, offset: int, length: int) -> bytearray:
        """*length* bytes from *offset*."""
        data = bytearray(length)
        self.read_into(offset, data)
        return data


class OriginPlaces:
    """All that lies below *prefixes*: folders (absolute paths or URLs). Thread-safe."""

    def __init__(
        self,
        prefixes: Sequence[str],
        client: ObjectClientName = "s3fs",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """*client* is who speaks with S3, with *options*. :class:`InvalidRequest` for a prefix that
        is neither an absolute path nor a URL."""
        self.prefixes = tuple(_spelled(prefix).rstrip("/") for prefix in prefixes)
        self._client: ObjectClientName = client
        self._options = dict(options or {})
        self._lock = threading.Lock()
        self._stores: dict[str, StoreClient] = {}

    def close(self) -> None:
        """Let go of connections. Idempotent."""
        with self._lock:
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()

    def spell(self, url: str) -> str:
        """The one spelling of *url*: a local path has its links resolved.

        :class:`InvalidRequest` if it is no URL, :class:`PermissionDenied` outside of the prefixes.
        """
        spelled = _spelled(url)
        self._prefix_of(spelled)
        return spelled

    def look(self, url: str) -> Looked:
        """The file at *url*, spelled as above, as it is now.

        :class:`NotFound`, :class:`PermissionDenied`, :class:`StorageError`; :class:`InvalidRequest`
        where nothing would tell a changed file.
        """
        prefix = self._prefix_of(url)
        if url.startswith(FILE):
            descriptor = _open_local(url)
            try:
                return _look_local(url, descriptor)
            finally:
                os.close(descriptor)
        info = self._head(prefix, url)
        if info is None:
            raise NotFound(f"there is no file {url}, or the daemon may not see it")
        return _looked(url, info)

    def open(self, url: str, num_bytes: int, validator: Validator) -> OriginFile:
        """The file at *url* if it still is what it was; :class:`OriginChanged` says what is not."""
        prefix = self._prefix_of(url)
        try:
            if url.startswith(FILE):
                return _LocalOrigin(url, num_bytes, validator)
            self.look(url).check(num_bytes, validator)
        except NotFound:
            raise changed(url, "it is not there any more") from None
        return _StoredOrigin(self, prefix, url, num_bytes, validator)

    # ----------------------------------------------------------------------------------- parts

    def _prefix_of(self, url: str) -> str:
        for prefix in self.prefixes:
            if url.startswith(f"{prefix}/"):
                return prefix
        allowed = ", ".join(self.prefixes) or "none"
        raise PermissionDenied(
            f"the daemon reads no origin at {url}: it has to lie below one of its {SETTING} "
            f"({allowed}); whoever runs the daemon can add one"
        )

    def _head(self, prefix: str, url: str) -> ObjectInfo | None:
        return self.call(
            prefix, url, "looking it up", lambda store: store.head(url[len(prefix) + 1 :])
        )

    def call(self, prefix: str, url: str, doing: str, work: Callable[[StoreClient], T]) -> T:
        """*work* with the store of *prefix*, tried again while that is busy; our errors only."""
        retrier = Retrier(f"origin {url}")
        try:
            store = retrier.attempt(doing, lambda: self._store(prefix))
            return retrier.attempt(doing, lambda: work(store))
        except StoreFault as fault:
            raise _error(url, doing, fault) from None

    def _store(self, prefix: str) -> StoreClient:
        with self._lock:
            store = self._stores.get(prefix)
            if store is None:
                store = make_client(prefix, self._client, self._options)
                store.open()
                self._stores[prefix] = store
            return store


def _error(url: str, doing: str, fault: StoreFault) -> ForebayError:
    text = f"origin {url} failed {doing}: {fault.text}"
    if fault.kind == "changed":
        return changed(url, fault.text)
    if fault.kind == "missing":
        return changed(url, "it is not there any more")
    if fault.kind == "denied":
        return PermissionDenied(f"{text}; check the daemon's credentials (origin-options)")
    if fault.kind == "no place":
        return NotFound(f"{text}; check the name of the bucket")
    return StorageError(text)


def _spelled(url: str) -> str:
    if url.startswith("/"):
        url = FILE + url
    scheme, sign, rest = url.partition("://")
    if not sign or not rest or not scheme.replace("+", "").isalnum() or "::" in url:
        raise InvalidRequest(
            f"{url!r} names no file elsewhere: give an absolute path, or a URL like s3://BUCKET/KEY"
        )
    if scheme == "file":
        if not rest.startswith("/"):
            raise InvalidRequest(f"{url!r} is no absolute path: write file:///some/folder/file")
        return FILE + os.path.realpath(rest)
    if "@" in rest.partition("/")[0]:
        raise InvalidRequest("a URL of an origin carries no credentials: give origin-options")
    parts = rest.lower().replace("%2e", ".").replace("\\", "/").replace("%2f", "/").split("/")
    if ".." in parts or "." in parts:
        raise InvalidRequest(f"{url!r} has '.' or '..' among its parts: write the URL without")
    return f"s3://{rest}" if scheme == "s3a" else url


# -------------------------------------------------------------------------------- local files


def _open_local(url: str) -> int:
    """A descriptor of exactly that file: no link on the way to it leads elsewhere."""
    path = url.removeprefix(FILE)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no file {url}") from None
    except PermissionError:
        raise PermissionDenied(
            f"the daemon (user {os.geteuid()}) may not read {url}: change the file's permissions"
        ) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise NotFound(f"there is no file {url}, only a link or no folder") from None
        raise StorageError(f"origin {url} cannot be opened: {error.strerror}") from error
    try:
        really = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # no /proc: no Linux
        really = os.path.realpath(path)
    if really != path:
        os.close(descriptor)
        raise PermissionDenied(f"{url} leads to {really} by a link: register that, if you may")
    return descriptor


def _look_local(url: str, descriptor: int) -> Looked:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRequest(f"{url} is no file: give each file of a folder")
    return Looked(url, found.st_size, {"mtime_ns": found.st_mtime_ns, "inode": found.st_ino})


class _LocalOrigin(OriginFile):
    def __init__(self, url: str, num_bytes: int, validator: Validator) -> None:
        self.url = url
        self.num_bytes = num_bytes
        self._validator = validator
        self._descriptor = _open_local(url)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        while view.nbytes:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise StorageError(
                    f"origin {self.url} cannot be read at byte {offset}: {error.strerror}"
                ) from error
            if not count:
                self._check()
                raise changed(self.url, f"it ends at byte {offset}")
            view, offset = view[count:], offset + count
        self._check()  # afterwards: what was written before the read has changed the time

    def _check(self) -> None:
        _look_local(self.url, self._descriptor).check(self.num_bytes, self._validator)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


# ------------------------------------------------------------------------------------- stores


def _looked(url: str, info: ObjectInfo) -> Looked:
    validator: dict[str, str | int] = {}
    if info.etag:
        validator["etag"] = info.etag
    elif info.modified_unix:
        validator["modified"] = repr(info.modified_unix)
    else:
        raise InvalidRequest(
            f"{url} has neither an ETag nor a time of change, so nobody could tell that it changed:"
            " import it instead (forebay dataset import)"
        )
    return Looked(url, info.size_bytes, validator)


class _StoredOrigin(OriginFile):
    def __init__(
        self, places: OriginPlaces, prefix: str, url: str, num_bytes: int, validator: Validator
    ) -> None:
        self.url = url
        self.num_bytes = num_bytes
        self._places = places
        self._prefix = prefix
        self._key = url[len(prefix) + 1 :]
        self._validator = validator
        self._etag = str(validator.get("etag", ""))

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        while view.nbytes:
            count = self._read_some(offset, view)
            if not count:
                self._check()
                raise changed(self.url, f"it ends at byte {offset}")
            view, offset = view[count:], offset + count
        if not self._prefix.startswith("s3://"):
            self._check()  # not every file system reads on a condition

    def _read_some(self, offset: int, view: memoryview) -> int:
        def fetch(store: StoreClient) -> int:
            try:
                return store.read_into(self._key, self._etag, offset, view)
            except StoreFault as fault:
                if fault.kind == "busy" and fault.num_bytes:
                    return fault.num_bytes
                raise

        try:
            return self._places.call(self._prefix, self.url, f"reading at byte {offset}", fetch)
        except OriginChanged:
            self._check()  # says what differs
            raise

    def _check(self) -> None:
        try:
            now = self._places.look(self.url)
        except NotFound:
            raise changed(self.url, "it is not there any more") from None
        now.check(self.num_bytes, self._validator)

    def close(self) -> None:
        """Nothing is held between calls."""
