"""Control calls of children of fork: by a process of their own, never by gRPC that they inherit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import forebay
from forebay._relay import Relay
from forebay.methods import Datasets
from forebay.testing.forks import busy, in_fork
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.v1.datasets_pb2 import Dataset, GetDatasetRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:this process was forked:RuntimeWarning"),
]


def relay_of(client: forebay.Client) -> Relay:
    live = client.channel._held.live
    assert isinstance(live, Relay)
    return live


def test_a_child_is_told_and_gets_its_answer(daemon: DaemonProcess) -> None:
    with forebay.connect(daemon.data) as client:
        client.datasets()

        def child() -> None:
            with pytest.warns(RuntimeWarning, match="forkserver or spawn"):
                assert isinstance(client.datasets(), list)

        assert in_fork(child) == 0
        assert isinstance(client.datasets(), list)


@pytest.mark.timeout(300)
def test_children_of_a_busy_parent_never_hang(daemon: DaemonProcess) -> None:
    with forebay.connect(daemon.address()["rpc"]) as client:

        def child() -> None:
            assert client.status().tiers
            assert isinstance(client.datasets(), list)

        with busy(client.datasets):
            assert [in_fork(child) for _ in range(15)] == [0] * 15


def test_a_child_connects_for_itself(daemon: DaemonProcess) -> None:
    with forebay.connect(daemon.address()["rpc"]) as client:
        client.datasets()

        def child() -> None:
            with forebay.connect(daemon.data) as own:
                assert own.status().tiers
                ended = relay_of(own)._process
            assert ended.poll() is not None

        assert in_fork(child) == 0


def test_a_child_makes_a_dataset_and_reads_it(client: forebay.Client) -> None:
    name = f"by-a-child-{len(client.datasets())}"

    def child() -> None:
        with client.create_dataset(name, {"x": "int64"}) as writer:
            writer.write(x=1)
        assert len(client.dataset(name)) == 1

    assert in_fork(child) == 0
    assert name in client.datasets()


def test_errors_are_the_same_in_a_child(client: forebay.Client) -> None:
    def message() -> str:
        with pytest.raises(forebay.NotFound) as failed:
            client.dataset("nowhere")
        return str(failed.value)

    told = message()

    def child() -> None:
        assert message() == told

    assert in_fork(child) == 0


def test_a_child_of_a_child_has_a_relay_of_its_own(client: forebay.Client) -> None:
    client.datasets()

    def grandchild() -> None:
        client.datasets()

    def child() -> None:
        client.datasets()
        first = relay_of(client)
        assert in_fork(grandchild) == 0
        client.datasets()
        assert relay_of(client) is first

    assert in_fork(child) == 0


def test_a_relay_that_is_killed_is_replaced(client: forebay.Client) -> None:
    client.datasets()

    def child() -> None:
        client.datasets()
        relay_of(client)._process.kill()
        assert isinstance(client.datasets(), list)

    assert in_fork(child) == 0


def test_a_relay_ends_with_its_child(client: forebay.Client, tmp_path: Path) -> None:
    client.datasets()
    note = tmp_path / "pid"

    def child() -> None:
        client.datasets()
        note.write_text(str(relay_of(client)._process.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(child) == -signal.SIGKILL
    wait_until(lambda: not is_alive(int(note.read_text())))


def test_a_child_follows_a_daemon_that_is_started_anew(
    own_daemon: DaemonProcess, tmp_path: Path
) -> None:
    called, restarted = tmp_path / "called", tmp_path / "restarted"

    def restart() -> None:
        wait_until(called.exists)
        own_daemon.restart()
        restarted.touch()

    with forebay.connect(own_daemon.address()["rpc"]) as client:
        client.datasets()
        thread = threading.Thread(target=restart)
        thread.start()

        def child() -> None:
            client.datasets()
            before = client.channel.endpoint
            called.touch()
            wait_until(restarted.exists)
            assert isinstance(client.datasets(), list)
            assert client.channel.endpoint != before

        assert in_fork(child) == 0
        thread.join()


def test_an_answer_that_comes_late_is_nobody_elses(client: forebay.Client) -> None:
    for name in ("late-a", "late-b"):
        if name not in client.datasets():
            with client.create_dataset(name, {"x": "int64"}) as writer:
                for x in range(len(client.datasets())):
                    writer.write(x=x)
    rows = {name: len(client.dataset(name)) for name in ("late-a", "late-b")}

    def ask(name: str, seconds: float) -> Dataset:
        request = GetDatasetRequest(name=name)
        return client.channel.call(Datasets.GetDataset, request, timeout=seconds)

    def child() -> None:
        client.datasets()
        relay = relay_of(client)
        for _ in range(3):
            os.kill(relay._process.pid, signal.SIGSTOP)
            with pytest.raises(forebay.DeadlineExceeded, match="no answer within"):
                ask("late-a", 0.2)
            os.kill(relay._process.pid, signal.SIGCONT)
            assert ask("late-b", 30).name == "late-b"
        assert relay_of(client) is relay
        assert {name: len(client.dataset(name)) for name in rows} == rows

    assert in_fork(child) == 0


def test_calls_go_side_by_side(client: forebay.Client) -> None:
    client.datasets()

    def child() -> None:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda _: client.datasets(), range(40)))
        assert all(one == found[0] for one in found)

    assert in_fork(child) == 0


def test_a_relay_that_cannot_start_is_one_error_at_once(
    client: forebay.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.datasets()
    monkeypatch.setattr(sys, "path", ["/nowhere"])

    def child() -> None:
        began = time.monotonic()
        with pytest.raises(forebay.ForebayError, match="ended with status 1"):
            client.datasets()
        assert time.monotonic() - began < 20

    assert in_fork(child) == 0


BY_PATH = """
import os, sys
sys.path[:] = eval(sys.argv[2])
sys.executable = sys._base_executable  # which finds none of our modules by itself
import forebay
with forebay.connect(sys.argv[1]) as client:
    client.datasets()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if isinstance(client.datasets(), list) else 2
        finally:
            os._exit(status)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_relay_finds_the_modules_of_its_parent(daemon: DaemonProcess) -> None:
    command = [sys.executable, "-c", BY_PATH, daemon.address()["rpc"], repr(sys.path)]
    subprocess.run(command, check=True, timeout=60)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
