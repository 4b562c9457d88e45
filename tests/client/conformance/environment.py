"""A data set on a real daemon in a process of its own, with everything that may happen to it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import forebay
from forebay.testing.blobs import flip_bit, replica_files
from forebay.testing.conformance.ours import ForebayEnvironment
from forebay_server.testing.daemon import DaemonProcess

SSD_BYTES = 24 * 2**20
STOPPED_SECONDS, RUNNING_SECONDS = 0.15, 0.05


class DaemonEnvironment(ForebayEnvironment):
    """The samples lie in the ssd tier and, remote, in the object tier of *daemon*, whose ssd tier
    has SSD_BYTES."""

    def __init__(
        self, client: forebay.Client, daemon: DaemonProcess, num_samples: int, *, is_remote: bool
    ) -> None:
        super().__init__(client, "conformance", num_samples)
        self._daemon = daemon
        self._is_remote = is_remote

    def _write_again(self) -> None:
        super()._write_again()
        if self._is_remote:
            self.client.dataset(self.name).wait("remote", timeout=60)

    @contextmanager
    def damaged(self) -> Iterator[None]:
        """A bit of every segment in the ssd tier is flipped; the object tier, if there is one,
        has another copy."""
        files = replica_files(self._daemon.data)
        contents = [path.read_bytes() for path in files]
        assert files
        for path in files:
            for offset in range(100, path.stat().st_size // 2, 512):
                flip_bit(path, offset)
        yield
        if not self._is_remote:  # there is no other copy: a person puts this one back
            for path, content in zip(files, contents, strict=True):
                path.write_bytes(content)
            self._daemon.restart()

    @contextmanager
    def slow(self) -> Iterator[None]:
        """The daemon stands still three quarters of the time."""
        over = threading.Event()

        def hold_up() -> None:
            while not over.wait(RUNNING_SECONDS):
                os.kill(self._daemon.pid, signal.SIGSTOP)
                over.wait(STOPPED_SECONDS)
                os.kill(self._daemon.pid, signal.SIGCONT)

        thread = threading.Thread(target=hold_up)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def full(self) -> Iterator[None]:
        """Another data set takes all of the ssd tier, so that this one is only remote."""
        rows = np.zeros((64, 65536), np.uint8)
        with self.client.create_dataset(
            "filler", schema={"x": forebay.Array("uint8", (65536,))}, shard_bytes=4 * 2**20
        ) as writer:
            for _ in range(SSD_BYTES // rows.nbytes + 2):
                for row in rows:
                    writer.write(x=row)
        try:
            yield
        finally:
            self.client.delete_dataset("filler", now=True)

    @contextmanager
    def restarted(self) -> Iterator[None]:
        """The daemon was killed, and runs again."""
        self._daemon.restart()
        yield


@contextmanager
def daemon_environment(
    folder: Path,
    num_samples: int = 211,
    *,
    is_remote: bool = True,
    kind: type[DaemonEnvironment] = DaemonEnvironment,
) -> Iterator[DaemonEnvironment]:
    """An environment of its own in *folder*, with an object tier if *is_remote*."""
    limits = ["--ssd-bytes", str(SSD_BYTES), "--hdd-path", "none", "--reserve-bytes", "0"]
    if not is_remote:
        limits += ["--object-url", "none"]
    with (
        DaemonProcess(folder / "data", *limits) as daemon,
        forebay.connect(daemon.data) as client,
    ):
        environment = kind(client, daemon, num_samples, is_remote=is_remote)
        with environment.fresh():
            yield environment
