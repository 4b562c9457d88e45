"""A daemon and trainers that a test holds at named points of a save, and looks at what is left."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import forebay
from forebay_server.testing.beside import load_beside
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.failpoints import ALL, VARIABLE

HERE = Path(__file__).parent
SECONDS = 60.0


trainers = load_beside(__file__, "trainers")


def until(
    condition: Callable[[], bool], what: Callable[[], object], seconds: float = SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.02)


def same_state(found: Any, step: int) -> None:
    wanted = trainers.state_at(step)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        same = torch.equal(found[name], value) if name != "step" else found[name] == value
        assert same, f"{name} of step {step} is not what was saved"


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


class System:
    """A daemon that can be held at any point, and trainers that can. A context manager."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        folder.joinpath("fifos").mkdir()
        points = sorted(name for name in ALL if not name.startswith("client."))
        held = ",".join(f"{name}@{self.fifo(name)}" for name in points)
        self.daemon = DaemonProcess(
            folder / "data",
            *("--hdd-path", "none", "--lease-seconds", "10", "--trash-seconds", "0"),
            *arguments,
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

    def __enter__(self) -> System:
        try:
            self.daemon.start().wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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

    def fork(
        self,
        run: str,
        num_ranks: int = 1,
        *,
        durability: str = "local",
        hold: str = "",
        held_rank: int = 0,
    ) -> list[int]:
        """Processes of the ranks of a trainer that saves step 2 of *run*; *held_rank* stays at the
        point *hold*, if one is given."""
        what = {
            "address": self.daemon.address()["rpc"],
            "run": run,
            "step": 2,
            "num_ranks": num_ranks,
            "meet": str(self.folder / f"{run}-meet"),
            "durability": durability,
        }
        pids = []
        for rank in range(num_ranks):
            held = f"{hold}@{self.fifo(hold)}" if hold and rank == held_rank else ""
            result = str(self.folder / f"{run}-{rank}")
            pids.append(
                self._tell(fork={**what, "rank": rank, "failpoints": held, "result": result})
            )
        return pids

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

    def age(self) -> None:
        """Files that no row names are left alone for an hour: it is over."""
        long_ago = time.time() - 7200
        for tier in ("ssd", "object"):
            for path in (self.daemon.data / tier).rglob("*"):
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (long_ago, long_ago))

    def save_before(self, run: str) -> None:
        """The generation before, settled as far as it goes."""
        with self.connect() as client, forebay.Checkpointer(client, run) as checkpointer:
            checkpointer.save(1, state=trainers.state_at(1)).wait("remote", timeout=SECONDS)

    def check_left(self, run: str, allowed: set[int]) -> None:
        """The newest step is one of those *allowed*, whole; step 1 is, too, and it saves on."""
        with self.connect() as client:
            with forebay.Checkpointer(client, run) as checkpointer:
                resumed = checkpointer.restore("latest")
                assert resumed is not None
                assert resumed.step in allowed, (client.checkpoints(run), self.results(run))
                assert resumed.skipped == ()
                same_state(resumed.state, resumed.step)
                committed = {
                    one.step for one in client.checkpoints(run) if one.state == "committed"
                }
                assert committed == set(range(1, resumed.step + 1))
                checkpointer.save(3, state=trainers.state_at(3)).wait("local", timeout=SECONDS)
            for selector, step in (("latest", 3), ("1/1", 1)):
                with forebay.Checkpointer(client, run) as checkpointer:
                    same_state(checkpointer.restore(selector).state, step)
            assert client.fsck().left == []

    def check_no_leak(self, run: str, before: dict[str, Any]) -> None:
        """Once the run is gone, so is all that it took."""
        with self.connect() as client:
            client.delete_checkpoints(run, now=True)
            self.age()
            client.collect_garbage()
            found: dict[str, Any] = {}

            def is_clean() -> bool:
                found.update(self.leftovers())
                return found == before

            until(is_clean, lambda: {"left": found, "before": before})
