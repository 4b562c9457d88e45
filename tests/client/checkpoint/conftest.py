"""Ranks that start quickly, and a pool of them that forms one world after the other."""

import contextlib
import itertools
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay_server.testing.warm import WarmProcess, WarmPython

RESULT = "RESULT "
SECONDS = 120.0

RunJob = Callable[..., None]
StartRank = Callable[..., WarmProcess]


@pytest.fixture(scope="session")
def start_rank(warm_torch: WarmPython) -> StartRank:
    """Starts a program of one rank that lies beside this file."""

    def start(*words: str, streams: tuple[int, int, int], **environment: str) -> WarmProcess:
        program = str(Path(__file__).parent / words[0])
        own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return warm_torch.start([program, *words[1:]], own, *streams)

    return start


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A run of the test's own."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:100].strip("-")


@pytest.fixture
def make(client: forebay.Client, run: str) -> Iterator[Callable[..., forebay.Checkpointer]]:
    """Makes Checkpointers of that run, or of the one that is named; closed at the end."""
    made: list[forebay.Checkpointer] = []

    def new(name: str = run, /, **options: Any) -> forebay.Checkpointer:
        made.append(forebay.Checkpointer(client, name, **{"timeout": SECONDS, **options}))
        return made[-1]

    yield new
    for one in made:
        one.close()


class Rank:
    """A process of ``dcp_ranks.py``: takes lines and answers each with one."""

    def __init__(self, start: StartRank, log: Path) -> None:
        given, stdin = os.pipe()
        stdout, told = os.pipe()
        with log.open("ab") as stderr:
            self.process = start("dcp_ranks.py", streams=(given, told, stderr.fileno()))
        os.close(given)
        os.close(told)
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Pool:
    """Ranks that are started once; more are started as a job needs them."""

    def __init__(self, folder: Path, start: StartRank) -> None:
        self._folder = folder
        self._start = start
        self._ranks: list[Rank] = []
        self._numbers = itertools.count()

    def run(self, scenario: str, size: int, address: str, **arguments: Any) -> None:
        """Have *size* ranks walk through *scenario*; fails with what any of them raised."""
        while len(self._ranks) < size:
            log = self._folder / f"rank-{len(self._ranks)}.log"
            self._ranks.append(Rank(self._start, log))
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
        for rank in self._ranks:
            rank.close()
        self._ranks = []

    def _answer(self, rank: int, deadline: float) -> str | None:
        """What the rank raised, empty if nothing; None if it does not answer."""
        pipe = self._ranks[rank].stdout
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
def pool(tmp_path_factory: pytest.TempPathFactory, start_rank: StartRank) -> Iterator[Pool]:
    running = Pool(tmp_path_factory.mktemp("ranks"), start_rank)
    yield running
    running.close()
