"""One upload session in memory, and what may be done with it in which state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final, Literal

from forebay_server.publish.landing import BlobLanding
from forebay_server.tier.memory import Slot
from forebay_server.tier.store import Tier
from forebay_wire.errors import Conflict, InvalidRequest, NotFound, PermissionDenied
from forebay_wire.limits import MAX_SEGMENTS_PER_APPEND, check_limit
from forebay_wire.segments import SegmentTable, check_cuts

SessionState = Literal["open", "sealed", "landed", "ended"]

MAX_OWNER_BYTES: Final = 400


@dataclass(frozen=True)
class Grant:
    """What a client may use, and for how long."""

    session: str
    slot_bytes: int
    """Bytes of shared memory that may be written at once; may be fewer than wanted."""
    lease_seconds: float
    was_ahead: bool = False
    """Whether it had been granted before it was known what it is for."""


@dataclass(frozen=True)
class LandedBlob:
    """A blob that is durable on this node and held by its session."""

    session: str
    blob: str
    num_bytes: int
    num_segments: int
    shared_bytes: int = 0
    """Of those, what others had already: it was not written."""


@dataclass(frozen=True)
class Piece:
    """What the slot holds, as the client announces it: the blob's next bytes."""

    sequence: int
    """From 0; a repeat of the last one is answered and not taken again."""
    num_bytes: int
    cuts: tuple[int, ...]
    """Segment lengths in bytes."""
    slot_offset: int = 0
    """Where in the slot it begins."""


class Session:
    """Used from the event loop only; reading ``slot`` and ``state`` is safe from any thread."""

    def __init__(
        self,
        name: str,
        uid: int,
        owner: str,
        slot: Slot,
        tier: Tier,
        file: str,
        landing: BlobLanding,
    ) -> None:
        self.name = name
        self.uid = uid
        self.owner = owner
        self.slot = slot
        self.tier = tier
        self.file = file
        self.landing: BlobLanding | None = landing
        """None once it has landed or ended."""
        self.lock = asyncio.Lock()
        """Held while a call works on the session: such a session does not expire."""
        self.state: SessionState = "open"
        self.last_piece: Piece | None = None
        self.renewed_at = 0.0
        """By the loop's clock."""
        self.landed: LandedBlob | None = None
        self.keeps_slot: bool | None = None
        """Whether its owner may use the slot again once a sealed blob has landed. None: that is not
        known yet, and until then the slot is held."""
        self.background: tuple[Any, asyncio.Task[Any]] | None = None
        """What sealing answered, and the landing that it began."""
        self.table: SegmentTable | None = None
        """Of what has landed."""
        self.sealed_piece: Piece | None = None
        """The last piece of what lands in the background."""

    @property
    def slot_owner(self) -> str:
        return slot_owner(self.uid, self.owner)

    @property
    def next_sequence(self) -> int:
        return 0 if self.last_piece is None else self.last_piece.sequence + 1

    @property
    def whole_in_slot(self) -> Piece | None:
        """All of the blob, if it is sealed, has not landed yet, and the slot holds all of it."""
        piece = self.sealed_piece
        if self.state != "sealed" or self.landing is None or piece is None or piece.sequence:
            return None
        return piece

    @property
    def table_in_slot(self) -> SegmentTable | None:
        """Of the blob that has landed, if the slot holds all of it."""
        piece = self.sealed_piece
        return self.table if piece is not None and not piece.sequence else None

    def check_user(self, uid: int) -> None:
        if uid != self.uid:
            raise PermissionDenied(f"upload session {self.name} belongs to another user")

    def open_landing(self) -> BlobLanding:
        """Where the next bytes go; raises if the session takes no more."""
        if self.state == "ended":
            raise ended(self.name)
        if self.state != "open" or self.landing is None:
            raise Conflict(f"upload session {self.name} is sealed: begin another one")
        return self.landing

    def check_piece(self, piece: Piece) -> None:
        """Refuse what cannot be taken, before anything is changed."""
        self.open_landing()
        if piece.sequence != self.next_sequence:
            raise InvalidRequest(
                f"upload session {self.name} expects piece {self.next_sequence}, got "
                f"{piece.sequence}: send the pieces in order"
            )
        check_limit("segments of a piece", len(piece.cuts), MAX_SEGMENTS_PER_APPEND, "append less")
        check_limit(
            "bytes of a slot",
            piece.slot_offset + piece.num_bytes,
            self.slot.capacity_bytes,
            "append what the slot holds",
        )
        check_cuts(piece.cuts, piece.num_bytes)


def slot_owner(uid: int, owner: str) -> str:
    """Under which name slots are kept warm: never shared between users."""
    return f"{uid}:{owner}"


def check_owner(owner: str) -> str:
    if not owner or len(owner.encode()) > MAX_OWNER_BYTES:
        raise InvalidRequest(f"owner has to be a text of 1 to {MAX_OWNER_BYTES} bytes")
    return owner


def ended(session: str) -> NotFound:
    """The error of a call on a session that is not there (any more)."""
    return NotFound(
        f"upload session {session} has ended (it failed, was aborted or committed, its lease ran "
        "out, or the daemon restarted): begin another one and write the bytes again"
    )
