"""A blob open for reading: every byte is checked before its first use, once."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np

from forebay.stopwatch import timed
from forebay.transfer.wanted import WantedBack
from forebay.transfer.window import POOL
from forebay_wire.closing import Closing
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound
from forebay_wire.segments import SegmentTable, xxh3

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

REOPENS: Final = 2
"""How often a damaged blob is opened anew, hoping for another replica, before giving up."""

NO_SEGMENT: Final = -1
"""In a report: the file as a whole or its table is damaged."""

Result = TypeVar("Result")


class Damage(Exception):
    """Stored bytes of the replica in use are not what the table says. Never leaves transfer."""

    def __init__(self, segment: int, reason: str) -> None:
        super().__init__(reason)
        self.segment = segment
        self.reason = reason


class UploadSlot(Closing):
    """Memory where an upload's next bytes are laid down before they are appended or sealed.

    Not thread-safe. Whoever asked for it closes it; views of ``buffer`` must not be written after.
    """

    buffer: memoryview
    """Writable, warm, ``slot_bytes`` long."""

    @abstractmethod
    def flush(self, num_bytes: int, start: int = 0) -> None:
        """Bring the bytes [*start*, *num_bytes*) to the daemon: before each Append, Seal, SealPack.

        Returns when the daemon's slot holds them; locally that is at once. Idempotent.
        """

    @property
    def is_intact(self) -> bool:
        """Whether nobody was granted this memory anew: else a later upload may overwrite it."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Let the memory go. The session itself lives on until sealed, aborted or expired."""


class Transfer(Protocol):
    """How one process moves bytes from and to one daemon. Thread-safe, fork-safe, free of gRPC.

    A child of fork drops what it inherited and connects anew by itself.
    """

    def open(self, blobs: Sequence[str], context: str = "") -> list[Blob]:
        """The blobs, open for reading, in the order of *blobs*; all of them or an exception.

        *context* says in error messages whose bytes these are: ``dataset mnist v1``. While the
        daemon is away this waits with back-off up to 60 s, then raises DaemonUnavailable. Also:
        NotFound, IntegrityError (no undamaged replica), ResourceExhausted (too much open).
        """
        ...

    def upload_slot(
        self,
        session: str,
        slot_bytes: int,
        put_ticket: str = "",
        renew_ticket: Callable[[], str] | None = None,
    ) -> UploadSlot:
        """The slot of an upload *session* of which *slot_bytes* were granted.

        *put_ticket* (from the session) and *renew_ticket* (called when it has expired; asks
        Blobs.Renew) are what a remote slot needs.
        """
        ...

    def report(self, blob: str, tier: str, segment: int, message: str) -> bool:
        """Tell the daemon of damage found here; True if it reads that replica as healthy."""
        ...

    @property
    def wanted_back(self) -> WantedBack:
        """Who listens there is told which open blobs the daemon needs the room of."""
        ...

    def plan(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``plan``, ``position`` or ``end_plan`` (see ``handover``), tried once.

        DaemonUnavailable, NotFound (register again), InvalidRequest.
        """
        ...

    def decide_version(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to ``decide_version`` (see ``handover``). DaemonUnavailable, NotFound,
        Conflict."""
        ...

    def manifest(self, manifest: str) -> bytes:
        """A manifest's bytes, not verified. DaemonUnavailable, NotFound."""
        ...

    def close(self) -> None:
        """Drop the connection, which releases all opens; mapped blobs stay readable.

        A later call connects again.
        """
        ...


class Checks:
    """Which segments of one replica (or window) are known to be right.

    Thread-safe without a lock, which a child of fork could inherit locked: marks are never undone.
    """

    def __init__(self, num_segments: int) -> None:
        self._done = bytearray(num_segments)
        self._first_missing = 0 if num_segments else -1

    def __getitem__(self, segment: int) -> bool:
        return bool(self._done[segment])

    @property
    def complete(self) -> bool:
        """Whether all segments are known to be right."""
        if self._first_missing >= 0:
            self._first_missing = self._done.find(0, self._first_missing)
        return self._first_missing < 0

    def mark(self, segment: int) -> None:
        """Segment *segment* is right."""
        self._done[segment] = 1

    def missing_runs(self, segments: range) -> Iterator[range]:
        """The runs of consecutive segments in *segments* that are not known to be right."""
        position = segments.start
        while position < segments.stop:
            start = self._done.find(0, position, segments.stop)
            if start < 0:
                return
            stop = self._done.find(1, start, segments.stop)
            position = stop if stop >= 0 else segments.stop
            yield range(start, position)


@dataclass(frozen=True)
class Piece:
    """A stretch of a blob that is read in one go, and what to do when its bytes are there."""

    view: memoryview
    """Where the bytes go."""
    segment: int | None
    """The segment that they are and that has to be checked."""
    wanted: memoryview | None = None
    """Where a part of them goes then, for a segment that is wanted in part."""
    skip: int = 0
    """Bytes of the segment before that part."""


class Blob(Closing):
    """One open blob. Thread-safe. Close it when done (or leave a ``with``); views stay valid.

    The first use of a segment checks it (XXH3); when all are checked, the check costs nothing.
    Damaged bytes are reported, another replica is tried, and only then IntegrityError is raised.
    """

    def __init__(self, blob: str, table: SegmentTable, context: str) -> None:
        self.id = blob
        self.table = table
        self.context = context
        self.num_bytes = table.total_bytes
        self.tier = ""
        # As lists: a look into a numpy array costs ten times as much as one into a list.
        self._borders: list[int] = table.offsets.tolist()
        self._digests: list[int] = table.entries["xxh3"].tolist()
        self._whole: memoryview | None = None
        """All bytes, checked: from then on :meth:`map` only slices."""

    # What the two ways of transfer add; the first two raise Damage.

    @abstractmethod
    def _map(self, offset: int, length: int) -> memoryview: ...

    @abstractmethod
    def _read_into(self, offset: int, target: memoryview) -> None: ...

    @abstractmethod
    def _reopen(self) -> None:
        """Switch to what the daemon now thinks is the best replica."""

    @abstractmethod
    def _report(self, damage: Damage) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Release the blob. Idempotent. Views that were handed out stay readable."""

    @property
    def maps_in_place(self) -> bool:
        """Whether :meth:`map` shows the bytes where they lie; else it needs memory for them."""
        return False

    def map(self, offset: int = 0, length: int | None = None) -> memoryview:
        """A read-only view of *length* bytes from *offset* (to the end by default).

        No copy where the daemon's file can be mapped. Raises InvalidRequest outside the blob,
        IntegrityError if no replica has the right bytes.
        """
        if length is None:
            length = self.num_bytes - offset
        if offset < 0 or length < 0 or offset + length > self.num_bytes:
            raise self._outside(offset, length)
        if self._whole is not None:  # one reading of the attribute suffices: views stay valid
            return self._whole[offset : offset + length]
        if length == 0:
            return memoryview(b"")
        try:
            return self._map(offset, length)
        except Damage as damage:
            return self._recovering(damage, lambda: self._map(offset, length))

    def probe(self, segment: int) -> str:
        """What is wrong with a segment of the replica in use, which is neither reported nor left
        for another one; empty: nothing (by BLAKE3)."""
        start, stop = self._borders[segment], self._borders[segment + 1]
        try:
            self.table.check_identity(segment, self._map(start, stop - start), self.where)
        except Damage as damage:
            return damage.reason
        except IntegrityError as error:
            return error.message
        return ""

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        """Fill *buffer* with the bytes from *offset*; nothing is allocated for whole segments.

        Raises as :meth:`map` does; then the content of *buffer* is unspecified.
        """
        target = memoryview(buffer).cast("B")
        if offset < 0 or offset + len(target) > self.num_bytes:
            raise self._outside(offset, len(target))
        if not len(target):
            return
        try:
            self._read_into(offset, target)
        except Damage as damage:
            self._recovering(damage, lambda: self._read_into(offset, target))

    def will_read(self, offset: int, length: int) -> None:
        """Have the bytes fetched into the page cache where that can be asked for; returns at
        once, raises nothing."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id[:12]} of {self.num_bytes} bytes, {self.where}>"

    @property
    def where(self) -> str:
        """Whose bytes, in which tier: for messages."""
        return f"{self.context}, tier {self.tier}" if self.context else f"tier {self.tier}"

    def _check(self, segment: int, digest: int) -> None:
        if digest != self._digests[segment]:
            raise Damage(segment, "does not match its digest")

    def _pieces(self, offset: int, target: memoryview, known: Checks) -> tuple[int, list[Piece]]:
        """How to fill *target* from *offset*: where reading starts, and consecutive pieces.

        Segments that *known* has need no check, so they are cut as wanted; others are read whole,
        straight into *target* where they lie inside it.
        """
        stop = offset + len(target)
        covering = self._covering(offset, len(target))
        borders = self._borders[covering.start : covering.stop + 1]
        pieces: list[Piece] = []
        for segment, start, end in zip(covering, borders, borders[1:], strict=False):
            first, last = max(start, offset), min(end, stop)
            wanted = target[first - offset : last - offset]
            if known[segment]:
                pieces.append(Piece(wanted, None))
            elif first == start and last == end:
                pieces.append(Piece(wanted, segment))
            else:
                scratch = POOL.lend(end - start)
                pieces.append(Piece(scratch, segment, wanted, first - start))
        starts_inside = known[covering.start]
        return (offset if starts_inside else borders[0]), pieces

    def _arrived(self, piece: Piece, digest: int | None = None) -> None:
        """Check a piece whose bytes are there (their *digest*, if known); raises Damage."""
        if piece.segment is not None:
            if digest is None:
                with timed("verify"):
                    digest = xxh3(piece.view)
            self._check(piece.segment, digest)
        if piece.wanted is not None:
            copy(piece.wanted, piece.view[piece.skip : piece.skip + len(piece.wanted)])

    def _covering(self, offset: int, length: int) -> range:
        """The segments that hold a range of at least one byte inside the blob."""
        first = bisect_right(self._borders, offset) - 1
        return range(first, bisect_left(self._borders, offset + length, first))

    def _recovering(self, damage: Damage, action: Callable[[], Result]) -> Result:
        """Report *damage*, and try *action* again on what the daemon then offers."""
        for _ in range(REOPENS):
            self._report(damage)
            try:
                self._reopen()
            except (IntegrityError, NotFound) as error:
                raise self._integrity_error(damage, f" ({error.message})") from error
            try:
                return action()
            except Damage as another:
                damage = another
        self._report(damage)
        raise self._integrity_error(damage)

    def _integrity_error(self, damage: Damage, note: str = "") -> IntegrityError:
        return IntegrityError(
            f"segment {damage.segment} of blob {self.id} {damage.reason} ({self.where}), and the "
            f"daemon has no undamaged replica of it{note}: restore it from the object tier "
            "(forebay recover), or use another version or generation"
        )

    def _closed(self) -> InvalidRequest:
        return InvalidRequest(f"blob {self.id} ({self.where}) is closed: open it again")

    def _outside(self, offset: int, length: int) -> InvalidRequest:
        return InvalidRequest(
            f"bytes [{offset}, {offset + length}) are outside blob {self.id} of {self.num_bytes} "
            f"bytes ({self.where})"
        )


def copy(target: memoryview, source: memoryview) -> None:
    """Copy bytes of equal length without holding the GIL."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
