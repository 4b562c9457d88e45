"""What becomes of a saved generation: waiting for it, and offering it again if need be."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from forebay.checkpoint.service import CheckpointService
from forebay.checkpoint.upload import RESTART_SECONDS, PackUpload
from forebay.waiting import Backoff, Deadline
from forebay_wire.durability import Durability, check_durability, reaches
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

FOLLOW_SECONDS: Final = 5.0
"""The keeper looks this often whether it should stop."""

IDLE_SECONDS: Final = 30.0
"""The keeper's thread ends when it had nothing to follow for so long."""

REMOTE_LOOK_SECONDS: Final = 1.0
"""How long the keeper waits at a time for what may take hours, before it looks at other saves."""

POLL_SECONDS: Final = 10.0
"""Longest single wait that is asked of the daemon."""


class Saved:
    """A generation that all ranks have sealed. Thread-safe.

    It becomes durable by itself, whatever happens to this process; this object only watches. Until
    then it keeps the pack's memory mapped, so that a daemon which restarts meanwhile gets it again.
    """

    skipped = False
    """Whether nothing was saved: only with ``when_busy="skip"``."""

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
        self._reached = Durability.RAM
        self._callbacks: list[tuple[Durability, Callable[[Saved], object]]] = []
        self._notify: Callable[[Saved], object] = lambda saved: None
        self._error: ForebayError | None = None

    @property
    def step(self) -> int:
        return self.generation.step

    @property
    def attempt(self) -> int:
        return self.generation.attempt

    def __repr__(self) -> str:
        return f"<saved {self.generation}, {self._reached or 'being copied'}>"

    @property
    def durability(self) -> Durability:
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
                if self._was_deleted(error):
                    break
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
        generation fail: then it never will. One that was committed and then removed, by retention
        or by somebody, was local: only waiting for more is NotFound.
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
                if self._was_deleted(error):
                    if _reaches(self._reached, durability):
                        return
                    raise
                self._recover(error)
                backoff.pause(deadline)

    async def wait_async(self, durability: str = "local", timeout: float | None = None) -> None:
        """:meth:`wait` for event loops."""
        await asyncio.to_thread(self.wait, durability, timeout)

    def release(self) -> None:
        """Let the pack's memory go: a daemon that restarts can no longer get it again."""
        with self._lock:
            self._upload.close()

    def on(self, durability: str, callback: Callable[[Saved], object]) -> None:
        """Have *callback* called with this object once the generation is at least this durable.

        Once, on the thread that follows saves (here at once if it is so durable already): it may
        call anything of this object and should be quick, as saves are followed one after another.
        What it raises is logged. It is never called for a generation that fails or is deleted, nor
        after the Checkpointer is closed.
        """
        _check(durability)
        with self._lock:
            is_waiting = not _reaches(self._reached, durability)
            if is_waiting:
                self._callbacks.append((Durability(durability), callback))
        if is_waiting:
            self._notify(self)
        else:
            _call(callback, self)

    def tell_to(self, notify: Callable[[Saved], object]) -> None:
        """Have *notify* told when somebody waits for more than ``local``."""
        self._notify = notify

    @property
    def seen(self) -> Durability:
        """What it was when the daemon was asked last."""
        return self._reached

    def forget_callbacks(self) -> None:
        """Call none of them any more."""
        with self._lock:
            self._callbacks.clear()

    @property
    def awaited(self) -> Durability | None:
        """The least that a callback still waits for."""
        with self._lock:
            return min(
                (level for level, _ in self._callbacks), key=list(Durability).index, default=None
            )

    def _note(self, durability: str) -> None:
        with self._lock:
            if not _reaches(self._reached, durability):
                self._reached = Durability(durability)
            due = [one for level, one in self._callbacks if _reaches(self._reached, level)]
            self._callbacks = [
                one for one in self._callbacks if not _reaches(self._reached, one[0])
            ]
        for callback in due:
            _call(callback, self)
        if _reaches(self._reached, "local"):
            self.release()

    def _check_daemon(self) -> None:
        """A daemon that started after the seal lacks this pack, even if it has other ranks'."""
        if not (_reaches(self._reached, "local") or self._upload.is_current):
            self._recover(Conflict(f"generation {self.generation}: the daemon restarted"))

    def _was_deleted(self, error: ForebayError) -> bool:
        """Whether it was local, and retention or somebody deleted it since: nothing failed."""
        if not isinstance(error, NotFound):
            return False
        if not _reaches(self._reached, "local"):
            try:
                self._note(self._service.wait(self.generation, "local", 0.0).durability)
            except (Conflict, NotFound, DeadlineExceeded):
                return False
        return True

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


class SkippedSave(Saved):
    """A save that was skipped on all ranks, for earlier ones were still landing. It is false."""

    skipped = True

    def __init__(self, service: CheckpointService, generation: GenerationId) -> None:
        self.generation = generation
        self.num_bytes = 0
        self._service = service
        self._reached = Durability.NONE

    def __repr__(self) -> str:
        return f"<skipped {self.generation}>"

    def __bool__(self) -> bool:
        return False

    @property
    def durability(self) -> Durability:
        return Durability.NONE

    def reached(self, durability: str) -> bool:
        _check(durability)
        return False

    def wait(self, durability: str = "local", timeout: float | None = None) -> None:
        _check(durability)
        raise InvalidRequest(
            f"generation {self.generation} was skipped, for two earlier saves were still landing "
            "(when_busy='skip'): look at .skipped first"
        )

    def on(self, durability: str, callback: Callable[[Saved], object]) -> None:
        """Never called: nothing was saved."""

    def release(self) -> None:
        """There is nothing to let go of."""


class Keeper:
    """Follows generations until they are local: lets their memory go, or offers them again.

    One thread that lives while there is something to follow and a while longer: a save that starts
    one waits until it runs. ``stop`` ends it. Thread-safe.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: deque[Saved] = deque()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def follow(self, saved: Saved) -> None:
        saved.tell_to(self._follow_again)
        self._follow_again(saved)

    def _follow_again(self, saved: Saved) -> None:
        with self._changed:
            if saved in self._pending or self._is_stopped:
                return
            self._pending.append(saved)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="forebay-checkpoint", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """Follow no more and let all memory go. Does not wait for what is on its way."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
            pending = list(self._pending)
            self._pending.clear()
        for saved in pending:
            saved.release()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_stopped, IDLE_SECONDS)
                if self._is_stopped or not self._pending:
                    self._thread = None
                    return
                saved = self._pending[0]
            if not self._settled(saved):
                continue
            with self._changed:  # a callback that was added meanwhile has it followed on
                if saved in self._pending and saved.awaited is None:
                    self._pending.remove(saved)

    def _settled(self, saved: Saved) -> bool:
        """Whether there is no more to follow; else it has been waited for, for a while."""
        try:
            if not _reaches(saved.seen, "local"):
                saved.wait("local", FOLLOW_SECONDS)
            if (wanted := saved.awaited) is None:
                return True
            # What becomes local comes before what becomes remote: that may take hours.
            with self._changed:
                self._pending.rotate(-1)
            saved.wait(wanted, REMOTE_LOOK_SECONDS)
            return False
        except (DeadlineExceeded, DaemonUnavailable):
            return self._is_stopped
        except ForebayError as error:
            if not (self._is_stopped or isinstance(error, InvalidRequest)):
                _log.error("generation %s will not be saved: %s", saved.generation, error)
            elif saved.awaited is not None:
                _log.warning("generation %s: nobody is told: %s", saved.generation, error)
            saved.forget_callbacks()
            saved.release()
        return True


def _call(callback: Callable[[Saved], object], saved: Saved) -> None:
    try:
        callback(saved)
    except Exception:  # noqa: BLE001 - the user's code; other saves are followed on
        _log.exception("a callback of generation %s failed", saved.generation)


def _reaches(reached: str, wanted: str) -> bool:
    return reaches(Durability(reached), Durability(wanted))


def _check(durability: str) -> None:
    if not durability:
        raise InvalidRequest("durability '' is none: use 'ram', 'local' or 'remote'")
    check_durability(durability)
