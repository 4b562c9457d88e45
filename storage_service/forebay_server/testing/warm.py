"""Python programs that start from a process which has imported their modules already.

To import what a daemon needs takes a second of a core, what a rank of torch needs three; a fork of
a process that did takes milliseconds. The program itself runs as ``python`` runs it, in a process
of its own with its own environment, output, exit status and process id.

    python -m forebay_server.testing.warm DESCRIPTOR MODULE ...
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from forebay_wire import failpoints

MAX_MESSAGE_BYTES: Final = 256 * 1024
FOLLOWED: Final = ("FOREBAY_", "AWS_", "PYTEST_")
"""Variables whose names begin so are read when a program runs, not when a module is imported."""


class WarmProcess:
    """What :class:`subprocess.Popen` is, of a program that :class:`WarmPython` started.
    Thread-safe."""

    def __init__(self, parent: WarmPython, pid: int) -> None:
        self._parent = parent
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            try:
                descriptor = os.pidfd_open(self.pid)
            except ProcessLookupError:  # another thread has waited meanwhile
                return self._ended()
            try:
                ready = select.poll()
                ready.register(descriptor, select.POLLIN)
                if not ready.poll(None if timeout is None else timeout * 1000):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            finally:
                os.close(descriptor)
        return self._ended()

    def _ended(self) -> int:
        with self._lock:
            if self.returncode is None:
                self.returncode = self._parent.reap(self.pid)
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmPython:
    """A process that imported *modules* and starts Python programs. A context manager.

    Ends with the process that made it, and takes with it what nobody waited for. Thread-safe.
    """

    def __init__(self, *modules: str, environment: Mapping[str, str] | None = None) -> None:
        """*environment* is that of the imports; none is this process's."""
        self._modules = modules
        self._environment = dict(os.environ if environment is None else environment)
        self._environment.pop(failpoints.VARIABLE, None)
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.wait()
        self._control = self._process = None

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Whether a program in *environment* would find its modules as they were imported."""
        return _fixed(environment) == _fixed(self._environment)

    def start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
    ) -> WarmProcess:
        """``python WORDS`` with these descriptors.

        WORDS are a file, ``-m MODULE`` or ``-c CODE``, and what these get.
        """
        job = {"words": list(words), "environment": dict(environment), "folder": os.getcwd()}
        return WarmProcess(self, int(self._ask(job, stdin, stdout, stderr)))

    def run(
        self,
        words: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        given: bytes = b"",
        check: bool = False,
        timeout: float = 100,
    ) -> subprocess.CompletedProcess[str]:
        """``python WORDS`` to its end, or :class:`subprocess.TimeoutExpired`: what it wrote.

        *environment* is added to this process's.
        """
        with (
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as stdout,
            tempfile.TemporaryFile() as stderr,
        ):
            stdin.write(given)
            stdin.seek(0)
            streams = (stdin.fileno(), stdout.fileno(), stderr.fileno())
            process = self.start(
                [*map(str, words)], {**os.environ, **(environment or {})}, *streams
            )
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
                process.wait()
            texts = []
            for stream in (stdout, stderr):
                stream.seek(0)
                texts.append(stream.read().decode())
        done = subprocess.CompletedProcess([*map(str, words)], status, *texts)
        if check:
            done.check_returncode()
        return done

    def reap(self, pid: int) -> int:
        """The exit status of a process that ended (negative: the signal's number)."""
        return int(self._ask({"reap": pid}))

    def _ask(self, message: dict[str, Any], *descriptors: int) -> int:
        with self._lock:
            control = self._control or self._begin()
            socket.send_fds(control, [json.dumps(message).encode()], descriptors)
            answer = control.recv(MAX_MESSAGE_BYTES)
        assert answer, "the process that starts programs ended"
        return int(answer)

    def _begin(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *self._modules],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=self._environment,
            )
        self._control = ours
        return ours


def _fixed(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(FOLLOWED)}


def main() -> None:
    _, descriptor, *modules = sys.argv
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # a collection would write to, and so copy, every page that is shared
    with socket.socket(fileno=int(descriptor)) as control:
        words = _serve(control)
    if words is not None:
        _run(words)


def _serve(control: socket.socket) -> list[str] | None:
    """Start and reap children for whoever asks: None when nobody does any more.

    Returns in the children too, with the words of their program.
    """
    children: set[int] = set()
    while True:
        text, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 3)
        if not text:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return None
        message = json.loads(text)
        if "reap" in message:
            _, status = os.waitpid(message["reap"], 0)
            children.discard(message["reap"])
            control.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            _become(message, descriptors)
            return list(message["words"])
        children.add(pid)
        for one in descriptors:
            os.close(one)
        control.send(str(pid).encode())


def _become(message: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Take the place that a program's process has: its streams, environment and folder."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(message["environment"])
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    os.chdir(message["folder"])


def _run(words: list[str]) -> None:
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(words[1], "<string>", "exec"), module.__dict__)  # noqa: S102 - as python does
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
