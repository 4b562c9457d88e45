"""Bytes in children of fork, forkserver and spawn, beside a parent that is busy."""

import gc
import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
from dataclasses import dataclass

import pytest

import forebay
from forebay.testing.forks import CHILD_SECONDS, busy, in_fork
from forebay.testing.workers import read_blob
from forebay.transfer import Blob
from forebay_server.testing.daemon import DaemonProcess

NUM_BYTES = 3 << 20


@dataclass(frozen=True)
class Stored:
    """A blob that stays: the shard of a dataset."""

    id: str
    content: bytes


@pytest.fixture
def stored(client: forebay.Client) -> Stored:
    if "forked" not in client.datasets():
        with client.create_dataset("forked", {"x": "binary"}) as writer:
            writer.write(x=random.Random(3).randbytes(NUM_BYTES))
    [shard] = client.dataset("forked").manifest.shards
    [blob] = client.transfer.open([shard.blob])
    with blob:
        return Stored(shard.blob, bytes(blob.map()))


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "num_workers"),
    [("fork", 60), ("forkserver", 12), ("spawn", 8)],
)
def test_workers_beside_a_busy_client(
    client: forebay.Client, stored: Stored, method: str, num_workers: int
) -> None:
    """Only what a fork inherits differs from one child to the next: it has the most of them."""
    run_workers(client, stored, method, num_workers)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_two_hundred_workers_read_either_way(
    client: forebay.Client, stored: Stored, method: str
) -> None:
    run_workers(client, stored, method, 200)


def run_workers(client: forebay.Client, stored: Stored, method: str, num_workers: int) -> None:
    context = multiprocessing.get_context(method)
    sha256 = hashlib.sha256(stored.content).hexdigest()

    def parent() -> None:
        client.datasets()
        client.transfer.open([stored.id])[0].close()

    with busy(parent):
        for start in range(0, num_workers, 4):
            workers = [
                context.Process(target=read_blob, args=(client.endpoint, stored.id, sha256))
                for _ in range(min(4, num_workers - start))
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(CHILD_SECONDS)
            assert [worker.exitcode for worker in workers] == [0] * len(workers)


FORKS = """
import os, sys, threading
import forebay
with forebay.connect(sys.argv[1]) as client:
    client.datasets()
    stop = threading.Event()
    def work():
        while not stop.is_set():
            client.datasets()
    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    stop.set()
    thread.join()
"""


def test_grpc_is_left_alone_by_forks(daemon: DaemonProcess) -> None:
    """Its handlers hang, now and then, what forks beside a thread that makes calls."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, daemon.address()["rpc"]],
        env={**os.environ, "GRPC_VERBOSITY": "debug"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "fork() handlers" not in done.stderr


class Torn:
    """Garbage that only the collector finds, and that a child must not tear down."""

    def __init__(self, torn: list[int]) -> None:
        self.itself = self
        self.torn = torn

    def __del__(self) -> None:
        self.torn.append(os.getpid())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_garbage_of_the_parent_is_not_torn_down_in_a_child() -> None:
    torn: list[int] = []

    def child() -> None:
        gc.collect()
        assert not torn

    gc.collect()
    gc.disable()
    try:
        Torn(torn)
        assert in_fork(child) == 0
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert torn == [os.getpid()]
        gc.freeze()  # a program's own
        frozen = gc.get_freeze_count()
        assert in_fork(lambda: None) == 0
        assert gc.get_freeze_count() >= frozen - 10
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_what_a_child_has_inherited_stays_frozen_when_it_forks_itself() -> None:
    torn: list[int] = []

    def child() -> None:
        assert in_fork(lambda: None) == 0
        gc.collect()
        assert not torn

    gc.collect()
    gc.disable()
    try:
        Torn(torn)
        assert in_fork(child) == 0
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_goes_on_with_what_it_inherited(client: forebay.Client, stored: Stored) -> None:
    [inherited] = client.transfer.open([stored.id])
    inherited.map(0, 100)
    transfer = client.transfer

    def child() -> None:
        assert inherited.map() == stored.content
        [opened] = transfer.open([stored.id])
        assert opened.map() == stored.content
        opened.close()
        inherited.close()

    def parent() -> None:
        transfer.open([stored.id])[0].close()

    with busy(parent):
        assert [in_fork(child) for _ in range(10)] == [0] * 10
    assert_still_open(inherited, stored)


def assert_still_open(blob: Blob, stored: Stored) -> None:
    buffer = bytearray(blob.num_bytes)
    blob.read_into(0, buffer)
    assert buffer == stored.content


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_child_releases_nothing_of_its_parent(client: forebay.Client, stored: Stored) -> None:
    before = sum(tier.open_bytes for tier in client.status().tiers)
    [blob] = client.transfer.open([stored.id])
    held = sum(tier.open_bytes for tier in client.status().tiers)
    assert held > before
    assert in_fork(blob.close) == 0
    assert sum(tier.open_bytes for tier in client.status().tiers) == held
    blob.close()
