"""Searches whose runs are real processes, forked from one that has imported torch."""

import json
import os
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture
def start(warm_torch):
    """Starts a run as `forebay_trainer.search.pool.leashed` does, but in milliseconds."""
    started = []

    def begin(command, output, environment):
        assert command[0] == sys.executable
        with open(os.devnull) as nothing:
            streams = (nothing.fileno(), output.fileno(), output.fileno())
            started.append(
                warm_torch.start(
                    command[1:], {**os.environ, "OMP_NUM_THREADS": "1", **environment}, *streams
                )
            )
        return started[-1]

    begin.started = started
    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def words(daemon, tmp_path, request):
    """The arguments that every search of this test has: the recipe, and where it writes."""
    name = f"{request.node.name.split('[')[0]}-{os.getpid()}"
    return [str(TINY), f"run={name}", f"address={daemon.data}", f"output.folder={tmp_path / 'out'}"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def read_events():
    return events


@pytest.fixture
def search_process(warm_torch, tmp_path):
    """Starts ``python -m forebay_trainer WORDS``, whose runs are processes as users have them."""
    started = []

    def begin(*words):
        log = tmp_path / "search.log"
        with open(os.devnull) as nothing, log.open("ab") as output:
            streams = (nothing.fileno(), output.fileno(), output.fileno())
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            started.append(
                warm_torch.start(["-m", "forebay_trainer", *words], environment, *streams)
            )
        started[-1].log = log
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
