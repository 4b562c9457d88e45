"""SIGKILL of trainer, daemon, both or one rank of four at every named point of a save."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.failpoints import VARIABLE

HERE = Path(__file__).parent
SECONDS = 60.0


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"forebay_kills_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


trainers, kill_points = load("trainers"), load("kill_points")

SOME = {
    ("client.save.in_copy", "trainer"),
    ("pack.after_seal", "trainer"),
    ("client.save.after_copy", "daemon"),
    ("upload.after_publish", "both"),
    ("client.save.after_copy", "rank"),
}
"""Stand for all in the default suite."""

CASES = [
    pytest.param(
        point,
        victim,
        id=f"{point.name}-{victim}",
        marks=() if (point.name, victim) in SOME else pytest.mark.slow,
    )
    for point in kill_points.POINTS
    for victim in kill_points.VICTIMS
]


def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {what()}"
        time.sleep(0.02)


class System:
    """A daemon that can be held at any point, and trainers that can."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.joinpath("fifos").mkdir()
        held = ",".join(
            f"{point.name}@{self.fifo(point.name)}"
            for point in kill_points.POINTS
            if point.process == "daemon"
        )
        self.daemon = DaemonProcess(
            folder / "data",
            *("--hdd-path", "none", "--lease-seconds", "10", "--trash-seconds", "0"),
            environment={VARIABLE: held},
        )
        with folder.joinpath("trainers.log").open("w") as log:
            self._forks = subprocess.Popen(
                [sys.executable, str(HERE / "trainers.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._holding: tuple[Path, int] | None = None

    def fifo(self, point: str) -> Path:
        return self.folder / "fifos" / point

    def close(self) -> None:
        self.release()
        self.daemon.kill()
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.close()
        self._forks.wait(SECONDS)
        self._forks.stdout.close()

    def _tell(self, **what: Any) -> int:
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(json.dumps(what) + "\n")
        self._forks.stdin.flush()
        return int(self._forks.stdout.readline())

    def connect(self) -> forebay.Client:
        return forebay.connect(self.daemon.address()["rpc"])

    def fork(self, point: Any, victim: str, run: str) -> list[int]:
        """The ranks of *run*, which save step 2; the held one is the last of those given."""
        num_ranks = 4 if victim == "rank" else 1
        held = num_ranks // 2
        common = {
            "address": self.daemon.address()["rpc"],
            "run": run,
            "step": 2,
            "num_ranks": num_ranks,
            "meet": str(self.folder / f"{run}-meet"),
            "durability": "remote" if point.name.startswith("flush") else "local",
        }
        pids = []
        for rank in range(num_ranks):
            is_held = point.process == "trainer" and rank == held
            which = f"{point.name}@{self.fifo(point.name)}" if is_held else ""
            result = str(self.folder / f"{run}-{rank}")
            own = {"rank": rank, "failpoints": which, "result": result}
            pids.append(self._tell(fork={**common, **own}))
        return [*pids[:held], *pids[held + 1 :], pids[held]]

    def wait(self, pid: int) -> int:
        return self._tell(wait=pid)

    def hold(self, point: str) -> None:
        """From now on, who comes to *point* stays there."""
        os.mkfifo(self.fifo(point))

    def wait_held(self, point: str) -> None:
        """Until somebody is there."""
        fifo = self.fifo(point)

        def is_there() -> bool:
            try:
                self._holding = (fifo, os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody reads it
                return False
            return True

        until(is_there, lambda: f"nobody comes to {point}; {self.trainers_log()}")

    def hold_no_more(self) -> None:
        """Only who is there by now stays. Idempotent."""
        if self._holding is not None:
            self._holding[0].unlink(missing_ok=True)

    def release(self) -> None:
        """Let go on whoever is there and lives. Idempotent."""
        self.hold_no_more()
        if self._holding is not None:
            os.close(self._holding[1])
            self._holding = None

    def trainers_log(self) -> str:
        return (self.folder / "trainers.log").read_text()[-3000:]

    def results(self, run: str) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob(f"{run}-[0-9]"))]

    # ------------------------------------------------------------------------------------- looks

    def leftovers(self) -> dict[str, Any]:
        """Files, catalog rows and memory that something still takes."""
        data = self.daemon.data
        files = [
            str(path.relative_to(data))
            for tier in ("ssd", "object")
            for path in (data / tier).rglob("*")
            if path.is_file() and path.name != "volume.json"
        ]
        with self.connect() as client:
            status = client.status()
            ram = next(tier for tier in status.tiers if tier.name == "ram").used_bytes
        return {"files": sorted(files), "rows": rows_of(data), "ram": ram}


def rows_of(data: Path) -> dict[str, int]:
    """How many rows of what belongs to somebody the catalog has."""
    tables = ("files", "blobs", "replicas", "extents", "manifests", "manifest_blobs", "runs")
    tables += ("attempts", "generations", "packs", "uploads", "tags", "fingerprints")
    catalog = sqlite3.connect(f"file:{data / 'catalog.sqlite'}?mode=ro", uri=True)
    try:
        return {
            table: catalog.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - ours
            for table in tables
        }
    finally:
        catalog.close()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    made = System(tmp_path_factory.mktemp("kills"))
    try:
        made.daemon.start().wait_ready()
        yield made
    finally:
        made.close()


def save_before(system: System, run: str) -> None:
    """The generation before, settled as far as it goes."""
    with system.connect() as client, forebay.Checkpointer(client, run) as checkpointer:
        checkpointer.save(1, state=trainers.state_at(1)).wait("remote", timeout=SECONDS)


def kill(system: System, victim: str, pids: list[int]) -> list[int]:
    """Kill who is to die and let the others go on; how the trainers ended."""
    if victim != "daemon":
        for pid in pids[-1:] if victim == "rank" else pids:
            os.kill(pid, signal.SIGKILL)
    if victim in ("daemon", "both"):
        system.daemon.kill()
        system.hold_no_more()
        system.daemon.start().wait_ready()
    system.release()
    return [system.wait(pid) for pid in pids]


def same_state(found: Any, step: int) -> None:
    wanted = trainers.state_at(step)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if name != "step" else found[name] == value
        assert same, f"{name} of step {step} is not what was saved"


def check_left(system: System, run: str, outcome: str) -> None:
    """The newest generation is one of those that may be, whole; the one before is, too."""
    allowed = {"before": {1}, "saved": {2}, "whole": {1, 2}}[outcome]
    with system.connect() as client:
        with forebay.Checkpointer(client, run) as checkpointer:
            resumed = checkpointer.restore("latest")
            assert resumed is not None
            assert resumed.step in allowed, (client.checkpoints(run), system.results(run))
            assert resumed.skipped == ()
            same_state(resumed.state, resumed.step)
            committed = {one.step for one in client.checkpoints(run) if one.state == "committed"}
            assert committed == set(range(1, resumed.step + 1))
            checkpointer.save(3, state=trainers.state_at(3)).wait("local", timeout=SECONDS)
        for selector, step in (("latest", 3), ("1/1", 1)):
            with forebay.Checkpointer(client, run) as checkpointer:
                same_state(checkpointer.restore(selector).state, step)
        assert client.fsck().left == []


def check_no_leak(system: System, run: str, before: dict[str, Any]) -> None:
    """Once the run is gone, so is all that it took."""
    with system.connect() as client:
        client.delete_checkpoints(run, now=True)
        client.collect_garbage()
        found: dict[str, Any] = {}

        def is_clean() -> bool:
            found.update(system.leftovers())
            return found == before

        until(is_clean, lambda: {"left": found, "before": before})


@pytest.mark.parametrize(("point", "victim"), CASES)
def test_what_is_left(system: System, point: Any, victim: str) -> None:
    run = f"{point.name}-{victim}".replace(".", "-").replace("_", "-")
    before = {**system.leftovers(), "ram": 0}  # no case leaves memory to the next
    save_before(system, run)
    system.hold(point.name)
    pids = system.fork(point, victim, run)
    system.wait_held(point.name)
    ends = kill(system, victim, pids)
    if victim in ("trainer", "both"):
        assert ends == [-signal.SIGKILL]
    elif victim == "daemon":
        assert ends in ([0], [3]), system.trainers_log()  # saved, or a clear error
    else:
        assert ends[-1] == -signal.SIGKILL
        assert set(ends[:-1]) <= {0, 3}, system.trainers_log()
    check_left(system, run, point.left_by(victim))
    check_no_leak(system, run, before)


def test_every_point_that_a_save_passes_is_in_the_table() -> None:
    assert {point.name for point in kill_points.POINTS} == kill_points.PASSED


def test_the_page_is_printed_from_the_table() -> None:
    path = HERE / "kill_points.py"
    assert kill_points.PAGE.read_text(encoding="utf-8") == kill_points.render(), f"run {path}"
