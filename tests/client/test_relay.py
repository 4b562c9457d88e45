"""Control calls of children of fork: by a process of their own, never by gRPC that they inherit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import forebay
from forebay._relay import Relay
from forebay.testing.forks import busy, in_fork
from forebay_server.testing.daemon import DaemonProcess

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


def test_a_call_waits_no_longer_for_another_than_it_has_time(client: forebay.Client) -> None:
    from forebay.methods import Admin
    from forebay_wire.v1.admin_pb2 import StatusRequest

    client.datasets()

    def child() -> None:
        client.datasets()
        relay = relay_of(client)
        os.kill(relay._process.pid, signal.SIGSTOP)
        waiting = threading.Thread(target=relay.invoke, args=(Admin.Status, StatusRequest(), 30.0))
        waiting.daemon = True
        waiting.start()
        wait_until(relay._lock.locked)
        with pytest.raises(forebay.DeadlineExceeded, match="another control call"):
            client.channel.call(Admin.Status, StatusRequest(), timeout=0.5)
        os.kill(relay._process.pid, signal.SIGCONT)
        waiting.join(30)
        assert isinstance(client.datasets(), list)

    assert in_fork(child) == 0


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
