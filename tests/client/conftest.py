"""A real daemon for the tests of the client, and both ways to its bytes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess


@pytest.fixture(scope="session")
def daemon() -> Iterator[DaemonProcess]:
    """A daemon that tests share: nobody stops or damages it."""
    with tempfile.TemporaryDirectory() as folder, DaemonProcess(Path(folder) / "data") as process:
        yield process


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon that the test may kill, restart, and whose files it may damage."""
    with DaemonProcess(tmp_path / "data") as process:
        yield process


@pytest.fixture(params=["local", "http"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How bytes travel: by descriptors, or by HTTP alone."""
    if request.param == "http":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    else:
        monkeypatch.delenv("FOREBAY_NO_LOCAL", raising=False)
    return str(request.param)


@pytest.fixture
def client(daemon: DaemonProcess, way: str) -> Iterator[forebay.Client]:
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected
