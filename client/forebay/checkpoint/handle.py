"""What becomes of a saved generation: waiting for it, and offering it again if need be."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from typing import Final

from forebay.checkpoint.service import CheckpointService
from forebay.checkpoint.upload import RESTART_SECONDS, PackUpload
from forebay.waiting import Backoff, Deadline
from forebay_wire.errors import (
    Conflict,
    DaemonUnavailable,
    DeadlineExceeded,
    ForebayError,
    InvalidRequest,
    NotFound,
)
from forebay_wire.ids import GenerationId

_log = logging.getLogger(__name__)

DURABILITIES: Final = ("", "ram", "local", "remote")
"""Weakest first."""

FOLLOW_SECONDS: Final = 5.0
"""The keeper looks this often whether it should stop."""

POLL_SECONDS: Final = 10.0
"""Longest single wait that is asked of the daemon."""


class Saved:
    """A generation that all ranks have sealed. Thread-safe.

    It becomes durable by itself, whatever happens to this process; this object only watches. Until
    then it keeps the pack's memory mapped, so that a daemon which restarts meanwhile gets it again.
    """

    def __init__(
        self,
        service: CheckpointService,
        generation: GenerationId,
        upload: PackUpload,
        timeout: float,
    ) -> None:
        self.generation = generation
        self.num_bytes = upload.num_bytes
        """Of this rank's pack."""
        self._service = service
        self._upload = upload
        self._timeout = timeout
        self._lock = threading.Lock()
        self._reached = "ram"
        self._error: ForebayError | None = None

    @property
    def step(self) -> int:
        return self.generation.step

    @property
    def attempt(self) -> int:
        return self.generation.attempt

    def __repr__(self) -> str:
        return f"<saved {self.generation}, {self._reached}>"

    @property
    def durability(self) -> str:
        """``"ram"``, ``"local"`` or ``"remote"``, as the daemon has it now.

        Raises what made the generation fail, or DaemonUnavailable.
        """
        for wanted in ("remote", "local"):
            if _reaches(self._reached, wanted):
                break
            try:
                self._check_daemon()
                self._note(self._service.wait(self.generation, wanted, 0.0).durability)
                break
            except DeadlineExceeded:
                continue
            except (Conflict, NotFound) as error:
                self._recover(error)
        return self._reached

    def reached(self, durability: str) -> bool:
        """Whether the generation is at least this durable."""
        _check(durability)
        return _reaches(self._reached, durability) or _reaches(self.durability, durability)

    def wait(self, durability: str = "local", timeout: float | None = None) -> None:
        """Return once the generation is at least this durable.

        Raises DeadlineExceeded after *timeout* seconds (default: the Checkpointer's), and it may
        still get there later; DaemonUnavailable if no daemon answered by then; or what made the
        generation fail: then it never will.
        """
        _check(durability)
        deadline = Deadline(self._timeout if timeout is None else timeout)
        backoff = Backoff()
        while not _reaches(self._reached, durability):
            if self._error is not None:
                raise self._error
            try:
                self._check_daemon()
                seconds = min(POLL_SECONDS, deadline.remaining)
                self._note(self._service.wait(self.generation, durability, seconds).durability)
            except DeadlineExceeded:
                if deadline.expired:
                    raise
            except DaemonUnavailable:
                if not backoff.pause(deadline):
                    raise
            except (Conflict, NotFound) as error:
                self._recover(error)
                backoff.pause(deadline)

    async def wait_async(self, durability: str = "local", timeout: float | None = None) -> None:
        """:meth:`wait` for event loops."""
        await asyncio.to_thread(self.wait, durability, timeout)

    def release(self) -> None:
        """Let the pack's memory go: a daemon that restarts can no longer get it again."""
        with self._lock:
            self._upload.close()

    def _note(self, durability: str) -> None:
        if not _reaches(self._reached, durability):
            self._reached = durability
        if _reaches(self._reached, "local"):
            self.release()

    def _check_daemon(self) -> None:
        """A daemon that started after the seal lacks this pack, even if it has other ranks'."""
        if not (_reaches(self._reached, "local") or self._upload.is_current):
            self._recover(Conflict(f"generation {self.generation}: the daemon restarted"))

    def _recover(self, error: ForebayError) -> None:
        """The daemon may not have the generation (any more): offer it this rank's pack again.

        Raises *error* if that cannot help; returns if it may be asked again.
        """
        with self._lock:
            found = self._service.look(self.generation)
            if found is not None and found.state not in ("open", "aborted"):
                return  # it changed meanwhile: ask again
            if self._upload.is_current:
                if found is not None and found.state == "open" and not found.error:
                    return  # another thread has offered it, other ranks have not yet
                self._fail(error)  # deleted, fenced off, or a rank's pack is missing for good
            if not self._upload.can_offer_again:
                self._fail(self._upload.lost(error))
            _log.warning("offering generation %s to the daemon again: %s", self.generation, error)
            try:
                self._upload.offer_again(Deadline(RESTART_SECONDS))
            except (DaemonUnavailable, DeadlineExceeded, NotFound):
                return  # it restarted once more, or is slow: the next question finds out
            except ForebayError as refused:
                self._fail(refused)

    def _fail(self, error: ForebayError) -> None:
        self._error = error
        self._upload.close()
        raise error


class Keeper:
    """Follows generations until they are local: lets their memory go, or offers them again.

    One thread that lives while there is something to follow; ``stop`` ends it. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: deque[Saved] = deque()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def follow(self, saved: Saved) -> None:
        with self._lock:
            self._pending.append(saved)
            if self._thread is None and not self._is_stopped:
                self._thread = threading.Thread(
                    target=self._run, name="forebay-checkpoint", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """Follow no more and let all memory go. Does not wait for what is on its way."""
        with self._lock:
            self._is_stopped = True
            pending = list(self._pending)
            self._pending.clear()
        for saved in pending:
            saved.release()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_stopped or not self._pending:
                    self._thread = None
                    return
                saved = self._pending[0]
            if not self._settled(saved):
                continue
            with self._lock:
                if self._pending and self._pending[0] is saved:
                    self._pending.popleft()

    def _settled(self, saved: Saved) -> bool:
        try:
            saved.wait("local", FOLLOW_SECONDS)
        except (DeadlineExceeded, DaemonUnavailable):
            return self._is_stopped
        except ForebayError as error:
            if not (self._is_stopped or isinstance(error, InvalidRequest)):
                _log.error("generation %s will not be saved: %s", saved.generation, error)
            saved.release()
        return True


def _reaches(reached: str, wanted: str) -> bool:
    return DURABILITIES.index(reached) >= DURABILITIES.index(wanted)


def _check(durability: str) -> None:
    if durability not in DURABILITIES[1:]:
        raise InvalidRequest(f"durability {durability!r} is unknown: use 'ram', 'local', 'remote'")
