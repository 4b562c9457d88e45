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
        self._connection: DescriptorConnection | None = None
        self._hello: Hello | None = None
        self._serial = 0
        self._releases: deque[tuple[int, str]] = deque()
        watch(self)
        weakref.finalize(self, _close, self.__dict__).atexit = False

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

    def release_later(self, serial: int, blob: str) -> None:
        """Note that one open of *blob* has ended; sent with the next request. Never blocks.

        An open belongs to its connection (*serial*): one that is gone has released it already.
        """
        self._releases.append((serial, blob))

    def flush_releases(self, at_least: int = MAX_DESCRIPTORS_PER_MESSAGE) -> None:
        """Send what has been noted if it is *at_least* so many; best effort."""
        if len(self._releases) < at_least:
            return
        with self._lock:
            if self._connection is None:
                return
            try:
                self._send_releases(self._connection)
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
        if self._connection is None:
            timeout = max(0.1, min(HELLO_SECONDS, deadline.remaining))
            self._connection, self._hello = DescriptorConnection.connect(self.path, timeout)
            self._serial += 1
        return self._connection

    def _send_releases(self, connection: DescriptorConnection) -> None:
        blobs = list(self._take_releases())
        for start in range(0, len(blobs), MAX_DESCRIPTORS_PER_MESSAGE):
            piece = blobs[start : start + MAX_DESCRIPTORS_PER_MESSAGE]
            connection.request({"op": "release", "blobs": piece}, ANSWER_SECONDS)

    def _take_releases(self) -> Iterable[str]:
        while self._releases:
            serial, blob = self._releases.popleft()
            if serial == self._serial:
                yield blob

    def _drop_locked(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _unavailable(self, error: Exception, seconds: float) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"the daemon at {self.path} has not answered for {seconds:.0f} s ({error}): start it "
            "(forebay serve --data DIR), or look into its log"
        )


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for descriptor in descriptors:
        os.close(descriptor)


def _close(state: dict[str, Any]) -> None:
    connection = state.get("_connection")
    if connection is not None:
        connection.close()
