"""Failpoints kill exactly where they are told to, and cost nothing otherwise."""

import os
import select
import signal
import subprocess
import sys

import pytest

from forebay_wire import failpoints

SCRIPT = """
from forebay_wire.failpoints import failpoint
for turn in range(3):
    print(turn, flush=True)
    failpoint("upload.before_publish")
"""


def run(value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={failpoints.VARIABLE: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("value", "lines"), [("upload.before_publish", 1), ("upload.before_publish:3", 3)]
)
def test_the_process_dies_at_the_named_passing(value, lines):
    done = run(value)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.splitlines()) == lines


@pytest.mark.parametrize("value", ["", "upload.after_publish", "upload.before_publish:4"])
def test_other_places_are_passed(value):
    done = run(value)
    assert done.returncode == 0
    assert done.stdout.split() == ["0", "1", "2"]


def test_an_unknown_name_is_an_error():
    done = run("upload.befor_publish")
    assert done.returncode == 1
    assert "is no failpoint" in done.stderr


def test_a_fifo_holds_up_whoever_passes(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    environment = {failpoints.VARIABLE: f"upload.before_publish@{path}"}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        assert not select.select([process.stdout], [], [], 0.2)[0]
        path.unlink()
        os.close(writer)
        assert process.stdout.read() == b"1\n2\n"
    assert process.returncode == 0
