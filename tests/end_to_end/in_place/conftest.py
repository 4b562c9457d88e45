"""A daemon that may read the files of a test module where they are."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess

_numbers = itertools.count()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[DaemonProcess]:
    """*folder* is the module's own."""
    place = tmp_path_factory.mktemp("daemon") / "data"
    with DaemonProcess(place, "--origin-prefixes", str(folder)) as process:
        yield process


@pytest.fixture
def way() -> str:
    """How bytes travel, unless a test tries both."""
    return "local"


@pytest.fixture
def client(
    way: str, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> Iterator[forebay.Client]:
    if way == "remote":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected


@pytest.fixture
def name() -> str:
    """A dataset name that no other test uses."""
    return f"d{next(_numbers)}"
