"""Real daemons on temporary folders."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.rpc import RpcClient, rpc_client

StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Starts a daemon on ``tmp_path/data`` (arguments: its flags) and ends it after the test."""
    with ExitStack() as daemons:

        def start(*arguments: str, data: Path | None = None, **environment: str) -> DaemonProcess:
            made = DaemonProcess(data or tmp_path / "data", *arguments, environment=environment)
            return daemons.enter_context(made)

        yield start


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """A daemon with all defaults."""
    return start_daemon()


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RpcClient]:
    """A plain gRPC client of it."""
    with rpc_client(daemon) as found:
        yield found
