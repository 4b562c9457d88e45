"""Contenders as processes of their own, which do what lines tell them: for all benchmarks.

A *family* are children of one interpreter that need the same dear imports: these are done once,
then each child is forked, before any thread is there. A line to a child is a JSON object with
``do``, the name of a method of its object, and the arguments of it; a line back is what it
answered. The object is what the family's module makes, ``make(name, **arguments)``, when the child
is told something for the first time.

The peers' interpreter runs this file, too: it needs nothing that does not come with Python.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PEERS_PYTHON = Path(__file__).resolve().parent.parent / ".venv-peers" / "bin" / "python"
"""Made by ``make peers``."""

STOP_SECONDS = 20.0
LOG_LINES = 20
"""Of the end of a family's log, in errors."""


class Child:
    """One of a family, as seen by whoever tells it what to do. Not thread-safe."""

    def __init__(self, name: str, todo: int, done: int, log: Path) -> None:
        self.name = name
        self._todo = os.fdopen(todo, "w")
        self._done = os.fdopen(done)
        self._log = log
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        """Waits until it is there."""
        if self._pid is None:
            self._pid = int(self._read()["pid"])
        return self._pid

    def send(self, do: str, **what: Any) -> None:
        """Tell it what to do, and do not wait."""
        self._todo.write(json.dumps({"do": do, **what}) + "\n")
        self._todo.flush()

    def answer(self) -> dict[str, Any]:
        """To what it was told first and has not answered yet."""
        assert self.pid
        found = self._read()
        if "error" in found:
            raise RuntimeError(f"{self.name}: {found['error']}\n{found['trace']}")
        return found

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        self.send(do, **what)
        return self.answer()

    def hang_up(self) -> None:
        """There is nothing more to do. Idempotent."""
        with contextlib.suppress(BrokenPipeError):
            self._todo.close()

    def kill(self) -> None:
        """End it and all that it started. Idempotent."""
        if self._done.closed:
            return
        with contextlib.suppress(RuntimeError, ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.hang_up()
        self._done.close()

    def _read(self) -> dict[str, Any]:
        line = self._done.readline()
        if not line:
            end = "\n".join(self._log.read_text().splitlines()[-LOG_LINES:])
            raise RuntimeError(f"{self.name} has ended:\n{end}")
        found: dict[str, Any] = json.loads(line)
        return found


class Family:
    """Children by their names. A context manager; what was not stopped before is killed."""

    def __init__(
        self,
        module: str,
        names: Sequence[str],
        *,
        log: Path,
        python: str | Path = sys.executable,
        **arguments: Any,
    ) -> None:
        """Start them, and do not wait. *module* is one of this folder; *log* gets what it and they
        print; *arguments* are for all that it makes."""
        self._children: dict[str, Child] = {}
        ends: dict[str, tuple[int, int]] = {}
        for name in names:
            their_todo, todo = os.pipe()
            done, their_done = os.pipe()
            self._children[name] = Child(name, todo, done, log)
            ends[name] = (their_todo, their_done)
        theirs = [end for both in ends.values() for end in both]
        given = json.dumps({"ends": ends, "arguments": arguments})
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [str(python), __file__, module, given],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=theirs,
            )
        for end in theirs:
            os.close(end)

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._children)

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def stop(self) -> None:
        """Let all end by themselves, and kill them if they do not. Idempotent."""
        for child in self._children.values():
            child.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End all and what they started. Idempotent."""
        for child in self._children.values():
            child.kill()
        self._process.wait()


# --------------------------------------------------------------------------- below: on their side


def serve(make: Callable[[], object], todo: int, done: int) -> None:
    """Do what the lines say until there are no more."""
    answers = os.fdopen(done, "w")
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    made: object = None
    for line in os.fdopen(todo):
        what = json.loads(line)
        do = what.pop("do")
        try:
            if made is None:
                made = make()
            answer = getattr(made, do)(**what) or {}
        except Exception as error:  # noqa: BLE001 - goes to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Fork the children, and end when all have."""
    make = importlib.import_module(sys.argv[1]).make
    given = json.loads(sys.argv[2])
    ends: dict[str, list[int]] = given["ends"]
    for name, (todo, done) in ends.items():
        if not os.fork():
            os.setsid()  # who ends it ends its own children with it
            for other in [end for both in ends.values() for end in both]:
                if other not in (todo, done):
                    os.close(other)
            os.set_inheritable(todo, False)
            os.set_inheritable(done, False)
            serve(lambda name=name: make(name, **given["arguments"]), todo, done)
            return
    for end in [end for both in ends.values() for end in both]:
        os.close(end)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    main()
