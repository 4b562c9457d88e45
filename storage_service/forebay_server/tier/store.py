"""What every tier can do, and what it promises.

The docstrings of :class:`Tier`, :class:`TierWriter` and :class:`TierReader` are the contract; the
tests of ``forebay_server.testing.tier_contract`` hold every tier to it.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, Protocol, Self

from forebay_wire.closing import Closing
from forebay_wire.errors import (
    ForebayError,
    IntegrityError,
    ResourceExhausted,
    StorageError,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

TierKind = Literal["ram", "ssd", "hdd", "object"]

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the kernel answers when there is no room (EFBIG: RLIMIT_FSIZE or the file system's)."""


HEALTHY: Final = "ok"


@dataclass(frozen=True)
class FileInfo:
    """One published file of a tier."""

    name: str
    size_bytes: int
    modified_unix: float
    """Seconds since 1970 by the tier's own clock."""


@dataclass(frozen=True)
class TierSpace:
    """Room of a tier, in allocated bytes."""

    limit_bytes: int
    """What the configuration allows; 0: no limit of its own."""
    used_bytes: int
    """Held by published files (or granted slots)."""
    reserved_bytes: int
    """Promised to writers that have not published yet."""
    free_bytes: int
    """What a new reservation may have: the smaller of limit and device, minus all promises."""
    num_files: int


class RoomPromise(Protocol):
    """Room of a tier that nobody else gets."""

    num_bytes: int

    def shrink(self, num_bytes: int) -> None:
        """Give so many bytes of it back, at most all."""
        ...

    def release(self) -> None:
        """Give all of it back. Idempotent."""
        ...


class Tier(ABC):
    """A place that keeps immutable files under names that are never reused.

    Thread-safe. Every method blocks: call them through ``Tiers.run``. Errors are those of
    ``forebay_wire.errors``; none leaves a published file half-written, changed or half-deleted.
    """

    name: str
    """The tier's name in the catalog, in messages and in the configuration."""
    kind: TierKind
    location: str
    """Folder or URL, for people."""
    is_foreign: bool = False
    """Its files are the user's own: they are read here, and never written or deleted."""
    caches_only: bool = False
    """Its copies may serve, and count for nothing when another copy or a promise depends on them:
    the store would let another writer replace them."""

    @property
    def keeps(self) -> bool:
        """Whether a copy here is a place that another one may be given up for."""
        return not self.is_foreign and not self.caches_only

    encoding: str = "raw"
    """What copies that come here for keeping are encoded as, or ``auto``: one of
    ``forebay_server.model.encodings.SETTINGS``. New bytes land raw."""

    @property
    def health(self) -> str:
        """:data:`HEALTHY`, or why the tier is out of service: it takes nothing new then. Cheap."""
        return HEALTHY

    def answers(self) -> bool:
        """Whether what lies here can be read now, as far as that can be told at once; may ask the
        place for it."""
        return self.health == HEALTHY

    @abstractmethod
    def open(self) -> None:
        """Make or check the volume, sweep what dead writers left, count what is there.

        :class:`InvalidRequest` if the place cannot serve as this tier, :class:`StorageError` if it
        cannot be reached or written. Idempotent.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the place. Readers and writers end first. Idempotent."""

    def blob_name(self, file: str) -> str:
        """Where the blob file lies that the catalog calls *file*: the name for all other calls."""
        return file

    @abstractmethod
    def create(self, name: str, expected_bytes: int) -> TierWriter:
        """A writer of the new file *name*, with room for *expected_bytes* reserved.

        *expected_bytes* counts the whole file; a writer may end up with fewer bytes, or with more
        as long as there is room. Nothing is visible before :meth:`TierWriter.publish`.
        :class:`ResourceExhausted` (bytes needed, bytes free, what holds the space) leaves nothing;
        :class:`AlreadyExists` may come here or only from ``publish``.
        """

    @abstractmethod
    def read(self, name: str) -> TierReader:
        """A reader of the published file *name*. :class:`NotFound` if there is none.

        :class:`IntegrityError` if the device cannot read it, :class:`StorageError` if the whole
        place is away: that says nothing about the file. It stays usable when the file is deleted
        afterwards, where the tier has descriptors.
        """

    def read_whole(self, name: str, num_bytes: int) -> TierReader:
        """Like :meth:`read`, for who reads all of a file of up to *num_bytes* next: a store sends
        a small one with the first call, and it is kept until the reader is closed."""
        return self.read(name)

    def read_medium(self, name: str) -> TierReader:
        """Like :meth:`read`, around every cache of this machine where the tier can: what is read
        then is what the medium holds, and nothing else leaves a cache for it. Slower; no
        descriptor."""
        return self.read(name)

    @abstractmethod
    def head(self, name: str) -> int | None:
        """Size in bytes of the published file *name*, None if there is none."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove *name* and give its room back. Idempotent: no error if there is no such file.

        Not durable on return: after a power loss the file may be there again, as garbage.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        """The published files whose names start with *prefix*, in no order.

        Files that come or go meanwhile may or may not be listed; all others are, once.
        """

    @abstractmethod
    def space(self) -> TierSpace:
        """Room now. Cheap: counts are kept in memory."""

    def sweep(self) -> None:  # noqa: B027 - most tiers have nothing to sweep
        """Remove what writers that died long ago left unfinished; what is younger stays. Cheap
        enough for every hour."""

    def reserve(self, num_bytes: int) -> RoomPromise:
        """A promise of *num_bytes* for files that are made later. Landing tiers only.

        :class:`ResourceExhausted` (bytes needed, bytes free, what holds the space) if there is no
        room. In memory: it ends with the process.
        """
        raise NotImplementedError(f"tier {self.name} makes no promises of room")

    def put(self, name: str, data: ReadableBuffer) -> None:
        """Publish the whole file *name*, create-only and durable on return.

        :class:`AlreadyExists` if the name is taken: what is there stays as it is.
        """
        with self.create(name, memoryview(data).nbytes) as writer:
            writer.write(data)
            writer.publish()

    def get(self, name: str) -> bytes:
        """The whole file *name*, for small files. :class:`NotFound` if there is none."""
        with self.read(name) as reader:
            data = bytearray(reader.size_bytes)
            reader.read_into(0, data)
            return bytes(data)


class TierWriter(ABC):
    """Writes one new file in order. One thread at a time. Leaving its context aborts it, unless
    it was published."""

    num_bytes: int
    """Bytes written so far."""
    is_proven: bool = False
    """After :meth:`publish`: the place has compared what it keeps with a checksum of what was
    written, so that reading it back tells nothing new."""

    @abstractmethod
    def write(self, buffer: ReadableBuffer) -> None:
        """Append all of *buffer*; on return it may be reused. Nothing is durable yet.

        Fastest for pieces that start on a page and are multiples of 4 KiB. After
        :class:`ResourceExhausted` or :class:`StorageError` only :meth:`abort` is of use.
        """

    def keep_cached(self) -> None:  # noqa: B027 - most have no cache of their own
        """Before the first :meth:`write`: what is written is read soon, and is to stay in memory's
        cache as far as the tier has one. Slower to publish."""

    def open_early(self) -> int:
        """After the last :meth:`write`: a read-only descriptor of the whole file, which the caller
        closes. The file is not durable, and has no name yet; :meth:`publish` or :meth:`abort`
        follows. Only for tiers that have descriptors: landing tiers do."""
        raise NotImplementedError(f"{type(self).__name__} has no descriptor")

    @abstractmethod
    def publish(self) -> None:
        """Make the file visible under its name: whole, and durable on return.

        :class:`AlreadyExists` if the name is taken. On any error nothing becomes visible, with one
        exception: when only the last step (making the *name* durable) fails, the name may stay;
        it is never given out, so it is garbage.
        """

    @abstractmethod
    def abort(self) -> None:
        """Drop what was written and the reservation. Idempotent; nothing after ``publish``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class TierReader(Closing):
    """Reads one published file. Thread-safe, except for :meth:`close`."""

    size_bytes: int
    where: str
    """``tier NAME, file NAME``: for messages."""

    @abstractmethod
    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        """Fill all of *buffer* from *offset*.

        :class:`IntegrityError` "cut short" if the file ends before that, "cannot be read" if the
        device cannot read it.
        """

    def view(self, offset: int, num_bytes: int) -> memoryview | None:
        """Bytes that this reader has in memory already, valid until it is closed; None if they
        have to be read, which :meth:`read_into` does."""
        return None

    @abstractmethod
    def fileno(self) -> int | None:
        """A read-only descriptor that this reader owns, None where the tier has none."""

    def detach(self) -> int:
        """Give the descriptor to the caller, who closes it, and close this reader.

        Only for tiers that have descriptors: landing tiers do.
        """
        raise NotImplementedError(f"{type(self).__name__} has no descriptor")

    @abstractmethod
    def close(self) -> None:
        """Give the descriptor back. Idempotent."""


UNREADABLE: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EILSEQ})
"""What the kernel answers when a file's stored bytes cannot be had back: they are damaged."""


def from_read_error(error: OSError, doing: str, where: str) -> ForebayError:
    """Our error for *error*, which came while *doing* something with a published file *where*."""
    if error.errno in UNREADABLE:
        return IntegrityError(
            f"file cannot be read: {error.strerror} while {doing} ({where}); another replica or "
            "generation has to serve"
        )
    return from_os_error(error, doing, where)


def from_os_error(error: OSError, doing: str, where: str) -> ForebayError:
    """Our error for *error*, which came while *doing* something (``writing file X``) *where*."""
    if error.errno in NO_SPACE:
        return ResourceExhausted(
            f"{where} is full while {doing} ({error.strerror}): delete datasets or generations, "
            "or give it more room"
        )
    return StorageError(f"{where} failed {doing}: {error.strerror or error}; {_advice(error)}")


def _advice(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "was its folder removed, or is its disk not mounted?"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check owner and permissions of the folder, and that it is mounted writable"
    return "check the device and the kernel's log"
