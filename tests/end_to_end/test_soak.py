"""Half an hour of everything at once: the daemon's descriptors, threads, memory, disk stay flat."""

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess

SECONDS = float(os.environ.get("FOREBAY_SOAK_SECONDS", "1800"))
SAMPLE_SECONDS = max(0.5, SECONDS / 200)
ROWS = 512
SHAPE = (2048,)


@dataclass(frozen=True)
class Sample:
    """The daemon at one moment."""

    num_files: int
    num_threads: int
    memory_bytes: int
    """Resident, without what it shares with clients."""
    disk_bytes: int


def look(pid: int, data: Path) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    disk = 0
    for folder, _, files in os.walk(data):
        for name in files:
            try:
                disk += os.stat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return Sample(
        len(os.listdir(f"/proc/{pid}/fd")),
        int(status["Threads"]),
        int(status["RssAnon"].split()[0]) * 1024,
        disk,
    )


def rows_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, *SHAPE), dtype=np.uint8)


class Load:
    """Users who go on until told to stop; what goes wrong is kept."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.rounds: dict[str, int] = {}

    def start(self, *users: Callable[[forebay.Client, int], None]) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._go_on, args=(user,)) for user in users]
        for thread in threads:
            thread.start()
        return threads

    def _go_on(self, user: Callable[[forebay.Client, int], None]) -> None:
        try:
            for number in itertools.count():
                if self.stop.is_set():
                    return
                with forebay.connect(self._address) as client:
                    user(client, number)
                self.rounds[user.__name__] = number + 1
        except BaseException as error:  # noqa: BLE001 - shown by the test
            self.errors.append(error)
            self.stop.set()


def write_and_delete(client: forebay.Client, number: int) -> None:
    """Datasets come, are read once and go."""
    name, rows = f"passing-{number}", rows_of(number)
    with client.create_dataset(name, schema={"x": forebay.Array("uint8", SHAPE)}) as writer:
        for row in rows:
            writer.write(x=row)
    assert np.array_equal(client.dataset(name).take(np.arange(ROWS))["x"], rows)
    client.delete_dataset(name, now=True)


def read_epochs(client: forebay.Client, number: int) -> None:
    """One that stays is read again and again."""
    with forebay.DataLoader(
        client.dataset("kept"), global_batch_size=64, shuffle="full", seed=number
    ) as loader:
        assert sum(int(batch["x"].shape[0]) for batch in loader) == ROWS


def save_and_restore(client: forebay.Client, number: int) -> None:
    """Generations come and the older ones go."""
    state = {"weight": torch.full((200_000,), float(number))}
    with forebay.Checkpointer(client, run="soak") as checkpointer:
        checkpointer.restore("latest", missing_ok=True)
        checkpointer.save(number + 1, state=state).wait("local", timeout=120)
        resumed = checkpointer.restore("latest")
    assert resumed is not None
    assert torch.equal(resumed.state["weight"], state["weight"])
    for one in client.checkpoints("soak"):
        if one.step <= number - 3 and one.state == "committed":
            client.delete_checkpoints("soak", attempt=one.attempt, step=one.step, now=True)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_mixed_load_leaves_everything_flat(tmp_path: Path) -> None:
    limits = ("--ssd-bytes", "256MiB", "--trash-seconds", "0")
    with DaemonProcess(tmp_path / "data", *limits) as daemon:
        address = daemon.address()["rpc"]
        with (
            forebay.connect(address) as client,
            client.create_dataset("kept", schema={"x": forebay.Array("uint8", SHAPE)}) as writer,
        ):
            for row in rows_of(0):
                writer.write(x=row)
        load = Load(address)
        threads = load.start(write_and_delete, read_epochs, save_and_restore)
        samples = []
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends and not load.stop.wait(SAMPLE_SECONDS):
            samples.append(look(daemon.pid, daemon.data))
        load.stop.set()
        for thread in threads:
            thread.join(120)
        assert not load.errors, load.errors
        assert min(load.rounds.values()) >= 3, load.rounds
    check_flat(samples)


def check_flat(samples: list[Sample]) -> None:
    """The last third is no higher than the second, but for what noise may be."""
    third = len(samples) // 3
    assert third >= 10, "too few samples"
    for name, slack in (
        ("num_files", 8),
        ("num_threads", 4),
        ("memory_bytes", 32 << 20),
        ("disk_bytes", 64 << 20),
    ):
        values = [getattr(sample, name) for sample in samples]
        before, after = statistics.median(values[third:-third]), statistics.median(values[-third:])
        assert after <= 1.1 * before + slack, f"{name} grew from {before} to {after}"
