"""A real daemon in a process of its own, for tests: started, waited for, killed, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from forebay_server.testing.warm import WarmProcess, WarmPython
from forebay_wire.protocol import ADDRESS_FILE_NAME

START_SECONDS: Final = 40.0
STOP_SECONDS: Final = 40.0
POLL_SECONDS: Final = 0.02
LOG_FILE_NAME: Final = "test-daemon.log"


def run_server(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m forebay_server WORDS`` to its end; *environment* is added to this process's."""
    command = ["-m", "forebay_server", *map(str, words)]
    all_of_it = {**os.environ, **environment}
    warm = DaemonProcess.warm
    if warm is not None and warm.can_start(all_of_it):
        return warm.run(command, environment)
    return subprocess.run(
        [sys.executable, *command], env=all_of_it, capture_output=True, text=True, timeout=100
    )


class DaemonFailed(AssertionError):
    """The daemon did not do what the test waited for; carries the end of its log."""


class DaemonProcess:
    """``python -m forebay_server serve`` on one data folder.

    A context manager: it starts the daemon, waits until it serves, and ends it. Environment of the
    test's process plus *environment*; the daemon's output is appended to a file beside the data.
    Not thread-safe.
    """

    warm: ClassVar[WarmPython | None] = None
    """Starts the daemons that need no Python of their own, where set."""

    def __init__(
        self,
        data: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """*prefix* are words before the command: a program that watches it as its child."""
        self.data = data
        self.prefix = prefix
        self.arguments: Sequence[str] = arguments
        self.environment = dict(environment or {})
        self.process: subprocess.Popen[bytes] | WarmProcess | None = None

    def __enter__(self) -> Self:
        try:
            return self.start().wait_ready()
        except BaseException:
            self.kill()
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None:
            exc.add_note(f"the daemon's log ends with:\n{self.log_tail()}")
        try:
            self.terminate()
        finally:
            self.kill()

    @property
    def log_path(self) -> Path:
        return self.data.parent / f"{self.data.name}-{LOG_FILE_NAME}"

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    def start(self, *, environment: Mapping[str, str] | None = None) -> Self:
        """Start the process, and do not wait; *environment* is for this start only."""
        assert self.process is None or self.process.poll() is not None, "it runs already"
        words = ["-m", "forebay_server", "serve", "--data", str(self.data), *self.arguments]
        environment = {**os.environ, **self.environment, **(environment or {})}
        with self.log_path.open("ab") as log, open(os.devnull, "rb") as nothing:
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            if self.warm is not None and not self.prefix and self.warm.can_start(environment):
                self.process = self.warm.start(words, environment, *streams)
            else:
                command = [*self.prefix, sys.executable, *words]
                stdin, stdout, stderr = streams
                self.process = subprocess.Popen(
                    command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment
                )
        return self

    def wait_ready(self, seconds: float = START_SECONDS) -> Self:
        """Wait until this very process has written its addresses: everything listens then."""
        self._wait(lambda: self.address_or_none() is not None, seconds, "serve")
        return self

    def wait_exit(self, seconds: float = STOP_SECONDS) -> int:
        """Wait until the process ended; its exit status (negative: the signal's number)."""
        assert self.process is not None, "not started"
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise DaemonFailed(
                f"daemon {self.pid} did not end in {seconds} s:\n{self.log_tail()}"
            ) from None

    def kill(self) -> None:
        """End it with SIGKILL: nothing of it runs after this. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self, seconds: float = STOP_SECONDS) -> int | None:
        """Ask it to drain and stop; its exit status, None if it never ran. Idempotent."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait_exit(seconds)

    def restart(self, *, environment: Mapping[str, str] | None = None) -> Self:
        """Kill it, start it again on the same folder, wait until it serves."""
        self.kill()
        return self.start(environment=environment).wait_ready()

    def address(self) -> dict[str, Any]:
        """The content of ``daemon.json`` that this process wrote."""
        found = self.address_or_none()
        if found is None:
            raise DaemonFailed(f"no daemon serves {self.data}:\n{self.log_tail()}")
        return found

    def address_or_none(self) -> dict[str, Any] | None:
        """:meth:`address`, or None before the daemon is ready."""
        try:
            found = json.loads((self.data / ADDRESS_FILE_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        assert isinstance(found, dict)
        return found if self.process is not None and found["pid"] == self.process.pid else None

    def token(self) -> str:
        """The token for TCP clients."""
        return (self.data / "token").read_text(encoding="utf-8").strip()

    def log(self) -> str:
        """All that the daemon wrote, of all its starts."""
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def log_tail(self, num_lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-num_lines:])

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        assert self.process is not None, "not started"
        deadline = time.monotonic() + seconds
        while not condition():
            status = self.process.poll()
            if status is not None:
                raise DaemonFailed(
                    f"daemon ended with {status}, did not {what}:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise DaemonFailed(f"daemon did not {what} in {seconds} s:\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)
