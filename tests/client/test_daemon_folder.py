"""A folder's own daemon: started once however many race, in a session of its own."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import forebay
from forebay import daemon_folder
from forebay.testing.workers import connect_at
from forebay.waiting import Deadline

NUM_RACERS = 8


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "some" / "data"
    yield folder
    pid = pid_of(folder)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def pid_of(folder: Path) -> int | None:
    """The daemon's, if it still runs."""
    try:
        pid = int(json.loads((folder / "daemon.json").read_text())["pid"])
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    return pid


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"daemon {pid} still runs")


def test_connect_starts_a_daemon_that_others_share(data: Path) -> None:
    with forebay.connect(data) as first, forebay.connect(data) as second:
        assert first.endpoint.incarnation == second.endpoint.incarnation
        assert (data / "daemon.log").stat().st_mode & 0o777 == 0o600


def test_daemon_has_its_own_session_and_outlives_its_starter(data: Path) -> None:
    code = f"import forebay; forebay.connect({str(data)!r}).close()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    pid = pid_of(data)
    assert pid is not None
    assert os.getsid(pid) == pid != os.getsid(0)


def test_processes_that_race_get_one_daemon(data: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    start = time.time() + 3
    racers = [
        context.Process(target=connect_at, args=(str(data), start, answers))
        for _ in range(NUM_RACERS)
    ]
    for racer in racers:
        racer.start()
    incarnations = {answers.get(timeout=90) for _ in racers}
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * NUM_RACERS
    assert len(incarnations) == 1
    assert (data / "daemon.log").read_text().count("serving ") == 1


def test_client_starts_the_daemon_again_after_its_death(data: Path) -> None:
    with forebay.connect(data) as client:
        with client.create_dataset("d", {"x": "int64"}) as writer:
            writer.write(x=1)
        before, pid = client.endpoint.incarnation, pid_of(data)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_gone(pid)
        assert client.datasets() == ["d"]
        assert client.endpoint.incarnation != before


def test_start_that_fails_shows_the_end_of_the_log(data: Path) -> None:
    data.mkdir(parents=True)
    (data / "forebay.toml").write_text("no-such-setting = 1\n")
    with pytest.raises(forebay.DaemonUnavailable, match=r"status \d+(.|\n)*no-such-setting") as got:
        forebay.connect(data)
    assert str(data / "daemon.log") in got.value.message


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(forebay.StorageError, match="cannot make the data folder"):
        forebay.connect(tmp_path / "file" / "data")


def test_broken_address_file_is_named(data: Path) -> None:
    data.mkdir(parents=True)
    (data / "daemon.json").write_text("{")
    with pytest.raises(forebay.StorageError, match=r"daemon\.json is no address.*remove it"):
        forebay.connect(data)


def test_stale_address_file_of_a_killed_daemon_is_no_obstacle(data: Path) -> None:
    with forebay.connect(data):
        pass
    pid = pid_of(data)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    assert (data / "daemon.json").exists()
    with forebay.connect(data) as client:
        assert client.datasets() == []


def test_waiting_for_a_daemon_never_starts_one(data: Path) -> None:
    with pytest.raises(forebay.DaemonUnavailable, match="no daemon serves"):
        daemon_folder.wait(data, Deadline(0.2))
    assert not data.exists()
