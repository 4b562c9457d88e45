"""Bytes in children of fork, forkserver and spawn, beside a parent that is busy."""

import hashlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import forebay
from forebay.testing.blobs import store_blob
from forebay.testing.workers import read_blob
from forebay.transfer import Blob

CONTENT = random.Random(3).randbytes(3 << 20)
CHILD_SECONDS = 60


def in_fork(work: Callable[[], object]) -> int:
    """Run *work* in a plain child of fork; its exit status (1: it raised)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hung")


@contextmanager
def busy(work: Callable[[], object]) -> Iterator[None]:
    """*work* over and over in another thread."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


@pytest.fixture
def blob_id(client: forebay.Client) -> str:
    return store_blob(client, CONTENT)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_beside_a_busy_client(client: forebay.Client, blob_id: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    num_workers = 20 if method == "fork" else 3

    def parent() -> None:
        client.datasets()
        client.transfer.open([blob_id])[0].close()

    with busy(parent):
        for start in range(0, num_workers, 4):
            workers = [
                context.Process(target=read_blob, args=(client.endpoint, blob_id, sha256))
                for _ in range(min(4, num_workers - start))
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(CHILD_SECONDS)
            assert [worker.exitcode for worker in workers] == [0] * len(workers)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_goes_on_with_what_it_inherited(client: forebay.Client, blob_id: str) -> None:
    [inherited] = client.transfer.open([blob_id])
    inherited.map(0, 100)
    transfer = client.transfer

    def child() -> None:
        assert inherited.map() == CONTENT
        [opened] = transfer.open([blob_id])
        assert opened.map() == CONTENT
        opened.close()
        inherited.close()

    def parent() -> None:
        transfer.open([blob_id])[0].close()

    with busy(parent):
        assert [in_fork(child) for _ in range(10)] == [0] * 10
    assert_still_open(inherited)


def assert_still_open(blob: Blob) -> None:
    buffer = bytearray(blob.num_bytes)
    blob.read_into(0, buffer)
    assert buffer == CONTENT


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_releases_nothing_of_its_parent(client: forebay.Client, blob_id: str) -> None:
    before = sum(tier.open_bytes for tier in client.status().tiers)
    [blob] = client.transfer.open([blob_id])
    held = sum(tier.open_bytes for tier in client.status().tiers)
    assert held > before
    assert in_fork(blob.close) == 0
    assert sum(tier.open_bytes for tier in client.status().tiers) == held
    blob.close()
