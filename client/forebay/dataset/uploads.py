"""The upload sessions of one writer: begun, sealed, kept alive, ended."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

from forebay.methods import Blobs, Method, Request, Response
from forebay.transfer import Transfer, UploadSlot
from forebay_wire.errors import DaemonUnavailable, DeadlineExceeded, ForebayError, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MIB
from forebay_wire.v1 import blobs_pb2

SEAL_SECONDS: Final = 600.0
"""A seal returns when the blob is fsynced: on a slow disk that takes a while."""

RENEW_SECONDS: Final = 10.0

LAND_BYTES: Final = 16 * MIB
"""Fewer wait for more, or for the seal: each piece is a call."""


class Channel(Protocol):
    """The control connection, as far as writing needs it."""

    def call(
        self, method: Method[Request, Response], request: Request, *, timeout: float = ...
    ) -> Response: ...


@dataclass
class Upload:
    """One session with its slot."""

    session: str
    slot: UploadSlot
    lease_seconds: float
    landed_bytes: int = 0
    """From the slot's start, so many are the daemon's already, or on their way."""
    num_segments: int = 0
    """Of those."""
    num_pieces: int = 0
    landing: Future[None] | None = None
    """Of the newest of them."""


class Uploads:
    """Sessions of one owner; a thread renews their leases while this object lives. Thread-safe."""

    def __init__(self, channel: Channel, transfer: Transfer, what: str) -> None:
        """*what* is written, for people who look at the daemon."""
        self._channel = channel
        self._transfer = transfer
        # The daemon reuses slots, and renews leases, per owner: two writers may not be the same.
        self._owner = f"{what} writer {new_random_name()}"
        self._lock = threading.Lock()
        self._live: dict[str, Upload] = {}
        self._sealed: set[str] = set()
        self._lost: ForebayError | None = None
        self._stop = threading.Event()
        self._renewer: threading.Thread | None = None
        self._lander = ThreadPoolExecutor(1, thread_name_prefix="forebay-land")

    def begin(self, num_bytes: int, minimum_bytes: int = 0) -> Upload:
        """Open a session for a blob of at most *num_bytes*, all of it in one slot.

        Where memory or room is short the slot is smaller; with *minimum_bytes* the daemon may go
        down to that, else only memory makes it smaller.
        """
        granted = self._channel.call(
            Blobs.BeginUpload,
            blobs_pb2.BeginUploadRequest(
                total_bytes=num_bytes,
                slot_bytes=num_bytes,
                owner=self._owner,
                minimum_bytes=minimum_bytes,
            ),
        )
        slot = self._transfer.upload_slot(
            granted.session,
            granted.slot_bytes,
            granted.put_ticket,
            lambda: self._renew(granted.session).put_ticket,
        )
        upload = Upload(granted.session, slot, granted.lease_seconds)
        with self._lock:
            self._live[upload.session] = upload
        self._start_renewing(granted.lease_seconds)
        return upload

    def land(self, upload: Upload, num_bytes: int, cuts: Callable[[], Sequence[int]]) -> None:
        """The first *num_bytes* of the slot will not change any more, and are to be cut as *cuts*
        says: have the daemon bring them to its disk while the rest is filled.

        Does so if they are enough to be worth it and what was brought before has arrived; never
        blocks. What goes wrong is raised by :meth:`seal`.
        """
        before = upload.landing
        if num_bytes - upload.landed_bytes < LAND_BYTES:
            return
        if before is not None and (not before.done() or before.exception() is not None):
            return
        found = cuts()
        request = blobs_pb2.AppendRequest(
            session=upload.session,
            sequence=upload.num_pieces,
            num_bytes=num_bytes - upload.landed_bytes,
            cuts=found[upload.num_segments :],
            slot_offset=upload.landed_bytes,
        )
        upload.landing = self._lander.submit(self._append, upload.slot, request)
        upload.landed_bytes, upload.num_segments = num_bytes, len(found)
        upload.num_pieces += 1

    def _append(self, slot: UploadSlot, request: blobs_pb2.AppendRequest) -> None:
        slot.flush(request.slot_offset + request.num_bytes, request.slot_offset)
        self._channel.call(Blobs.Append, request, timeout=SEAL_SECONDS)

    def seal(self, upload: Upload, num_bytes: int, cuts: Sequence[int]) -> blobs_pb2.SealedBlob:
        """Publish the first *num_bytes* of the slot as the blob; durable on return.

        *cuts* begin with those that :meth:`land` was told. The session lives on until the commit
        that names it. The slot is let go.
        """
        if upload.landing is not None:
            upload.landing.result()
        upload.slot.flush(num_bytes, upload.landed_bytes)
        request = blobs_pb2.SealRequest(
            session=upload.session,
            sequence=upload.num_pieces,
            num_bytes=num_bytes - upload.landed_bytes,
            cuts=cuts[upload.num_segments :],
            slot_offset=upload.landed_bytes,
        )
        sealed = self._channel.call(Blobs.Seal, request, timeout=SEAL_SECONDS)
        upload.slot.close()
        with self._lock:
            self._sealed.add(upload.session)
        return sealed

    def check(self) -> None:
        """Raise if a session was lost (its lease ended while this process could not renew it)."""
        if self._lost is not None:
            raise self._lost

    def end(self, *, committed: bool) -> None:
        """Stop renewing and let go of all slots; abort the sessions unless *committed*.

        Idempotent. A daemon that cannot be reached ends the sessions by their leases.
        """
        self._stop.set()
        self._lander.shutdown(cancel_futures=True)
        if self._renewer is not None:
            self._renewer.join()
        with self._lock:
            uploads = list(self._live.values())
            self._live.clear()
            self._sealed.clear()
        for upload in uploads:
            upload.slot.close()
            if not committed:
                with contextlib.suppress(ForebayError):
                    self._channel.call(
                        Blobs.Abort,
                        blobs_pb2.AbortRequest(session=upload.session),
                        timeout=RENEW_SECONDS,
                    )

    def _renew(self, session: str) -> blobs_pb2.UploadSession:
        return self._channel.call(
            Blobs.Renew, blobs_pb2.RenewRequest(session=session), timeout=RENEW_SECONDS
        )

    def renew_all(self) -> None:
        """Renew every lease once.

        One sealed session stands for all: the daemon renews with it what else its owner sealed.
        """
        with self._lock:
            sessions = [session for session in self._live if session not in self._sealed]
            sessions.extend(itertools.islice(self._sealed, 1))
        for session in sessions:
            if self._stop.is_set():
                return
            try:
                self._renew(session)
            except (DaemonUnavailable, DeadlineExceeded):
                return  # the next round tries again, and the seal or commit says what is wrong
            except NotFound as error:
                self._lost = error

    def _start_renewing(self, lease_seconds: float) -> None:
        if self._renewer is None:
            self._renewer = threading.Thread(
                target=_renew_in_turns,
                args=(weakref.ref(self), self._stop, lease_seconds / 3),
                name="forebay-lease",
                daemon=True,
            )
            self._renewer.start()


def _renew_in_turns(
    uploads: weakref.ref[Uploads], stop: threading.Event, pause_seconds: float
) -> None:
    """Until *stop*, or until nobody holds the writer any more: then the leases end."""
    while not stop.wait(pause_seconds):
        alive = uploads()
        if alive is None:
            return
        alive.renew_all()
        del alive
