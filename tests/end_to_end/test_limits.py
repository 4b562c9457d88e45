"""Limits of a real daemon, measured on the disk while many clients of other processes work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.limits import MIB

LIMIT_BYTES = 24 * MIB
SAMPLE_BYTES = MIB
NUM_SAMPLES = 48
"""Twice what the tier may hold."""

CLIENTS_PER_PROCESS = 4

PUSHERS = """
import sys, threading, numpy as np, forebay
data, process, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
def push(client_number):
    with forebay.connect(data) as client:
        for turn in range(3):
            name = f"p{process}-{client_number}-{turn}"
            fill = np.random.default_rng(hash(name) % 2**32)
            try:
                with client.create_dataset(name, shard_bytes=1 << 20) as writer:
                    for _ in range(4):
                        writer.write(x=fill.integers(0, 255, 1 << 19, dtype=np.uint8))
            except forebay.ResourceExhausted as error:
                print("refused", str(error)[:60])
                continue
            client.dataset(name).wait("remote", timeout=60)
            print("pushed", name)
threads = [threading.Thread(target=push, args=(one,)) for one in range(number)]
[one.start() for one in threads]
[one.join() for one in threads]
"""

READERS = """
import sys, threading, forebay
data, process, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
def read(client_number):
    with forebay.connect(data) as client:
        dataset, held = client.dataset("d"), []
        with forebay.DataLoader(dataset, global_batch_size=2, seed=client_number) as loader:
            for epoch in loader.epochs(1):
                for batch in epoch:
                    held = [*held[-2:], batch]
                    assert len(batch["number"]) == 2
    print("read", process, client_number)
threads = [threading.Thread(target=read, args=(one,)) for one in range(number)]
[one.start() for one in threads]
[one.join() for one in threads]
"""


def on_disk(folder: Path) -> dict[int, int]:
    """Inode to its bytes on disk, of a tier's files, unfinished ones included."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names if Path(path) != folder else ():
            try:
                stat = os.stat(os.path.join(path, name))
            except FileNotFoundError:
                continue
            found[stat.st_ino] = stat.st_blocks * 512
    return found


class Sampler(threading.Thread):
    """The most bytes that *folder* took at any time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self._folder = folder
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.005):
            # A file counts if it was there before and after one moment: walking takes time.
            before, after = on_disk(self._folder), on_disk(self._folder)
            there = sum(size for inode, size in after.items() if inode in before)
            self.highest = max(self.highest, there)

    def stop(self) -> None:
        self._over.set()
        self.join()


@pytest.mark.timeout(300)
def test_no_limit_is_passed_while_16_clients_push_hold_maps_and_prefetch(tmp_path: Path) -> None:
    objects = ("--object-url", f"file://{tmp_path}/objects", "--reserve-bytes", "0")
    data = tmp_path / "data"
    with DaemonProcess(data, *objects) as first, forebay.connect(str(data)) as client:
        schema = {"x": forebay.Array("uint8", (SAMPLE_BYTES,)), "number": "int64"}
        random = np.random.default_rng(0)
        with client.create_dataset("d", schema, shard_bytes=SAMPLE_BYTES + 8192) as writer:
            for number in range(NUM_SAMPLES):
                writer.write(x=random.integers(0, 255, SAMPLE_BYTES, np.uint8), number=number)
        client.dataset("d").wait("remote", timeout=60)
        first.terminate()
    shutil.rmtree(data / "ssd")
    limits = ("--ssd-bytes", str(LIMIT_BYTES), "--hdd-path", "none", "--replaced", "ssd")
    with DaemonProcess(data, *objects, *limits) as daemon:
        sampler = Sampler(data / "ssd")
        sampler.start()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(data), str(number), str(CLIENTS_PER_PROCESS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number, script in enumerate((PUSHERS, READERS, PUSHERS, READERS))
        ]
        told = [process.communicate(timeout=240)[0] for process in processes]
        sampler.stop()
        assert [process.returncode for process in processes] == [0] * 4, told
    text = "\n".join(told)
    assert "Traceback" not in text
    assert text.count("read ") == 2 * CLIENTS_PER_PROCESS
    assert text.count("pushed ") > 0
    assert LIMIT_BYTES // 2 < sampler.highest <= LIMIT_BYTES
    assert "Traceback" not in daemon.log()
