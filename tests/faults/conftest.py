"""A real daemon that a test may kill, data whose content is known, and looks at what is left."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess

ROWS = 300
WAIT_SECONDS = 60.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Not started; the test starts it with what it needs in the environment."""
    process = DaemonProcess(tmp_path / "data")
    yield process
    process.kill()


@pytest.fixture
def connect(daemon: DaemonProcess) -> Callable[[], forebay.Client]:
    """Connects by the socket's address: a client given the folder would start a daemon itself."""
    return lambda: forebay.connect(daemon.address()["rpc"])


def _noise(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 256, 1024, dtype=np.uint8) for _ in range(ROWS)])


@pytest.fixture
def write_rows() -> Callable[[forebay.Client, str, int], None]:
    """Writes a dataset of several shards whose content follows from the row and the seed."""

    def write(client: forebay.Client, name: str, seed: int) -> None:
        schema = {"row": "int64", "noise": forebay.Array("uint8", (1024,))}
        with client.create_dataset(
            name, schema=schema, shard_bytes=128 * 1024, batch_bytes=32 * 1024
        ) as writer:
            for row, noise in enumerate(_noise(seed)):
                writer.write(row=row, noise=noise)

    return write


@pytest.fixture
def check_rows() -> Callable[[forebay.Client, str, int], None]:
    """Asserts that a dataset holds every row that ``write_rows`` wrote, bit for bit."""

    def check(client: forebay.Client, name: str, seed: int) -> None:
        dataset = client.dataset(name)
        assert len(dataset) == ROWS
        found = dataset.take(np.arange(ROWS))
        assert np.array_equal(found["row"], np.arange(ROWS))
        assert np.array_equal(found["noise"], _noise(seed))

    return check


@pytest.fixture
def in_background() -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Runs an action in a thread; the function it answers waits for its result or exception."""

    def run(action: Callable[[], Any]) -> Callable[[], Any]:
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.append(action())
            except BaseException as error:  # noqa: BLE001 - handed to the test
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()

        def wait() -> Any:
            thread.join(2 * WAIT_SECONDS)
            assert not thread.is_alive(), "the client hangs"
            return outcome[0]

        return wait

    return run


def local_files(data: Path) -> list[Path]:
    """All replica files of the local tiers, unfinished ones included."""
    return [
        path
        for tier in ("ssd", "hdd")
        for folder in ("files", "tmp")
        for path in (data / tier / folder).rglob("*")
        if path.is_file()
    ]


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], str], None]:
    """Waits for a condition with a deadline."""

    def wait(condition: Callable[[], bool], what: str) -> None:
        ticking = threading.Event()
        for _ in range(int(WAIT_SECONDS / 0.05)):
            if condition():
                return
            ticking.wait(0.05)
        pytest.fail(f"not within {WAIT_SECONDS} s: {what}")

    return wait


@pytest.fixture
def files_of(daemon: DaemonProcess) -> Callable[[], list[Path]]:
    """The files of the daemon's local tiers."""
    return lambda: local_files(daemon.data)
