"""What the remote tier needs of an object store, one call a try: trying again is up to the tier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

FaultKind = Literal[
    "busy",  # may work in a moment: overloaded, cut off, timed out
    "changed",  # the object is another one than it was
    "denied",  # credentials are wrong, missing, expired or not enough
    "full",  # no room
    "misconfigured",  # the store cannot be what the settings say it is
    "missing",  # no such object
    "no place",  # no such bucket
    "no upload",  # no such unfinished upload: completed, aborted or swept
    "not exclusive",  # the store would replace what is there, or cannot say that it would not
    "refused",  # it will never work
    "taken",  # the name of a create-only call is taken
]


class StoreFault(Exception):
    """A call failed. Never leaves the tier: it becomes one of our errors there."""

    def __init__(self, kind: FaultKind, text: str, num_bytes: int = 0) -> None:
        """*text* says what the store or the connection said; a read got *num_bytes* before."""
        super().__init__(text)
        self.kind = kind
        self.text = text
        self.num_bytes = num_bytes


@dataclass(frozen=True)
class ObjectInfo:
    """One object that is there."""

    key: str
    size_bytes: int
    etag: str
    """What a conditional read compares, "" where the store has none."""
    modified_unix: float
    """Seconds since 1970 by the store's clock."""


@dataclass(frozen=True)
class UnfinishedUpload:
    """A multipart upload that was neither completed nor aborted."""

    key: str
    upload: str
    age_seconds: float
    """By the store's clock."""


@dataclass(frozen=True)
class Part:
    """One uploaded part of an object, as completing it wants to hear of it."""

    number: int
    """From 1."""
    etag: str
    checksum: str


class StoreClient(ABC):
    """A store below one root. Thread-safe. Every call blocks, has a deadline, and is one try.

    Keys are relative to the root. All calls raise :class:`StoreFault`; after one of the kind
    ``busy`` nobody knows whether the call took effect.
    """

    proves_writes: bool = False
    """Whether the store checks all that it is sent against a checksum of ours. Set by who asked
    :meth:`refuses_damage`."""
    is_exclusive: bool = True
    """Whether the store itself refuses to replace an object. Where it does not, whoever writes
    looks first, and :meth:`put` and ``complete`` create without a condition."""

    @abstractmethod
    def open(self) -> None:
        """Connect and check that the place is there. Idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all connections. Idempotent."""

    @abstractmethod
    def check_place(self) -> None:
        """``no place`` if bucket or folder are gone: then no missing object is really gone."""

    @abstractmethod
    def put(self, key: str, data: memoryview, mark: str) -> None:
        """Create the whole object, durable and visible on return; ``taken`` if there is one, unless
        the store is not exclusive.

        *mark* tells the writer's own object from others, see :meth:`is_ours`.
        """

    def refuses_damage(self, key: str) -> bool:
        """Try whether the store refuses an object that differs from its checksum; *key* is free
        before and after."""
        return False

    @abstractmethod
    def is_ours(self, key: str, data: memoryview | None, mark: str) -> bool:
        """Whether the object was made by the call with *mark* (and *data*, None: by parts)."""

    @abstractmethod
    def read_into(self, key: str, etag: str, offset: int, view: memoryview) -> int:
        """Fill *view* from *offset*; how many bytes the object had there.

        ``changed`` if its ETag is not *etag*. A fault tells how many bytes are in *view*.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """The object, None if there is none (or no place)."""

    def tail(self, key: str, num_bytes: int) -> tuple[ObjectInfo, bytes] | None:
        """The object, and its last *num_bytes* if that takes no call more, else nothing of it; None
        if there is none (or no place)."""
        info = self.head(key)
        return None if info is None else (info, b"")

    def tail_into(self, key: str, view: memoryview) -> ObjectInfo | None:
        """Fill *view* with the object's last bytes, from its start, in one call; the object. None
        if that cannot be had so, for whatever reason."""
        return None

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object if it is there."""

    @abstractmethod
    def list_page(self, prefix: str, after: str) -> tuple[list[ObjectInfo], str]:
        """A page of what starts with *prefix*, and where the next one goes on ("": it was the last;
        *after* "": the first). Answered by the store, never by a cache."""


class PartStoreClient(StoreClient):
    """A store that takes objects in parts, of which nothing is visible before the last step."""

    parts_are_exclusive: bool = True
    """Whether :meth:`complete` refuses to replace an object, too. Set by who has tried it."""

    @abstractmethod
    def begin(self, key: str, mark: str) -> str:
        """Begin a new upload; its id."""

    @abstractmethod
    def put_part(self, key: str, upload: str, number: int, data: memoryview) -> Part:
        """Upload one part; the same number again replaces it."""

    @abstractmethod
    def complete(self, key: str, upload: str, parts: list[Part]) -> None:
        """Create the object, durable and visible on return; ``taken`` if there is one."""

    @abstractmethod
    def abort(self, key: str, upload: str) -> None:
        """Drop the upload and its parts, if it is there."""

    @abstractmethod
    def unfinished(self) -> list[UnfinishedUpload]:
        """All uploads below the root that were neither completed nor aborted."""
