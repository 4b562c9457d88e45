"""Contenders of the checkpoints' benchmark as seen by whoever measures them: processes, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from checkpoint_state import NAME

ROOT = Path(__file__).resolve().parent.parent
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
OWN = ("forebay", "copy")

SAMPLE_SECONDS = 0.05


class Contender:
    """A child process that answers lines. It opens the state when it is first asked."""

    def __init__(self, name: str, place: dict[str, Any], log: Path) -> None:
        python = sys.executable if name in OWN else str(PEERS_PYTHON)
        script = str(Path(__file__).with_name("checkpoint_child.py"))
        self.name = name
        self._log = log
        self._process = subprocess.Popen(
            [python, script, name, json.dumps(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, do: str, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            end = "\n".join(self._log.read_text().splitlines()[-20:])
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{end}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{self.name}: {found['error']}\n{found['trace']}")
        return found

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        self.send(do, **what)
        return self.answer()

    def kill(self) -> None:
        """End it and what it started. Idempotent."""
        if self._process.poll() is None:
            for one in [*psutil.Process(self.pid).children(recursive=True), self._process]:
                one.kill()
        self._process.wait()


def own_bytes(pid: int) -> int:
    """Memory of a process and those that it started, each page shared out among those who map it;
    the state that is saved does not count."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += proportional_bytes(Path(f"/proc/{process.pid}/smaps").read_text())
        except OSError:  # it has ended
            continue
    return total


def proportional_bytes(smaps: str) -> int:
    """The sum of ``Pss`` over all mappings but those of the state."""
    total, counts = 0, True
    for line in smaps.splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            counts = NAME not in rest
        elif counts and first == "Pss:":
            total += 1024 * int(rest.split()[0])
    return total


class PeakMemory:
    """Looks again and again how much memory some processes have. A context manager."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, sum(own_bytes(pid) for pid in self._pids))

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
