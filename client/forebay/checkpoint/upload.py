"""One rank's pack on its way to the daemon: begin, copy, seal; again if the daemon restarts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, TypeVar

from forebay.checkpoint.layout import Piece, pieces
from forebay.checkpoint.lease import Lease, Prepared, slot_size
from forebay.checkpoint.samples import check_staged
from forebay.checkpoint.service import CheckpointService, PackTerms, PlanAsk
from forebay.checkpoint.snapshot import Pack, Source
from forebay.transfer import UploadSlot
from forebay.transfer.blob import copy
from forebay.waiting import Backoff, Deadline
from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    ForebayError,
    ResourceExhausted,
)
from forebay_wire.failpoints import failpoint
from forebay_wire.v1 import checkpoints_pb2

_log = logging.getLogger(__name__)

T = TypeVar("T")

RESTART_SECONDS: Final = 60.0
"""How long a rank tries to bring its pack to a daemon that restarted."""


REUSE: Final = "reuse"
"""The verdict by which a pack may be begun at once."""


@dataclass
class _Copied:
    """What is in the slot and has not been sealed."""

    num_bytes: int
    cuts: tuple[int, ...]
    description_bytes: int


class PackUpload:
    """A pack and its upload session. Not thread-safe; ``close`` lets the slot go."""

    def __init__(self, service: CheckpointService, terms: PackTerms, pack: Pack) -> None:
        self._service = service
        self.terms = terms
        self.num_bytes = pack.num_bytes
        self._pack: Pack | None = pack
        self._session: checkpoints_pb2.PackSession | None = None
        self._slot: UploadSlot | None = None
        self._lease: Lease | None = None
        self._incarnation = ""
        self._sequence = 0
        self._copied: _Copied | None = None
        self.was_ahead = False
        """Whether the daemon gave it a session that had been asked for ahead."""
        self._slot_bytes = 0
        self._is_laid_down = False
        """Whether the sources are in the slot already."""
        self.stall_seconds = 0.0
        """How long this save has held its rank up so far; kept with the generation."""
        self.reason = ""
        """Why the daemon did not let this begin."""

    @property
    def was_chunked(self) -> bool:
        """Whether the slot was too small, so that the bytes went through it piece by piece."""
        return self._sequence > 0

    @property
    def slot_bytes(self) -> int:
        """Of memory that the pack takes at once, once it is copied."""
        return self._slot_bytes

    @property
    def is_begun(self) -> bool:
        return self._session is not None

    def begin(
        self,
        deadline: Deadline,
        ask: PlanAsk | None = None,
        prepared: Prepared | None = None,
        *,
        copies: bool = False,
    ) -> str:
        """Begin the session; with *ask* only if all ranks may reuse their plan: the verdict.

        Room for all of the pack is reserved on return. The daemon may give it the session that was
        *prepared*; with *copies* the bytes are copied there while it makes up its mind, to no
        purpose if it decides otherwise.
        """
        assert self._pack is not None
        failpoint("client.save.after_plan")
        pack, end = self._pack, self._pack.num_bytes + len(self._pack.description)

        def call() -> checkpoints_pb2.PackSession:
            return self._service.begin_pack(
                self.terms, self.num_bytes, slot_size(end), deadline.remaining, ask
            )

        if prepared is None or not copies or prepared.session.slot_bytes < end:
            verdict = self._begun(call(), prepared)
        else:
            answering = beside(call)
            try:
                pack.copy_into(prepared.slot.buffer, 0, pack.num_bytes)
            except BaseException:
                self._begun(answering.result(), prepared)
                self.abort()
                raise
            verdict = self._begun(answering.result(), prepared)
            self._is_laid_down = self._slot is prepared.slot
        if self.is_begun:
            failpoint("client.save.after_begin")
        return verdict

    @property
    def fits_slot(self) -> bool:
        """Whether the slot holds all of the pack at once."""
        assert self._pack is not None
        assert self._session is not None
        return self._pack.num_bytes + len(self._pack.description) <= self._session.slot_bytes

    def copy(self, deadline: Deadline) -> None:
        """Bring the pack's bytes into the daemon's memory, in a session that this begins if needed.

        On return the state may change again. A slot that is too small for all of it makes this
        wait for the daemon to write the first pieces to disk.
        """
        assert self._pack is not None
        pack, description = self._pack, self._pack.description
        if not self.is_begun:
            self.begin(deadline)
        assert self._session is not None
        assert self._slot is not None
        if self._is_laid_down:
            check_staged(pack.sources, self._slot.buffer)
            self.finish()
            return
        capacity = self._session.slot_bytes
        if capacity < len(description):
            raise ResourceExhausted(
                f"the slot granted has {capacity} bytes and the description of the pack alone "
                f"needs {len(description)}: give the ram tier more room"
            )
        parts = list(pieces(pack.layout.cuts, capacity)) or [Piece(0, 0, ())]
        for piece in parts[:-1]:
            self._append(piece, deadline)
        last = parts[-1]
        if last.num_bytes + len(description) > capacity:
            self._append(last, deadline)
            last = Piece(last.stop, last.stop, ())
        self._fill(last)
        if not self.was_chunked:
            check_staged(pack.sources, self._slot.buffer)
        self._finish(last)

    def copy_some(self, chosen: Collection[Source]) -> memoryview:
        """Copy these of the pack's sources, and the padding; the memory for the others.

        Only where the slot fits all. Then :meth:`finish` says that the rest is there, too.
        """
        assert self._pack is not None
        assert self._slot is not None
        failpoint("client.save.in_copy")
        self._pack.copy_some(self._slot.buffer, 0, self._pack.num_bytes, chosen)
        return self._slot.buffer

    def finish(self) -> None:
        """All sources are in the slot: add what describes them."""
        assert self._pack is not None
        self._finish(Piece(0, self._pack.num_bytes, tuple(self._pack.layout.cuts)))

    def _finish(self, last: Piece) -> None:
        assert self._pack is not None
        assert self._slot is not None
        description = self._pack.description
        end = last.num_bytes + len(description)
        copy(self._slot.buffer[last.num_bytes : end], memoryview(description))
        self._slot.flush(end)
        self._copied = _Copied(last.num_bytes, last.cuts, len(description))
        self._slot_bytes = end
        self._pack = None  # it refers to the live state, which may change from here on
        failpoint("client.save.after_copy")

    def seal(self) -> bool:
        """Hand the pack over: the daemon lands it without this process. True if all ranks have."""
        assert self._session is not None
        assert self._copied is not None
        terms = self.terms
        sealed = self._service.seal_pack(
            checkpoints_pb2.SealPackRequest(
                session=self._session.session,
                sequence=self._sequence,
                num_bytes=self._copied.num_bytes,
                cuts=self._copied.cuts,
                description_bytes=self._copied.description_bytes,
                metrics_json=terms.metrics_json,
                dataset_json=terms.dataset_json,
                stall_seconds=self.stall_seconds,
                tags=terms.tags,
                note_json=terms.note_json,
            )
        )
        self._end_lease()
        failpoint("client.save.after_seal")
        return sealed

    @property
    def is_current(self) -> bool:
        """Whether the daemon that granted the slot still runs: then it has what it was given, and
        offering it again is pointless."""
        return self._service.incarnation == self._incarnation

    @property
    def can_offer_again(self) -> bool:
        """Whether all of the pack still lies in memory that this process maps."""
        return self._why_lost is None

    @property
    def _why_lost(self) -> str | None:
        if self._slot is None or self._copied is None:
            return "this process has let go of its bytes"
        if self.was_chunked:
            return "its bytes went piece by piece and are not in this process any more"
        if not self._slot.is_intact:
            return "a later save has been given the memory that held it"
        return None

    def lost(self, error: ForebayError) -> ForebayError:
        """*error*, which offering the pack again would mend, with the reason why it cannot."""
        return Conflict(
            f"generation {self.terms.generation} is lost, for its pack cannot be offered to the "
            f"daemon again: {self._why_lost}; save another step ({error})"
        )

    def offer_again(self, deadline: Deadline) -> None:
        """Give a restarted daemon the pack again, out of the old slot's memory."""
        try:
            past_restart(self._service, self.terms, lambda: self._offer(deadline), deadline)
        except AlreadyExists:  # an earlier offer arrived, and only its answer was lost
            self._incarnation = self._service.incarnation

    def _offer(self, deadline: Deadline) -> None:
        old, copied, incarnation = self._slot, self._copied, self._incarnation
        assert copied is not None
        assert old is not None
        self._slot = None
        try:
            end = copied.num_bytes + copied.description_bytes
            self._begun(
                self._service.begin_pack(
                    self.terms, self.num_bytes, slot_size(end), deadline.remaining
                ),
                None,
            )
            assert self._session is not None
            slot: UploadSlot | None = self._slot
            assert slot is not None
            if self._session.slot_bytes < end:
                raise ResourceExhausted(
                    f"the restarted daemon grants {self._session.slot_bytes} bytes of memory and "
                    f"the pack of {self.terms.generation} needs {end}: save the step again"
                )
            copy(slot.buffer[:end], old.buffer[:end])
            slot.flush(end)
            self.seal()
        except BaseException:
            self.abort()
            self._slot, self._incarnation = old, incarnation
            raise
        old.close()

    def end_unsealed(self) -> None:
        """End the session if it is not sealed; the slot's memory stays mapped. Idempotent."""
        self._end_lease()
        if self._session is not None:
            self._service.abort(self._session.session)

    def abort(self) -> None:
        """Drop the session and the slot. Idempotent; a sealed pack is not affected."""
        session, self._session = self._session, None
        if session is not None:
            self._service.abort(session.session)
        self.close()

    def close(self) -> None:
        """Let the slot's memory go; the pack can no longer be offered again. Idempotent."""
        self._end_lease()
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.close()

    def _begun(self, answer: checkpoints_pb2.PackSession, prepared: Prepared | None) -> str:
        """The verdict; takes over what the daemon has granted."""
        self._end_lease()
        self._session = None
        self._incarnation = answer.incarnation
        self.reason = answer.reason
        if not answer.session:
            return str(answer.verdict)
        self._session = answer
        self.was_ahead = answer.was_prepared
        if prepared is not None and prepared.session.session == answer.session:
            self._slot, self._lease = prepared.use()
            return REUSE
        if prepared is not None:
            prepared.let_go()
        self._lease = Lease.hold(self._service, answer)
        self._slot = self._service.slot(answer)
        return REUSE

    def _end_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()

    def _append(self, piece: Piece, deadline: Deadline) -> None:
        assert self._session is not None
        assert self._slot is not None
        if not self._sequence:
            _log.warning(
                "generation %s: the pack has %d bytes and the daemon's memory gave %d; saving "
                "piece by piece, which blocks the training longer (raise the ram tier's limit)",
                self.terms.generation,
                self.num_bytes,
                self._session.slot_bytes,
            )
        self._fill(piece)
        self._slot.flush(piece.num_bytes)
        self._service.append(
            self._session.session, self._sequence, piece.num_bytes, piece.cuts, deadline.remaining
        )
        self._sequence += 1

    def _fill(self, piece: Piece) -> None:
        assert self._pack is not None
        assert self._slot is not None
        failpoint("client.save.in_copy")
        self._pack.copy_into(self._slot.buffer, piece.start, piece.stop)


def beside(act: Callable[[], T]) -> Future[T]:
    """*act* on a thread of its own, which ends with it."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # noqa: BLE001 - goes to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, name="forebay-call", daemon=True).start()
    return future


def past_restart(
    service: CheckpointService, terms: PackTerms, act: Callable[[], T], deadline: Deadline
) -> T:
    """*act*, which begins a pack, again if the daemon restarts in the middle of it.

    The restarted one has aborted the generation; whichever rank begins its pack first reopens it.
    """
    backoff = Backoff()
    while True:
        try:
            return act()
        except Conflict as error:
            found = service.look(terms.generation)
            if (found is not None and found.state != "aborted") or not backoff.pause(deadline):
                raise
            _log.warning("beginning generation %s again: %s", terms.generation, error)
