"""Control calls of a forked child, made by a small process of its own.

gRPC's threads do not survive a fork, and what they held stays held: in a child, even a channel of
its own hangs or fails now and then. So a child whose parent has used gRPC never touches it: a
process of its own makes its calls (:mod:`forebay._relay_main`), and ends when the child does.

Both ends of their socket are this package in processes of one user, one the child of the other;
what goes over it is a header in JSON and the messages of the wire as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from forebay.address import Address, FolderAddress, SocketAddress, TcpAddress
from forebay.methods import Method, Request, Response
from forebay.transfer.endpoint import succeed_endpoint
from forebay_wire.errors import DaemonUnavailable, DeadlineExceeded, ForebayError, rebuild
from forebay_wire.protocol import DataEndpoint

START_SECONDS: Final = 10.0
"""How much longer the first call may take: the process has to start."""

LATE_SECONDS: Final = 2.0
"""How long an answer may come after its deadline: the relay finds out first, and says it better."""

SEND_SECONDS: Final = 60
"""The relay always reads: if a call cannot be sent for so long, it is not there."""

_PROGRAM: Final = (
    "import sys; sys.path[:] = {path!r}; from forebay._relay_main import main; main({descriptor})"
)
"""With the modules of this process, wherever it has them from."""

_ADDRESSES: Final[dict[str, type[Any]]] = {
    one.__name__: one for one in (FolderAddress, SocketAddress, TcpAddress)
}


def pack(header: dict[str, Any], messages: Sequence[bytes] = ()) -> bytes:
    """One message of the socket."""
    sizes = [len(one) for one in messages]
    return b"".join([json.dumps({**header, "sizes": sizes}).encode(), b"\n", *messages])


def unpack(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """What :func:`pack` made."""
    head, _, body = data.partition(b"\n")
    header: dict[str, Any] = json.loads(head)
    ends = list(itertools.accumulate(header["sizes"], initial=0))
    return header, [body[start:end] for start, end in itertools.pairwise(ends)]


def address_fields(address: Address) -> dict[str, Any]:
    """*address* for JSON."""
    fields = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(address).items()
    }
    return {"kind": type(address).__name__, **fields}


def address_of(fields: dict[str, Any]) -> Address:
    """The address of :func:`address_fields`."""
    given = dict(fields)
    kind = _ADDRESSES[given.pop("kind")]
    for name in ("folder", "path"):
        if name in given:
            given[name] = Path(given[name])
    found: Address = kind(**given)
    return found


class Relay:
    """A process that makes the control calls of this one. Thread-safe; calls go side by side."""

    def __init__(self, address: Address, seconds: float, *, may_start: bool) -> None:
        """Find or start the daemon at *address* and shake hands within *seconds*. Raises what
        that raises."""
        self.endpoint: DataEndpoint | None = None
        self.is_lost = False
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[list[bytes]]] = {}
        self._start()
        threading.Thread(target=self._receive, name="forebay-relay", daemon=True).start()
        try:
            given = {"address": address_fields(address), "may_start": may_start}
            self._ask(given, b"", seconds, START_SECONDS)
        except BaseException as error:
            status = self._process.poll()
            self.close()
            if status is not None:
                raise ForebayError(
                    "the process that was to make control calls for this one, which was forked, "
                    f"ended with status {status}: start this one by forkserver or spawn"
                ) from error
            raise

    def invoke(
        self, method: Method[Request, Response], request: Request, seconds: float
    ) -> Response:
        """The daemon's answer. Raises what it raised."""
        [found] = self._call(method, request, seconds, is_stream=False)
        return method.response.FromString(found)

    def stream(
        self, method: Method[Request, Response], request: Request, seconds: float
    ) -> list[Response]:
        """All answers of a streaming call."""
        found = self._call(method, request, seconds, is_stream=True)
        return [method.response.FromString(one) for one in found]

    def close(self) -> None:
        """End the process. Idempotent; calls in flight fail."""
        self.is_lost = True
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def forget_parent(self) -> None:
        """In a child of this process: the relay is its parent's."""
        with suppress(OSError):
            os.close(self._connection.fileno())

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            timeout = struct.pack("ll", SEND_SECONDS, 0)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            program = _PROGRAM.format(path=sys.path, descriptor=theirs.fileno())
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a Ctrl-C is for the child: this ends after it
                )
            except OSError as error:
                raise ForebayError(
                    f"cannot start a process for control calls: {error.strerror}"
                ) from error
            self._connection = Connection(ours.detach())

    def _call(
        self, method: Method[Any, Any], request: Any, seconds: float, *, is_stream: bool
    ) -> list[bytes]:
        header = {"path": method.path, "is_stream": is_stream}
        return self._ask(header, request.SerializeToString(), seconds)

    def _ask(
        self, header: dict[str, Any], request: bytes, seconds: float, extra_seconds: float = 0.0
    ) -> list[bytes]:
        answer: Future[list[bytes]] = Future()
        number = next(self._numbers)
        with self._lock:
            if self.is_lost:
                raise self._gone("it ended")
            self._waiting[number] = answer
        try:
            try:
                with self._sending:
                    self._connection.send_bytes(
                        pack({**header, "number": number, "seconds": seconds}, [request])
                    )
            except OSError as error:
                self._lose(error)
            return answer.result(seconds + extra_seconds + LATE_SECONDS)
        except FutureTimeout as error:
            if answer.done():  # what the daemon, or the relay, said
                raise
            raise DeadlineExceeded(f"there was no answer within {seconds:.1f} s") from error
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def _receive(self) -> None:
        """The thread: hands answers to those who wait for them."""
        try:
            while True:
                self._take(*unpack(self._connection.recv_bytes()))
        except (OSError, EOFError) as error:
            self._lose(error)
            self._connection.close()

    def _take(self, header: dict[str, Any], messages: list[bytes]) -> None:
        with self._lock:
            answer = self._waiting.get(header["number"])
        if header["endpoint"] is not None:
            endpoint = DataEndpoint(**header["endpoint"])
            if self.endpoint is not None:
                succeed_endpoint(self.endpoint, endpoint)
            self.endpoint = endpoint
        if answer is None:
            return  # nobody waits any more
        if header["error"] is not None:
            name, text = header["error"]
            answer.set_exception(rebuild(name, "", text))
        else:
            answer.set_result(messages)

    def _lose(self, error: Exception) -> None:
        with self._lock:
            self.is_lost = True
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(self._gone(repr(error)))

    def _gone(self, why: str) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"the process that makes the control calls of this one is gone ({why})"
        )
