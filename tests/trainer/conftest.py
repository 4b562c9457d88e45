"""Trainers in processes of their own: as many ranks as a test wants, without torchrun.

They fork from a process that has imported torch, so that starting one takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.warm import WarmProcess, WarmPython
from forebay_trainer.preparation.sources import ALL, FOLDER_VARIABLE
from forebay_wire.errors import NotFound

MODULES = (
    "forebay_trainer.train",
    "forebay.checkpoint.checkpointer",
    "forebay.dataset.loader",
    "forebay._channel",
    "torch._dynamo",  # every optimizer loads it
)
NUM_SAMPLES = 100
SECONDS = 100.0


@pytest.fixture
def source() -> Callable[[str], Path]:
    """``source("vader")``: a package of data, as `make sources` fetches it; without it the test is
    skipped, or fails in continuous integration."""

    def found(name: str) -> Path:
        try:
            return ALL[name].find()
        except NotFound as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(error.message)

    return found


@pytest.fixture(autouse=True)
def fetched_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `make sources` puts them."""
    if FOLDER_VARIABLE not in os.environ:
        monkeypatch.setenv(FOLDER_VARIABLE, str(Path(__file__).parents[2] / ".sources"))


class Ranks:
    """The processes of one attempt. A context manager: none of them outlives it."""

    def __init__(self, warm: WarmPython, words: list[str], num_ranks: int, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
        shared["LOCAL_WORLD_SIZE"] = str(num_ranks)
        self.processes: list[WarmProcess] = []
        number = len(list(folder.glob("rank-0.*.log")))
        self.logs = [folder / f"rank-{rank}.{number}.log" for rank in range(num_ranks)]
        with open(os.devnull) as nothing:
            for rank, path in enumerate(self.logs):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with path.open("wb") as log:
                    streams = (nothing.fileno(), log.fileno(), log.fileno())
                    process = warm.start(
                        ["-m", "forebay_trainer", *words], {**shared, **place}, *streams
                    )
                self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def statuses(self, seconds: float = SECONDS) -> list[int]:
        """The exit status of each rank, once all have ended."""
        deadline = time.monotonic() + seconds
        try:
            return [each.wait(max(0.0, deadline - time.monotonic())) for each in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def finish(self, seconds: float = SECONDS) -> str:
        """Waits for the end, which must be a good one; what the ranks printed."""
        statuses = self.statuses(seconds)
        assert statuses == [0] * len(statuses), self.output()
        return self.output()

    def output(self) -> str:
        texts = ((path.name, path.read_text(errors="replace")) for path in self.logs)
        return "\n".join(f"---- {name}\n{text}" for name, text in texts)

    def events(self) -> list[dict[str, Any]]:
        """What all attempts in this folder have written down so far."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_step(self, step: int, seconds: float = SECONDS) -> None:
        """Until this attempt has taken optimizer step *step*."""
        deadline = time.monotonic() + seconds
        while True:
            starts = [event["attempt"] for event in self.events() if event["event"] == "start"]
            if any(
                event["event"] == "step" and event["step"] >= step
                for event in self.events()
                if event["attempt"] == starts[-1]
            ):
                return
            assert all(each.poll() is None for each in self.processes), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)

    def values(self, name: str, event: str = "step") -> dict[int, list[Any]]:
        """Step to what each attempt wrote of it."""
        found: dict[int, list[Any]] = defaultdict(list)
        for each in self.events():
            if each["event"] == event:
                found[each["step"]].append(each[name])
        return dict(found)


def free_port() -> int:
    """Outside the range from which the kernel gives ports to whoever connects."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture
def port() -> int:
    """A port that nobody listened on a moment ago."""
    return free_port()


@pytest.fixture(scope="session")
def warm_torch() -> Iterator[WarmPython]:
    with WarmPython(*MODULES) as warm:
        yield warm


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """With the dataset ``numbers`` that the recipe ``tiny`` trains on."""
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=(NUM_SAMPLES, 4)).astype(np.float32)
    labels = (numbers.sum(axis=1) > 0).astype(np.int64) + (numbers[:, 0] > 1)
    columns = {"x": pa.FixedShapeTensorArray.from_numpy_ndarray(numbers), "label": labels}
    with DaemonProcess(tmp_path_factory.mktemp("trainer") / "data") as process:
        with forebay.connect(process.data) as client:
            with client.create_dataset("numbers") as writer:
                writer.write_table(pa.table(columns))
            client.dataset("numbers").define_splits({"train": 0.8, "test": 0.2}, seed=0)
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[forebay.Client]:
    with forebay.connect(daemon.data) as connected:
        yield connected


Launch = Callable[..., Ranks]


@pytest.fixture
def launch(
    warm_torch: WarmPython, daemon: DaemonProcess, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Launch]:
    """``launch(*overrides, num_ranks=1, run="a", recipe="tiny")`` starts an attempt of a run."""
    started: list[Ranks] = []

    def start(*overrides: str, num_ranks: int = 1, run: str = "a", recipe: str = "tiny") -> Ranks:
        own = Path(__file__).parent / recipe
        words = [str(own if own.is_dir() else recipe), f"address={daemon.data}"]
        words += [f"run={request.node.name.split('[')[0]}-{os.getpid()}-{tmp_path.name}-{run}"]
        words += [f"output.folder={tmp_path / run}", *overrides]
        started.append(Ranks(warm_torch, words, num_ranks, tmp_path / run))
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()
