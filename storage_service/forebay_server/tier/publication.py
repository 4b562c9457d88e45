"""Files that appear in a folder whole and durably, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from forebay_server.tier.buffers import address_of, aligned_buffer
from forebay_server.tier.direct import DIRECT_ALIGNMENT, direct_writes_work
from forebay_server.tier.space import Reservation, SpaceLedger, in_blocks
from forebay_server.tier.store import (
    NO_SPACE,
    TierReader,
    TierWriter,
    from_os_error,
    from_read_error,
)
from forebay_wire.errors import AlreadyExists, ForebayError, IntegrityError, NotFound, StorageError
from forebay_wire.ids import new_random_name

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

TAIL_BYTES: Final = 1 << 20
"""Unaligned pieces are collected in a buffer of this size."""

GROWTH_BYTES: Final = 64 << 20
"""A file that outgrows its reservation asks for this much more at a time."""

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700


def fsync_folder(folder: Path) -> None:
    """Make the names in *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make *folder* and what is missing above it, their names durable."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
        fsync_folder(path.parent)


def allocated_bytes(found: os.stat_result) -> int:
    """What a file takes on the device."""
    return found.st_blocks * 512


def away(where: str, what: str) -> StorageError:
    """The error for a whole place that is not there; its cause counts against the volume."""
    error = StorageError(f"{where} is away: {what}; is the disk mounted? Nothing in it is given up")
    error.__cause__ = OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    return error


class PublicationFolder:
    """A folder of published files, with a folder for unfinished ones beside it. Thread-safe.

    An unfinished file is locked (flock) by the process that writes it, so whoever opens the folder
    next can tell a dead writer's leavings from another daemon's work.
    """

    def __init__(self, root: Path, unfinished: Path, where: str) -> None:
        """Both folders lie on one file system; *where* names the tier in messages."""
        self.root = root
        self.where = where
        self._unfinished = unfinished
        self._direct = False
        self._lock = threading.Lock()
        self._durable_folders: set[Path] = set()

    def check_present(self) -> None:
        """Raise :class:`StorageError` unless the folder is where it was: what is missing in one
        that is away (a disk that is not mounted) is not gone."""
        if not self._unfinished.is_dir():
            raise away(self.where, f"{self._unfinished} is not there")

    def open(self) -> None:
        """Make the folders, remove what dead writers left, see whether direct writes work."""
        try:
            make_folders(self.root)
            make_folders(self._unfinished)
            fsync_folder(self.root.parent)  # who made it before us may have died before this
            self._durable_folders.add(self.root)
            if os.statvfs(self._unfinished).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            if not os.access(self._unfinished, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "the folder is not writable")
            self._sweep()
            self._direct = direct_writes_work(self._unfinished / new_random_name())
        except OSError as error:
            raise from_os_error(error, f"opening {self.root}", self.where) from error

    def create(
        self, path: Path, name: str, expected_bytes: int, ledger: SpaceLedger
    ) -> PublicationWriter:
        """A writer of the new file *path*, called *name* in messages, with its room allocated."""
        reservation = ledger.reserve(expected_bytes)
        unfinished, descriptor = self._unfinished / new_random_name(), -1
        try:
            descriptor = self._create_locked(unfinished)
            if expected_bytes:
                os.posix_fallocate(descriptor, 0, in_blocks(expected_bytes))
            reservation.allocated()
            return PublicationWriter(
                self, path, name, unfinished, descriptor, reservation, ledger, self._direct
            )
        except OSError as error:
            reservation.release()
            if descriptor >= 0:
                self._abandon(unfinished, descriptor)
            if error.errno in NO_SPACE:
                raise ledger.refusal(expected_bytes) from error
            if isinstance(error, FileNotFoundError):
                self.check_present()
            raise from_os_error(error, f"creating file {name}", self.where) from error

    def make_parents_durable(self, folder: Path) -> None:
        """Make *folder* (below the root) if it is missing, and its name durable once a process.

        Whether it exists says nothing: the one who made it may have died before its fsync.
        """
        if folder in self._durable_folders or folder == self.root.parent:
            return
        self.make_parents_durable(folder.parent)
        folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        fsync_folder(folder.parent)
        with self._lock:
            self._durable_folders.add(folder)

    def forget_folders(self) -> None:
        """Make folders again that were made before: they may be gone."""
        with self._lock:
            self._durable_folders.clear()

    def _create_locked(self, path: Path) -> int:
        while True:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, FILE_MODE)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except BaseException:
                self._abandon(path, descriptor)
                raise
            os.close(descriptor)  # somebody's sweep was faster than our lock

    def _sweep(self) -> None:
        for entry in os.scandir(self._unfinished):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                descriptor = os.open(entry.path, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(descriptor)

    def _abandon(self, unfinished: Path, descriptor: int) -> None:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        os.close(descriptor)


class PublicationWriter(TierWriter):
    """Writes around the page cache where that works: 2 to 4 times the rate of buffered writes and
    fsync. One thread at a time."""

    def __init__(
        self,
        folder: PublicationFolder,
        path: Path,
        name: str,
        unfinished: Path,
        descriptor: int,
        reservation: Reservation,
        ledger: SpaceLedger,
        direct: bool,
    ) -> None:
        self.num_bytes = 0
        self._folder = folder
        self._path = path
        self._name = name
        self._unfinished = unfinished
        self._descriptor = descriptor
        self._reservation = reservation
        self._ledger = ledger
        self._direct = direct
        self._direct_now = False
        self._offset = 0  # bytes that are in the file; the rest of num_bytes is in the tail
        self._tail: memoryview | None = None
        self._tail_bytes = 0
        self._room = in_blocks(reservation.num_bytes)

    def write(self, buffer: ReadableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        self._check_open()
        try:
            self._make_room(view.nbytes)
            if self._direct:
                self._write_aligned(view)
            else:
                self._write_out(view)
        except OSError as error:
            raise self._failure(error, "writing") from error
        self.num_bytes += view.nbytes

    def keep_cached(self) -> None:
        self._direct = False

    def open_early(self) -> int:
        self._check_open()
        try:
            self._write_tail()
            os.ftruncate(self._descriptor, self.num_bytes)
            return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY)
        except OSError as error:
            raise self._failure(error, "writing") from error

    def publish(self) -> None:
        self._check_open()
        try:
            self._write_tail()
            os.ftruncate(self._descriptor, self.num_bytes)
            os.fsync(self._descriptor)
            self._link()
        except FileExistsError:
            self.abort()
            raise AlreadyExists(
                f"{self._folder.where} already has file {self._name}; it stays as it is"
            ) from None
        except OSError as error:
            # After a failed fsync the kernel may count lost pages as written: never try again.
            failure = self._failure(error, "publishing")
            self.abort()
            raise failure from error
        self._settle()
        try:
            fsync_folder(self._path.parent)
        except OSError as error:
            raise self._failure(error, "publishing") from error

    def _link(self) -> None:
        try:
            self._folder.make_parents_durable(self._path.parent)
            os.link(self._unfinished, self._path)
        except FileNotFoundError:  # somebody has removed folders, or the disk is not there
            self._folder.check_present()
            self._folder.forget_folders()
            self._folder.make_parents_durable(self._path.parent)
            os.link(self._unfinished, self._path)

    def abort(self) -> None:
        if self._descriptor < 0:
            return
        self._drop_unfinished()
        self._reservation.release()

    def _settle(self) -> None:
        allocated = allocated_bytes(os.fstat(self._descriptor))
        self._drop_unfinished()
        self._reservation.settle(allocated)

    def _drop_unfinished(self) -> None:
        self._folder._abandon(self._unfinished, self._descriptor)
        self._descriptor = -1
        self._tail = None

    def _check_open(self) -> None:
        if self._descriptor < 0:
            raise StorageError(
                f"file {self._name} of {self._folder.where} was published or aborted already"
            )

    def _failure(self, error: OSError, doing: str) -> ForebayError:
        if error.errno in NO_SPACE:
            return self._ledger.refusal(max(self._room, self.num_bytes))
        return from_os_error(error, f"{doing} file {self._name}", self._folder.where)

    def _make_room(self, num_bytes: int) -> None:
        needed = in_blocks(self.num_bytes + num_bytes) - self._room
        if needed <= 0:
            return
        free = self._ledger.space().free_bytes
        more = in_blocks(max(needed, min(GROWTH_BYTES, free // 2)))
        self._reservation.grow(more)
        os.posix_fallocate(self._descriptor, self._room, more)
        self._reservation.allocated()
        self._room += more

    def _write_aligned(self, view: memoryview) -> None:
        """Aligned pieces go out as they are; what is not aligned goes through the tail."""
        if self._tail_bytes == 0 and address_of(view) % DIRECT_ALIGNMENT == 0:
            whole = view.nbytes // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
            self._write_out(view[:whole])
            view = view[whole:]
        if not view.nbytes:
            return
        if self._tail is None:
            self._tail = aligned_buffer(TAIL_BYTES)
        source, target = np.frombuffer(view, np.uint8), np.frombuffer(self._tail, np.uint8)
        position = 0
        while position < len(source):
            step = min(len(source) - position, TAIL_BYTES - self._tail_bytes)
            end = self._tail_bytes + step
            np.copyto(target[self._tail_bytes : end], source[position : position + step])
            self._tail_bytes, position = end, position + step
            if self._tail_bytes == TAIL_BYTES:
                self._write_out(self._tail)
                self._tail_bytes = 0

    def _write_tail(self) -> None:
        """Write the tail padded to whole blocks; truncation takes the padding off again."""
        if self._tail is None or not self._tail_bytes:
            return
        padded = in_blocks(self._tail_bytes)
        np.frombuffer(self._tail, np.uint8)[self._tail_bytes : padded] = 0
        self._write_out(self._tail[:padded])
        self._tail_bytes = 0

    def _write_out(self, view: memoryview) -> None:
        if self._direct and not self._direct_now:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            self._direct_now = True
        while view.nbytes:
            written = os.pwrite(self._descriptor, view, self._offset)
            self._offset += written
            view = view[written:]


class DescriptorReader(TierReader):
    """Reads a local file through the page cache. Thread-safe, except for ``close``."""

    def __init__(self, descriptor: int, where: str) -> None:
        """Takes *descriptor* over."""
        self.where = where
        self.size_bytes = os.fstat(descriptor).st_size
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path, where: str) -> DescriptorReader:
        """:class:`NotFound` if there is no such file."""
        try:
            return cls(os.open(path, os.O_RDONLY), where)
        except FileNotFoundError:
            raise NotFound(f"there is no such file ({where})") from None
        except OSError as error:
            raise from_read_error(error, "opening it", where) from error

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        while view.nbytes:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise from_read_error(error, f"reading at byte {offset}", self.where) from error
            if count == 0:
                raise IntegrityError(
                    f"file is cut short: it ends before byte {offset + view.nbytes} "
                    f"({self.where}); another replica or generation has to serve"
                )
            view, offset = view[count:], offset + count

    def fileno(self) -> int:
        return self._descriptor

    def detach(self) -> int:
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
