"""Upload sessions that this process keeps alive."""

from __future__ import annotations

import threading
from typing import Final

from forebay.checkpoint.service import CheckpointService
from forebay.transfer import UploadSlot
from forebay_wire.errors import DaemonUnavailable, DeadlineExceeded, ForebayError
from forebay_wire.limits import KIB
from forebay_wire.v1 import checkpoints_pb2

SLOT_STEP: Final = 256 * KIB
"""Positions and random states are not always equally long; a slot that is a little too small for
the next pack would be of no use to it."""


def slot_size(num_bytes: int) -> int:
    """Of memory asked for to hold *num_bytes*, for packs of about one size the same."""
    return -(-num_bytes // SLOT_STEP) * SLOT_STEP


class Lease:
    """Renews a session while ranks wait for each other or nothing is saved. Thread-safe."""

    def __init__(self, service: CheckpointService, session: str, seconds: float) -> None:
        self._service = service
        self._session = session
        self._seconds = seconds
        self._stop = threading.Event()
        self.is_lost = False
        """Whether the daemon has ended the session."""

    @classmethod
    def hold(cls, service: CheckpointService, session: checkpoints_pb2.PackSession) -> Lease:
        """Renewed from here on, until :meth:`end`."""
        lease = cls(service, session.session, session.lease_seconds)
        threading.Thread(target=lease._renew, name="forebay-lease", daemon=True).start()
        return lease

    def end(self) -> None:
        self._stop.set()

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / 3):
            try:
                self._service.renew(self._session)
            except (DaemonUnavailable, DeadlineExceeded):
                continue  # the next round tries again, and the seal says what is wrong
            except ForebayError:
                self.is_lost = True
                return


class Prepared:
    """A session for this rank's next pack, whatever that holds: its slot mapped, its lease held.

    Whoever takes slot and lease over by :meth:`use` closes the slot and ends the lease.
    """

    def __init__(self, service: CheckpointService, session: checkpoints_pb2.PackSession) -> None:
        self.session = session
        self.slot: UploadSlot = service.slot(session)
        self._lease = Lease.hold(service, session)
        self.is_over = False
        """Whether it was used, or let go of."""

    @property
    def is_lost(self) -> bool:
        """Whether the daemon has ended it: somebody needed what it held, or it restarted."""
        return self._lease.is_lost

    def use(self) -> tuple[UploadSlot, Lease]:
        self.is_over = True
        return self.slot, self._lease

    def let_go(self) -> None:
        """Another session is used: the daemon has ended this one, or will. Idempotent."""
        if not self.is_over:
            self.is_over = True
            self._lease.end()
            self.slot.close()
