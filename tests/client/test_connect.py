"""Finding a daemon: every form of address, and every way in which nobody is there."""

import gc
import os
import queue
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay import _channel
from forebay.transfer.local import LocalTransfer
from forebay_server.testing.daemon import DaemonProcess

ENVIRONMENT = (
    *("FOREBAY_ADDRESS", "FOREBAY_DATA", "FOREBAY_TOKEN", "FOREBAY_TOKEN_FILE"),
    "FOREBAY_NO_LOCAL",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tcp_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    data = tmp_path_factory.mktemp("tcp") / "data"
    with DaemonProcess(data, "--listen", "grpc://127.0.0.1:0") as process:
        yield process


def forebay_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("forebay-attach")]


# Forms of an address.


@pytest.mark.parametrize("form", [str, Path, lambda data: f"{data}/"])
def test_folder_of_a_running_daemon(daemon: DaemonProcess, form) -> None:
    with forebay.connect(form(daemon.data)) as client:
        assert client.endpoint.incarnation == daemon.address()["incarnation"]


@pytest.mark.parametrize("prefix", ["unix:", "unix://"])
def test_unix_socket(daemon: DaemonProcess, prefix: str) -> None:
    path = daemon.address()["rpc"].removeprefix("unix:")
    with forebay.connect(prefix + path) as client:
        assert isinstance(client.datasets(), list)
        assert isinstance(client.transfer, LocalTransfer)


def test_tcp_with_a_token(tcp_daemon: DaemonProcess) -> None:
    with forebay.connect(tcp_daemon.address()["tcp"], token=tcp_daemon.token()) as client:
        assert isinstance(client.datasets(), list)
        assert not isinstance(client.transfer, LocalTransfer)


@pytest.mark.parametrize("way", ["variable", "file"])
def test_tcp_token_from_the_environment(
    tcp_daemon: DaemonProcess, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "variable":
        monkeypatch.setenv("FOREBAY_TOKEN", tcp_daemon.token())
    else:
        monkeypatch.setenv("FOREBAY_TOKEN_FILE", str(tcp_daemon.data / "token"))
    with forebay.connect(tcp_daemon.address()["tcp"]) as client:
        assert isinstance(client.datasets(), list)


def test_tcp_without_a_token_says_where_it_is(tcp_daemon: DaemonProcess) -> None:
    with pytest.raises(forebay.Unauthenticated, match=r"token=.*FOREBAY_TOKEN.*data folder"):
        forebay.connect(tcp_daemon.address()["tcp"])


def test_tcp_with_a_wrong_token(tcp_daemon: DaemonProcess) -> None:
    with pytest.raises(forebay.Unauthenticated):
        forebay.connect(tcp_daemon.address()["tcp"], token="v1.0.abc")


def test_address_of_the_environment(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_ADDRESS", daemon.address()["rpc"])
    with forebay.connect() as client:
        assert isinstance(client.datasets(), list)


def test_data_folder_of_the_environment(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_DATA", str(daemon.data))
    with forebay.connect() as client:
        assert isinstance(client.datasets(), list)


def test_no_address_and_no_daemon_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(forebay.DaemonUnavailable, match=r"data: start it \(forebay serve"):
        forebay.connect()
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []


# Addresses that cannot work.


@pytest.mark.parametrize(
    "address",
    ["", "http://host:1", "grpc://host", "grpc://host:port", "grpc://:7070", "unix:relative"],
)
def test_malformed_address_shows_the_forms(address: str) -> None:
    with pytest.raises(forebay.InvalidRequest, match=r"rpc\.sock"):
        forebay.connect(address)


@pytest.mark.parametrize("address", ["grpc://127.0.0.1:1", "unix:/tmp/no-such-folder/rpc.sock"])
def test_nobody_there_within_the_timeout(address: str) -> None:
    started = time.monotonic()
    with pytest.raises(forebay.DaemonUnavailable) as caught:
        forebay.connect(address, timeout=1.0)
    assert time.monotonic() - started < 5
    assert address in caught.value.message
    assert "forebay serve" in caught.value.message
    assert "data.sock" not in caught.value.message


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(forebay.ForebayError, match="is no folder"):
        forebay.connect(tmp_path / "file", timeout=5)


def test_other_protocol_says_whom_to_upgrade(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay._channel.protocol_range", lambda: "7-9")
    monkeypatch.setattr("forebay.transfer.connection.protocol_range", lambda: "1-9")
    with pytest.raises(forebay.VersionMismatch, match="upgrade the daemon"):
        forebay.connect(daemon.data, timeout=5)


# What a client leaves behind.


def test_close_leaves_no_thread_and_refuses_calls(daemon: DaemonProcess) -> None:
    before = forebay_threads()
    client = forebay.connect(daemon.data)
    assert len(forebay_threads()) == len(before) + 1
    client.close()
    client.close()
    assert forebay_threads() == before
    with pytest.raises(forebay.InvalidRequest, match="is closed: connect again"):
        client.datasets()


def test_forgotten_client_detaches(own_daemon: DaemonProcess) -> None:
    with forebay.connect(own_daemon.address()["rpc"]) as watcher:
        forebay.connect(own_daemon.address()["rpc"])  # nobody keeps the answer
        deadline = time.monotonic() + 20
        while watcher.status().num_clients > 2:  # the watcher: its stream and its connection
            assert time.monotonic() < deadline, watcher.status()
            time.sleep(0.05)


def test_script_ends_without_warnings(daemon: DaemonProcess) -> None:
    code = (
        f"import forebay; client = forebay.connect({str(daemon.data)!r}); client.datasets();"
        "transfer = client.transfer; transfer.report('0' * 64, 'ssd', 0, 'x')"
    )
    done = subprocess.run(
        ["python", "-X", "dev", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Warning" not in done.stderr


# A daemon that goes away.


def test_calls_wait_for_a_daemon_that_is_restarted(own_daemon: DaemonProcess) -> None:
    with forebay.connect(own_daemon.address()["rpc"]) as client:
        assert isinstance(client.datasets(), list)
        own_daemon.kill()
        own_daemon.start()  # not waited for: the call does
        assert isinstance(client.datasets(), list)
        assert client.endpoint.incarnation == own_daemon.wait_ready().address()["incarnation"]


def test_impatient_call_fails_at_once(own_daemon: DaemonProcess) -> None:
    from forebay.methods import Admin
    from forebay_wire.v1.admin_pb2 import StatusRequest

    with forebay.connect(own_daemon.address()["rpc"]) as client:
        own_daemon.kill()
        # The thread that watches the connection may have closed it meanwhile.
        with pytest.raises(forebay.DaemonUnavailable, match=r"no daemon answers|was closed"):
            client.channel.call(Admin.Status, StatusRequest(), timeout=30, wait_for_daemon=False)


def test_absent_daemon_is_named_when_time_is_up(own_daemon: DaemonProcess) -> None:
    from forebay.methods import Admin
    from forebay_wire.v1.admin_pb2 import StatusRequest

    address = own_daemon.address()["rpc"]
    with forebay.connect(address) as client:
        own_daemon.kill()
        with pytest.raises(forebay.DaemonUnavailable, match=f"{address}.*forebay serve"):
            client.channel.call(Admin.Status, StatusRequest(), timeout=1.5)


def test_daemon_that_does_not_answer_runs_into_the_deadline(own_daemon: DaemonProcess) -> None:
    from forebay.methods import Admin
    from forebay_wire.v1.admin_pb2 import StatusRequest

    with forebay.connect(own_daemon.address()["rpc"]) as client:
        os.kill(own_daemon.pid, signal.SIGSTOP)
        try:
            with pytest.raises(forebay.DeadlineExceeded, match=r"Admin\.Status .* within 1 s"):
                client.channel.call(Admin.Status, StatusRequest(), timeout=1.0)
        finally:
            os.kill(own_daemon.pid, signal.SIGCONT)


def test_a_call_that_failed_keeps_nothing(daemon: DaemonProcess) -> None:
    """A connection for bytes that only the collector of cycles would close keeps a daemon alive."""

    class Held:
        pass

    def ask(client: forebay.Client) -> weakref.ref[Held]:
        held = Held()
        with pytest.raises(forebay.NotFound):
            client.dataset("nowhere")
        return weakref.ref(held)

    with forebay.connect(daemon.address()["rpc"]) as client:
        gc.disable()
        try:
            assert ask(client)() is None
        finally:
            gc.enable()


def test_close_does_not_wait_for_a_daemon_that_is_away(
    own_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay._channel.RESTART_GRACE_SECONDS", 60.0)
    client = forebay.connect(own_daemon.data)
    own_daemon.terminate()
    started = time.monotonic()
    client.close()
    assert time.monotonic() - started < 3
    assert not (own_daemon.data / "daemon.json").exists()  # nor has it started another one


def test_message_that_is_too_large_is_not_sent(daemon: DaemonProcess) -> None:
    from forebay.methods import Datasets
    from forebay_wire.v1.datasets_pb2 import GetDatasetRequest

    with (
        forebay.connect(daemon.data) as client,
        pytest.raises(forebay.LimitExceeded, match=r"bytes of Datasets\.GetDataset"),
    ):
        client.channel.call(Datasets.GetDataset, GetDatasetRequest(name="x" * (5 << 20)))


def test_errors_of_the_daemon_arrive_as_they_were_raised(daemon: DaemonProcess) -> None:
    with (
        forebay.connect(daemon.data) as client,
        pytest.raises(forebay.NotFound, match="no-such-dataset") as caught,
    ):
        client.dataset("no-such-dataset")
    assert type(caught.value) is forebay.NotFound
    assert isinstance(caught.value, LookupError)


def test_an_idle_client_leaves_a_daemon_that_was_stopped_alone(
    own_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: queue.Queue[None] = queue.Queue()
    real = _channel.find_running

    def find_running(*arguments: Any) -> Any:
        looks.put(None)
        return real(*arguments)

    def find_or_start(*arguments: Any) -> Any:
        raise AssertionError("nobody called")

    monkeypatch.setattr(_channel, "find_running", find_running)
    with forebay.connect(own_daemon.data):
        monkeypatch.setattr(_channel, "find_or_start", find_or_start)
        own_daemon.terminate()
        for _ in range(3):
            looks.get(timeout=30)
        assert not (own_daemon.data / "daemon.json").exists()
