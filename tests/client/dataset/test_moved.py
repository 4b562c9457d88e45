"""A client elsewhere knows no descriptor socket: it finds a restarted daemon all the same."""

import pickle
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import forebay
from forebay.dataset.dataset import Dataset
from forebay.testing.numbered import NUM_SAMPLES, write_numbered
from forebay.transfer import make_transfer
from forebay.transfer.remote import RemoteTransfer
from forebay_server.testing.daemon import DaemonProcess


@pytest.fixture
def tcp_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with DaemonProcess(tmp_path / "data", "--listen", f"grpc://127.0.0.1:{port}") as process:
        yield process


@pytest.fixture
def client(tcp_daemon: DaemonProcess) -> Iterator[forebay.Client]:
    with forebay.connect(tcp_daemon.address()["tcp"], token=tcp_daemon.token()) as connected:
        yield connected


@pytest.fixture
def dataset(client: forebay.Client) -> Dataset:
    write_numbered(client, "numbered")
    return client.dataset("numbered")


def numbers(dataset: Dataset) -> list[int]:
    found: list[int] = dataset.take(range(NUM_SAMPLES))["number"].tolist()
    return found


def port_of(daemon: DaemonProcess) -> int:
    port: int | None = urllib.parse.urlsplit(daemon.address()["http_url"]).port
    assert port is not None
    return port


@contextmanager
def stranger_at(port: int) -> Iterator[None]:
    """Somebody else serves *port*, and hangs up on whoever calls."""

    def hang_up() -> None:
        with suppress(OSError):
            while True:
                listening.accept()[0].close()

    with socket.create_server(("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_restarted_daemon_serves_bytes_on_the_same_port(
    tcp_daemon: DaemonProcess, dataset: Dataset
) -> None:
    blob = dataset.manifest.shards[0].blob
    alone = RemoteTransfer(dataset.endpoint)  # as in a process without a control connection
    alone.open([blob])[0].close()
    port = port_of(tcp_daemon)
    tcp_daemon.restart()
    assert port_of(tcp_daemon) == port
    alone.open([blob])[0].close()
    alone.close()


def test_a_port_that_was_taken_meanwhile_is_told_by_the_control_connection(
    tcp_daemon: DaemonProcess, dataset: Dataset
) -> None:
    assert numbers(dataset) == list(range(NUM_SAMPLES))
    port = port_of(tcp_daemon)
    tcp_daemon.kill()
    with stranger_at(port):
        tcp_daemon.start().wait_ready()
        assert port_of(tcp_daemon) != port
        blob = dataset.manifest.shards[0].blob
        make_transfer(dataset.endpoint).open([blob])[0].close()
        assert numbers(dataset) == list(range(NUM_SAMPLES))
        copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own
        assert copy.endpoint.http_url == tcp_daemon.address()["http_url"]
