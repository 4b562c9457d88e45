"""Child processes: started with a log, watched, and ended with all their children."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from forebay_wire.errors import DeadlineExceeded, ForebayError

LOG_TAIL_LINES: Final = 25
POLL_SECONDS: Final = 0.01
LEASH: Final = Path(__file__).with_name("leash.py")


class ChildFailed(ForebayError):
    """A child process ended with an error; the message has the tail of its log."""


@dataclass(frozen=True)
class ProcessId:
    """A process, told apart from a later one that got the same number."""

    pid: int
    start_ticks: int

    def is_running(self) -> bool:
        found = _stat(self.pid)
        # A zombie is dead; whoever should reap it may be slow.
        return found is not None and found[2] == self.start_ticks and found[0] not in "ZX"


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent pid, start ticks) of a process, or None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[1]), int(fields[19])


def descendants(pid: int) -> list[ProcessId]:
    """All children of a process and theirs, whatever sessions they made for themselves."""
    children: dict[int, list[ProcessId]] = {}
    for entry in os.listdir("/proc"):
        found = _stat(int(entry)) if entry.isdigit() else None
        if found is not None:
            children.setdefault(found[1], []).append(ProcessId(int(entry), found[2]))
    below: list[ProcessId] = []
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            below.append(child)
            waiting.append(child.pid)
    return below


class Child:
    """A started process; the context manager `running` makes it and ends it."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """Raises ChildFailed if the process has ended."""
        if self.process.poll() is not None:
            raise self.failure(f"ended with status {self.process.returncode}")

    def failure(self, what: str) -> ChildFailed:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join(f"    {line}" for line in lines)
        return ChildFailed(f"{self.name} {what}; the end of {self.log}:\n{tail}")

    def wait(self, timeout: float) -> None:
        """Waits for the end; ChildFailed if it takes too long or is no success."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.failure(f"has not ended within {timeout:.0f} s") from None
        if status != 0:
            raise self.failure(f"ended with status {status}")

    def terminate(self, timeout: float) -> int:
        """SIGTERM, then waits for the end of the process; returns its status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.failure(f"has not ended {timeout:.0f} s after SIGTERM") from None

    def kill_all(self) -> int:
        """SIGKILL for the process and everything below it at once; returns how many there were.

        The process itself stands still meanwhile: torchrun would notice a dead rank and end the
        others in its own way.
        """
        if self.process.poll() is not None:
            return 0
        self.process.send_signal(signal.SIGSTOP)
        family = descendants(self.pid)
        for each in family:
            if each.is_running():
                os.kill(each.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not any(each.is_running() for each in family), 10.0, "killed processes")
        return len(family) + 1


def start_leashed(
    command: Sequence[str], output: IO[bytes], *, extra_environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts the process of ``command``, from a thread that outlives it: should that thread end, or
    this process be killed, the kernel sends the child a SIGTERM."""
    return subprocess.Popen(
        [sys.executable, "-S", str(LEASH), str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **extra_environment},
        start_new_session=True,  # Ctrl-C is for us; we end our children in our own order
    )


@contextmanager
def running(
    name: str, command: Sequence[str], log: Path, *, extra_environment: Mapping[str, str]
) -> Iterator[Child]:
    """The process of ``command``, its output in ``log``; at the end nothing of it is left.

    Should this process be killed itself, the kernel sends the child a SIGTERM.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = start_leashed(command, output, extra_environment=extra_environment)
    child = Child(name, process, log)
    try:
        yield child
    finally:
        child.kill_all()


def torchrun(num_ranks: int, module: str, *arguments: str) -> list[str]:
    """The command that torchrun is short for, with this very Python."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={num_ranks}", "-m", module, *arguments]


def wait_until(condition: Callable[[], Any], timeout: float, what: str) -> None:
    """Waits until the condition holds; DeadlineExceeded, naming ``what``, if it does not."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"waited {timeout:.0f} s for {what}; see the logs")
        time.sleep(POLL_SECONDS)


def holds_lock(path: Path) -> bool:
    """Whether some process holds the flock of a file."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
