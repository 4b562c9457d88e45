"""A program that starts warm is the program: its words, environment, streams, end and process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.warm import WarmProcess, WarmPython

TELL = """
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ), os.getpid(), __name__, sys.stdin.read()]))
sys.exit(int(sys.argv[1]))
"""
WAIT = "import signal\nsignal.pause()\n"
PASS = "from forebay_wire.failpoints import failpoint\nfailpoint('pack.before_seal')\n"


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmPython]:
    with WarmPython("forebay_wire.failpoints") as python:
        yield python


Start = Callable[..., WarmProcess]


@pytest.fixture
def start(warm: WarmPython, tmp_path: Path) -> Start:
    def begin(program: str, *words: str, **environment: str) -> WarmProcess:
        (tmp_path / "program.py").write_text(program)
        (tmp_path / "in").write_text("given")
        with (tmp_path / "in").open() as stdin, (tmp_path / "out").open("w") as out:
            streams = (stdin.fileno(), out.fileno(), out.fileno())
            command = [str(tmp_path / "program.py"), *words]
            return warm.start(command, {**os.environ, **environment}, *streams)

    return begin


def test_it_has_its_own_words_environment_streams_and_status(start: Start, tmp_path: Path) -> None:
    process = start(TELL, "7", "word", FOREBAY_DATA="here")
    assert process.wait(60) == 7
    told: list[Any] = json.loads((tmp_path / "out").read_text())
    words, environment, pid, name, given = told
    assert (words, pid, name, given) == (["7", "word"], process.pid, "__main__", "given")
    assert environment == {**os.environ, "FOREBAY_DATA": "here"}


def test_signals_reach_it_and_waiting_has_an_end(start: Start) -> None:
    process = start(WAIT)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.kill()  # long gone
    assert process.poll() == -signal.SIGKILL


def test_several_threads_may_wait(start: Start) -> None:
    process = start(WAIT)
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(process.wait, 60) for _ in range(4)]
        process.terminate()
        assert [one.result() for one in waiting] == [-signal.SIGTERM] * 4


def test_its_failpoints_are_its_own(start: Start) -> None:
    killed = start(PASS, FOREBAY_FAILPOINTS="pack.before_seal")
    assert killed.wait(60) == -signal.SIGKILL
    assert start(PASS).wait(60) == 0


def test_an_error_is_told_and_fails(start: Start, tmp_path: Path) -> None:
    assert start("raise ValueError('mine')").wait(60) == 1
    assert "ValueError: mine" in (tmp_path / "out").read_text()


def test_what_changes_python_itself_does_not_start_warm(warm: WarmPython) -> None:
    assert warm.can_start({**os.environ, "FOREBAY_FAILPOINTS": "", "AWS_REGION": "x"})
    assert not warm.can_start({**os.environ, "LD_PRELOAD": "shim.so"})
    without_path = {name: value for name, value in os.environ.items() if name != "PATH"}
    assert not warm.can_start(without_path)


def test_it_ends_with_its_starter() -> None:
    with WarmPython() as python, open(os.devnull, "r+b") as nothing:
        number = nothing.fileno()
        words = ["-m", "http.server", "--bind", "127.0.0.1", "0"]
        process = python.start(words, os.environ, number, number, number)
        descriptor = os.pidfd_open(process.pid)
    try:
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, 0)
    finally:
        os.close(descriptor)


def test_a_daemon_also_starts_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DaemonProcess, "warm", None)
    with DaemonProcess(tmp_path / "data") as daemon:
        command = Path(f"/proc/{daemon.pid}/cmdline").read_bytes().split(b"\0")
        assert command[:3] == [sys.executable.encode(), b"-m", b"forebay_server"]
    assert daemon.process is not None
    assert daemon.process.returncode == 0
