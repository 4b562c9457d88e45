"""Jobs of several ranks against a real daemon; ``ranks.py`` beside this is what each rank runs."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.warm import WarmProcess

SECONDS = 100.0  # above the time after which a rank gives itself up, with its stacks


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        yield running


class Job:
    """Ranks that walk through scenarios, all in processes of their own."""

    def __init__(self, start_rank: Any, data: Path, scratch: Path) -> None:
        self._start_rank = start_rank
        self._data = data
        self._scratch = scratch
        self._ranks: list[WarmProcess] = []

    def start(self, scenarios: str, size: int, **environment: str) -> Self:
        """*environment* is that of all ranks but the first."""
        for rank in range(size):
            words = (scenarios, str(rank), str(size), str(self._scratch / "init"))
            words += (str(self._data), str(self._scratch))
            own = environment if rank else {}
            with self._log(rank).open("wb") as log, open(os.devnull) as nothing:
                streams = (nothing.fileno(), log.fileno(), log.fileno())
                self._ranks.append(self._start_rank("ranks.py", *words, streams=streams, **own))
        return self

    def codes(self) -> list[int]:
        """How each rank ended, with all that was written if one failed."""
        deadline = time.monotonic() + SECONDS
        try:
            codes = [rank.wait(max(0, deadline - time.monotonic())) for rank in self._ranks]
        finally:
            self.close()
        if any(codes):
            for rank, code in enumerate(codes):
                written = self._log(rank).read_text(errors="replace")
                sys.stdout.write(f"---- rank {rank} ended with {code}\n{written}\n")
        return codes

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()

    def _log(self, rank: int) -> Path:
        return self._scratch / f"rank-{rank}.log"


NewJob = Callable[[DaemonProcess], Job]


@pytest.fixture
def new_job(start_rank: Any, tmp_path: Path) -> Iterator[NewJob]:
    with ExitStack() as jobs:

        def new(daemon: DaemonProcess) -> Job:
            job = Job(start_rank, daemon.data, tmp_path)
            jobs.callback(job.close)
            return job

        yield new


@pytest.mark.timeout(200)
@pytest.mark.parametrize("no_local", ["0", "1"], ids=["local", "remote"])
def test_saved_on_four_ranks_loads_bit_exact_on_any_number(
    daemon: DaemonProcess, new_job: NewJob, no_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_NO_LOCAL", no_local)
    assert new_job(daemon).start("reshard", 6).codes() == [0] * 6


@pytest.mark.timeout(200)
def test_wrappers_errors_replicas_and_torch_functions_and_all_ranks_plan_or_none_does(
    daemon: DaemonProcess, new_job: NewJob
) -> None:
    """One start of the ranks for all: it costs more than what they do."""
    scenarios = "wrappers,errors,lost_answer,replicated,torch_functions"
    plans = "steady,late_state,balanced"
    assert new_job(daemon).start(f"{scenarios},{plans}", 3).codes() == [0] * 3


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_overlapped_saves_of_wrapped_models_and_an_error_of_one_rank(
    daemon: DaemonProcess, new_job: NewJob
) -> None:
    assert new_job(daemon).start("overlapped,overlapped_error", 2).codes() == [0] * 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_after_a_restart_of_the_daemon_all_ranks_plan_anew(tmp_path: Path, new_job: NewJob) -> None:
    with DaemonProcess(tmp_path / "data") as daemon:
        ranks = new_job(daemon).start("restarted_plan", 2)
        wait_until((tmp_path / "restart").exists, SECONDS)
        daemon.restart()
        (tmp_path / "restarted").touch()
        assert ranks.codes() == [0, 0]


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("place", ["after_begin", "after_copy", "after_seal"])
def test_a_killed_rank_fails_the_save_of_the_others(
    daemon: DaemonProcess, new_job: NewJob, place: str
) -> None:
    killed = {"FOREBAY_FAILPOINTS": f"client.save.{place}:2"}
    assert new_job(daemon).start("lost_rank", 2, **killed).codes() == [0, -9]


@pytest.mark.slow
def test_a_rank_that_dies_before_it_asks_is_named(daemon: DaemonProcess, new_job: NewJob) -> None:
    killed = {"FOREBAY_FAILPOINTS": "client.save.after_plan:2"}
    assert new_job(daemon).start("lost_before_asking", 2, **killed).codes() == [0, -9]


@pytest.mark.timeout(200)
def test_all_ranks_offer_a_sealed_generation_to_the_restarted_daemon(
    tmp_path: Path, new_job: NewJob
) -> None:
    daemon = DaemonProcess(
        tmp_path / "data", environment={"FOREBAY_FAILPOINTS": "generation.before_commit"}
    )
    with daemon:
        ranks = new_job(daemon).start("restart", 2)
        assert daemon.wait_exit(SECONDS) == -9
        daemon.environment.clear()
        daemon.start().wait_ready()
        assert ranks.codes() == [0, 0]
