"""A pool of ranks that are started once and form one world after the other."""

import contextlib
import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RESULT = "RESULT "
SECONDS = 120.0

RunJob = Callable[..., None]


class Pool:
    """Processes of ``dcp_ranks.py``; more are started as a job needs them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count()

    def run(self, scenario: str, size: int, address: str, **arguments: Any) -> None:
        """Have *size* ranks walk through *scenario*; fails with what any of them raised."""
        while len(self._ranks) < size:
            self._ranks.append(self._start(len(self._ranks)))
        init_file = self._folder / f"init-{next(self._numbers)}"
        for rank in range(size):
            job = {
                "scenario": scenario,
                "rank": rank,
                "size": size,
                "init_file": str(init_file),
                "address": address,
                "arguments": arguments,
            }
            pipe = self._ranks[rank].stdin
            assert pipe is not None
            pipe.write(json.dumps(job).encode() + b"\n")
            pipe.flush()
        deadline = time.monotonic() + SECONDS
        answers = [self._answer(rank, deadline) for rank in range(size)]
        wrong = {rank: answer for rank, answer in enumerate(answers) if answer != ""}
        if None in answers:
            self.close()
        if wrong:
            pytest.fail(
                "\n".join(
                    f"---- rank {rank}\n{answer or self._log(rank)}"
                    for rank, answer in wrong.items()
                )
            )

    def close(self) -> None:
        for process in self._ranks:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._ranks = []

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        with (self._folder / f"rank-{rank}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "dcp_ranks.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def _answer(self, rank: int, deadline: float) -> str | None:
        """What the rank raised, empty if nothing; None if it does not answer."""
        pipe = self._ranks[rank].stdout
        assert pipe is not None
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            line = pipe.readline().decode() if ready else ""
            if line.startswith(RESULT):
                return str(json.loads(line.removeprefix(RESULT)))
            if not line:
                return None

    def _log(self, rank: int) -> str:
        text = (self._folder / f"rank-{rank}.log").read_text()
        return f"did not answer; its log ends with\n{text[-6000:]}"


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    running = Pool(tmp_path_factory.mktemp("ranks"))
    yield running
    running.close()
