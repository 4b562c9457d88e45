"""Jobs of several ranks against a real daemon; ``ranks.py`` beside this is what each rank runs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forebay_server.testing.daemon import DaemonProcess

SECONDS = 100.0  # above the time after which a rank gives itself up, with its stacks


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path_factory.mktemp("daemon") / "data") as running:
        yield running


def start(
    scenarios: str, size: int, daemon: DaemonProcess, scratch: Path, **environment: str
) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / "ranks.py"), scenarios]
    return [
        subprocess.Popen(
            [*command, str(rank), str(size), str(scratch / "init"), str(daemon.data), str(scratch)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **({"FOREBAY_FAILPOINTS": ""} if not environment or rank == 0 else environment),
            },
        )
        for rank in range(size)
    ]


def outcome(processes: list[subprocess.Popen[str]]) -> list[int]:
    """Exit codes, with everything that was written if one is not 0."""
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
            sys.stdout.write(f"---- rank {rank} ended with {code}\n{output}\n")
    return codes


@pytest.mark.timeout(200)
@pytest.mark.parametrize("no_local", ["0", "1"], ids=["local", "remote"])
def test_saved_on_four_ranks_loads_bit_exact_on_any_number(
    daemon: DaemonProcess, tmp_path: Path, no_local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREBAY_NO_LOCAL", no_local)
    assert outcome(start("reshard", 6, daemon, tmp_path)) == [0] * 6


@pytest.mark.timeout(200)
def test_wrappers_errors_replicas_and_torch_functions_and_all_ranks_plan_or_none_does(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    """One start of the ranks for all: it costs more than what they do."""
    scenarios = "wrappers,errors,lost_answer,replicated,torch_functions"
    plans = "steady,late_state,balanced"
    assert outcome(start(f"{scenarios},{plans}", 3, daemon, tmp_path)) == [0] * 3


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_overlapped_saves_of_wrapped_models_and_an_error_of_one_rank(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    assert outcome(start("overlapped,overlapped_error", 2, daemon, tmp_path)) == [0] * 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_after_a_restart_of_the_daemon_all_ranks_plan_anew(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path / "data") as daemon:
        ranks = start("restarted_plan", 2, daemon, tmp_path)
        wait_until((tmp_path / "restart").exists, SECONDS)
        daemon.restart()
        (tmp_path / "restarted").touch()
        assert outcome(ranks) == [0, 0]


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("place", ["after_begin", "after_copy", "after_seal"])
def test_a_killed_rank_fails_the_save_of_the_others(
    daemon: DaemonProcess, tmp_path: Path, place: str
) -> None:
    killed = {"FOREBAY_FAILPOINTS": f"client.save.{place}:2"}
    assert outcome(start("lost_rank", 2, daemon, tmp_path, **killed)) == [0, -9]


@pytest.mark.slow
def test_a_rank_that_dies_before_it_asks_is_named(daemon: DaemonProcess, tmp_path: Path) -> None:
    killed = {"FOREBAY_FAILPOINTS": "client.save.after_plan:2"}
    assert outcome(start("lost_before_asking", 2, daemon, tmp_path, **killed)) == [0, -9]


@pytest.mark.timeout(200)
def test_all_ranks_offer_a_sealed_generation_to_the_restarted_daemon(tmp_path: Path) -> None:
    daemon = DaemonProcess(
        tmp_path / "data", environment={"FOREBAY_FAILPOINTS": "generation.before_commit"}
    )
    with daemon:
        ranks = start("restart", 2, daemon, tmp_path)
        assert daemon.wait_exit(SECONDS) == -9
        daemon.environment.clear()
        daemon.start().wait_ready()
        assert outcome(ranks) == [0, 0]
