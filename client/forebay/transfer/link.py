"""The one descriptor-socket connection of a process: made on demand, remade, dropped at fork."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from forebay.forking import watch
from forebay.transfer.connection import HELLO_SECONDS, DescriptorConnection, Hello
from forebay.transfer.wanted import WantedBack
from forebay.waiting import RECONNECT_SECONDS, Backoff, Deadline
from forebay_wire.errors import DaemonUnavailable, ForebayError
from forebay_wire.handover import raise_if_error
from forebay_wire.limits import MAX_DESCRIPTORS_PER_MESSAGE

ANSWER_SECONDS: Final = 300.0
"""Longest wait for one answer: opening may fetch a large blob from the object tier first."""


class DescriptorLink:
    """Requests to the daemon behind one socket path. Thread-safe, fork-safe."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._open: list[DescriptorConnection] = []
        """The connection, if there is one: in a list, so that it can be closed after the link."""
        self._hello: Hello | None = None
        self._serial = 0
        self._releases: deque[tuple[int, str]] = deque()
        self._num_opens = 0
        self.wanted_back = WantedBack()
        watch(self)
        weakref.finalize(self, _close_connections, self._open)

    def request(
        self, body: dict[str, Any], wait_seconds: float = RECONNECT_SECONDS
    ) -> tuple[int, dict[str, Any], list[int]]:
        """``(serial of the connection, answer, descriptors)``; the caller closes the descriptors.

        A broken connection is made again and the request repeated, with back-off, for
        *wait_seconds*; then DaemonUnavailable. So only requests that may be repeated go here.
        """
        deadline = Deadline(wait_seconds)
        backoff = Backoff()
        while True:
            try:
                serial, answer, descriptors = self._request_once(body, deadline)
            except (OSError, DaemonUnavailable) as error:
                if not backoff.pause(deadline):
                    raise self._unavailable(error, wait_seconds) from error
                continue
            self.wanted_back.tell(answer)
            try:
                return serial, raise_if_error(answer), descriptors
            except DaemonUnavailable as error:  # it is draining
                close_all(descriptors)
                self.drop()
                if not backoff.pause(deadline):
                    raise self._unavailable(error, wait_seconds) from error
            except BaseException:
                close_all(descriptors)
                raise

    def hello(self, wait_seconds: float = RECONNECT_SECONDS) -> Hello:
        """What the daemon said when this process connected; connects if need be."""
        deadline = Deadline(wait_seconds)
        backoff = Backoff()
        while True:
            try:
                with self._lock:
                    self._connected(deadline)
                    assert self._hello is not None
                    return self._hello
            except (OSError, DaemonUnavailable) as error:
                if not backoff.pause(deadline):
                    raise self._unavailable(error, wait_seconds) from error

    def count_opens(self, num_blobs: int) -> None:
        """Note that the daemon counts so many more blobs as open."""
        self._num_opens += num_blobs

    def release_later(self, serial: int, blob: str) -> None:
        """Note that one open of *blob* has ended; sent with the next request. Never blocks.

        An open belongs to its connection (*serial*): one that is gone has released it already.
        """
        self._releases.append((serial, blob))

    def flush_releases(self) -> None:
        """Send what has been noted if it is a batch, or the last; best effort."""
        num_noted = len(self._releases)
        if num_noted < min(MAX_DESCRIPTORS_PER_MESSAGE, max(1, self._num_opens)):
            return
        with self._lock:
            if not self._open:
                return
            try:
                self._send_releases(self._open[0])
            except (OSError, ForebayError):
                self._drop_locked()

    def drop(self) -> None:
        """Close the connection, which releases all opens; a later request connects again."""
        with self._lock:
            self._drop_locked()

    def forget_parent(self) -> None:
        """In a child of fork: what was inherited belongs to the parent."""
        self._lock = threading.Lock()
        self._releases = deque()
        self._drop_locked()

    def _request_once(
        self, body: dict[str, Any], deadline: Deadline
    ) -> tuple[int, dict[str, Any], list[int]]:
        with self._lock:
            connection = self._connected(deadline)
            try:
                self._send_releases(connection)
                answer, descriptors = connection.request(body, ANSWER_SECONDS)
            except BaseException:
                # Also KeyboardInterrupt: an answer that nobody read would be taken for the next.
                self._drop_locked()
                raise
            return self._serial, answer, descriptors

    def _connected(self, deadline: Deadline) -> DescriptorConnection:
        if not self._open:
            timeout = max(0.1, min(HELLO_SECONDS, deadline.remaining))
            connection, self._hello = DescriptorConnection.connect(self.path, timeout)
            self._open.append(connection)
            self._serial += 1
            self._num_opens = 0
        return self._open[0]

    def _send_releases(self, connection: DescriptorConnection) -> None:
        blobs = list(self._take_releases())
        for start in range(0, len(blobs), MAX_DESCRIPTORS_PER_MESSAGE):
            piece = blobs[start : start + MAX_DESCRIPTORS_PER_MESSAGE]
            connection.request({"op": "release", "blobs": piece}, ANSWER_SECONDS)

    def _take_releases(self) -> Iterable[str]:
        while self._releases:
            serial, blob = self._releases.popleft()
            if serial == self._serial:
                self._num_opens -= 1
                yield blob

    def _drop_locked(self) -> None:
        _close_connections(self._open)

    def _unavailable(self, error: Exception, seconds: float) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"the daemon at {self.path} has not answered for {seconds:.0f} s ({error}): start it "
            "(forebay serve --data DIR), or look into its log"
        )


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for descriptor in descriptors:
        os.close(descriptor)


def read_whole(descriptor: int, num_bytes: int) -> bytes:
    """All *num_bytes* of a file that the daemon handed over."""
    parts: list[bytes] = []
    done = 0
    while done < num_bytes:
        part = os.pread(descriptor, num_bytes - done, done)
        if not part:
            raise DaemonUnavailable(f"{done} of {num_bytes} bytes were handed over: try again")
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _close_connections(connections: list[DescriptorConnection]) -> None:
    while connections:
        connections.pop().close()
