"""Control calls of a forked child, made by a small process of its own.

gRPC's threads do not survive a fork, and what they held stays held: in a child, even a channel of
its own hangs or fails now and then. So a child whose parent has used gRPC never touches it: a
process of its own makes its calls (:mod:`forebay._relay_main`), and ends when the child does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Final

from forebay.address import Address
from forebay.methods import Method, Request, Response
from forebay.transfer.endpoint import succeed_endpoint
from forebay_wire.errors import DaemonUnavailable, DeadlineExceeded, rebuild
from forebay_wire.protocol import DataEndpoint

START_SECONDS: Final = 30.0
"""How long the process may take to start on a busy machine."""

_PROGRAM: Final = "from forebay._relay_main import main; main()"
"""Not ``-m``: what is sent are classes of this module, under its name."""

LATE_SECONDS: Final = 10.0
"""How long an answer may come after its deadline: the relay finds out first, and says it better."""


@dataclass(frozen=True)
class Call:
    """One call as it goes to the relay. Without a path: find the daemon and shake hands."""

    path: str
    request: bytes
    seconds: float
    may_start: bool = True
    is_stream: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of a call: answers, or the name and the text of an error."""

    responses: list[bytes]
    endpoint: DataEndpoint | None
    error: tuple[str, str] | None = None


class Relay:
    """A process that makes the control calls of this one, one after the other. Thread-safe."""

    def __init__(self, address: Address, seconds: float, *, may_start: bool) -> None:
        """Find or start the daemon at *address* and shake hands within *seconds*. Raises what
        that raises."""
        self.endpoint: DataEndpoint | None = None
        self.is_lost = False
        self._lock = threading.Lock()
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is for the child: this ends after it
            )
        except OSError as error:
            self._connection.close()
            raise DaemonUnavailable(f"cannot start a process for control calls: {error}") from error
        finally:
            theirs.close()
        try:
            self._send(address)
            self._ask(Call("", b"", seconds, may_start), START_SECONDS)
        except BaseException:
            self.close()
            raise

    def invoke(
        self, method: Method[Request, Response], request: Request, seconds: float
    ) -> Response:
        """The daemon's answer. Raises what it raised."""
        call = Call(method.path, request.SerializeToString(), seconds)
        [found] = self._ask(call)
        return method.response.FromString(found)

    def stream(
        self, method: Method[Request, Response], request: Request, seconds: float
    ) -> list[Response]:
        """All answers of a streaming call."""
        call = Call(method.path, request.SerializeToString(), seconds, is_stream=True)
        return [method.response.FromString(one) for one in self._ask(call)]

    def close(self) -> None:
        """Let the process end. Idempotent; a call in flight fails."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with self._lock:
            self._connection.close()

    def forget_parent(self) -> None:
        """In a child of this process: the relay is its parent's."""
        with suppress(OSError):
            os.close(self._connection.fileno())

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise self._gone(error) from error

    def _ask(self, call: Call, extra_seconds: float = 0.0) -> list[bytes]:
        seconds = call.seconds + extra_seconds
        if not self._lock.acquire(timeout=seconds):
            raise DeadlineExceeded(
                f"another control call of this forked process went on for {seconds:.0f} s"
            )
        try:
            self._send(call)
            if not self._connection.poll(seconds + LATE_SECONDS):
                self.is_lost = True
                raise DeadlineExceeded(f"the relay did not answer within {seconds:.0f} s")
            answer: Answer = self._connection.recv()
        except (OSError, EOFError) as error:
            raise self._gone(error) from error
        finally:
            self._lock.release()
        if answer.endpoint is not None:
            if self.endpoint is not None:
                succeed_endpoint(self.endpoint, answer.endpoint)
            self.endpoint = answer.endpoint
        if answer.error is not None:
            raise rebuild(answer.error[0], "", answer.error[1])
        return answer.responses

    def _gone(self, error: Exception) -> DaemonUnavailable:
        self.is_lost = True
        return DaemonUnavailable(
            f"the process that makes the control calls of this one is gone ({error!r})"
        )
