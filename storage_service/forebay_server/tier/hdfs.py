"""HDFS through hdfs-native's fsspec file system: files are written aside and renamed when whole.

The name node renames in one step, and refuses a name that is taken: that is what publishes whole
and create-only. A file's bytes are on the data nodes' disks (hsync) before it gets its name.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from forebay_server.tier.fsspec_client import FsspecClient, fault_of
from forebay_server.tier.place import UNFINISHED_FOLDER
from forebay_server.tier.store_client import (
    ObjectInfo,
    Part,
    PartStoreClient,
    StoreFault,
    UnfinishedUpload,
)

T = TypeVar("T")

SCHEMES: Final = ("hdfs://", "viewfs://")
CALL_SECONDS: Final = 60.0
"""Deadline of a call: the client itself waits for ever for a name node that hangs."""

_PATIENCE: Final = {
    "dfs.client.failover.max.attempts": "2",
    "dfs.client.failover.sleep.base.millis": "100",
    "dfs.client.failover.sleep.max.millis": "500",
    "dfs.client.socket-timeout": "30000",
}
"""The tier tries again by itself; with Hadoop's own defaults one call takes minutes."""


def hdfs_options(given: Mapping[str, Any]) -> dict[str, str]:
    """Settings of the Hadoop client: those of the user, else ours."""
    return {**_PATIENCE, **{name: str(value) for name, value in given.items()}}


def is_hdfs(file_system: Any) -> bool:
    """Whether it renames as :class:`HdfsClient` needs it: other clients of HDFS may replace."""
    return type(file_system).__module__ == "hdfs_native.fsspec"


class HdfsClient(FsspecClient, PartStoreClient):
    """Files below one folder. Thread-safe, except that the parts of one upload go out in order."""

    def __init__(self, file_system: Any, root: str) -> None:
        super().__init__(file_system, root)
        self._uploads: dict[str, _Upload] = {}
        self._is_made = False
        """The folder was there once."""

    def open(self) -> None:
        """Changes nothing: the first file that is written makes the folders."""
        self._call(self.files.exists, self._root)

    def close(self) -> None:
        for upload in list(self._uploads):
            with contextlib.suppress(StoreFault):
                self.abort("", upload)

    def check_place(self) -> None:
        if not self._is_made:
            return
        try:
            self._call(self.files.info, self._path(UNFINISHED_FOLDER))
        except StoreFault as fault:
            if fault.kind != "missing":
                raise
            raise StoreFault("no place", f"folder {self._root} is not there") from None

    @property
    def may_create_exclusively(self) -> bool:
        return True

    # ------------------------------------------------------------------------- whole objects

    def put(self, key: str, data: memoryview, mark: str) -> None:
        upload = self.begin(key, mark)
        try:
            self.put_part(key, upload, 1, data)
            self.complete(key, upload, [])
        except StoreFault:
            with contextlib.suppress(StoreFault):
                self.abort(key, upload)
            raise

    def is_ours(self, key: str, data: memoryview | None, mark: str) -> bool:
        if data is not None:
            return super().is_ours(key, data, mark)
        # Nobody else moves the file that was written aside.
        return self.head(key) is not None and self.head(_aside(mark)) is None

    def list_page(self, prefix: str, after: str) -> tuple[list[ObjectInfo], str]:
        found, _ = super().list_page(prefix, after)
        if not found:
            self.check_place()
        return found, ""

    # -------------------------------------------------------------------------------- parts

    def begin(self, key: str, mark: str) -> str:
        self.check_place()  # or it would be made anew
        path = self._path(_aside(mark))
        file = self._call(self.files.open, path, "wb", overwrite=True)
        self._is_made = True
        self._uploads[mark] = _Upload(file)
        return mark

    def put_part(self, key: str, upload: str, number: int, data: memoryview) -> Part:
        """A file is written from front to back: a part waits for the one before it. One that failed
        ends the upload."""
        writing, copy = self._writing(upload), bytes(data)
        with writing.turn(number):
            self._call(writing.file.write, copy, num_bytes=len(copy))
        return Part(number, "", "")

    def complete(self, key: str, upload: str, parts: list[Part]) -> None:
        writing = self._uploads.get(upload)
        if writing is not None:
            self._call(writing.finish)
            self._uploads.pop(upload, None)
        source, target = self._path(_aside(upload)), self._path(key)
        try:
            self._call(self.files.mv, source, target)
        except StoreFault as fault:
            if fault.kind != "missing":
                raise
            self.check_place()
            self._call(self.files.makedirs, target.rpartition("/")[0], exist_ok=True)
            self._call(self.files.mv, source, target)

    def abort(self, key: str, upload: str) -> None:
        writing = self._uploads.pop(upload, None)
        if writing is not None:
            with contextlib.suppress(StoreFault):
                self._call(writing.file.close)
        self.delete(_aside(upload))

    def unfinished(self) -> list[UnfinishedUpload]:
        found, _ = super().list_page(f"{UNFINISHED_FOLDER}/", "")
        now = time.time()
        return [
            UnfinishedUpload(
                info.key, info.key.removeprefix(f"{UNFINISHED_FOLDER}/"), now - info.modified_unix
            )
            for info in found
        ]

    def _writing(self, upload: str) -> _Upload:
        found = self._uploads.get(upload)
        if found is None:
            raise StoreFault("no upload", f"nothing is being written to {_aside(upload)}")
        return found

    def _info(self, key: str, found: dict[str, Any]) -> ObjectInfo:
        """The name node counts in milliseconds."""
        return ObjectInfo(key, int(found["size"]), "", found["modification_time"] / 1000)

    def _call(self, call: Callable[..., T], *arguments: Any, num_bytes: int = 0, **named: Any) -> T:
        outcome: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                outcome.append(call(*arguments, **named))
            except BaseException as error:  # noqa: BLE001 - raised below; a panic of the library too
                failure.append(error)

        # One that hangs must not keep the process from ending.
        thread = threading.Thread(target=work, name="hdfs", daemon=True)
        thread.start()
        thread.join(CALL_SECONDS)
        if outcome:
            return outcome[0]
        if failure:
            raise _fault(failure[0]) from failure[0]
        raise StoreFault("busy", f"no answer within {CALL_SECONDS:.0f} s")


class _Upload:
    """A file that is being written aside. Thread-safe."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self._next = 1
        self._changed = threading.Condition()
        self._failed = ""

    @contextlib.contextmanager
    def turn(self, number: int) -> Any:
        """Inside, part *number* is written; nothing can be after one that failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or number <= self._next)
            if self._failed or number < self._next:
                raise StoreFault("refused", self._failed or f"part {number} is written already")
        try:
            yield
        except StoreFault as fault:
            with self._changed:
                self._failed = f"part {number} was not written whole ({fault.text})"
                self._changed.notify_all()
            raise
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def finish(self) -> None:
        if not self.file.closed:
            self.file.hsync()
            self.file.close()


def _aside(mark: str) -> str:
    return f"{UNFINISHED_FOLDER}/{mark}"


def _fault(error: BaseException) -> StoreFault:
    """What hdfs-native's exceptions mean: most of what servers say comes as RuntimeError, with the
    Java stack below it."""
    found = fault_of(error)
    told = str(error)
    first = found.text.splitlines()[0] if found.text else found.text
    if "LeaseExpiredException" in told or "FileNotFoundException" in told:
        return StoreFault("missing", first)
    if "AccessControlException" in told:
        return StoreFault("denied", first)
    if "QuotaExceededException" in told or "DiskOutOfSpace" in told:
        return StoreFault("full", first)
    if "InvalidArgument" in told:
        return StoreFault("misconfigured", first)
    if found.kind == "refused":  # data nodes or connections that failed, safe mode, failover
        return StoreFault("busy", first)
    return StoreFault(found.kind, first)
