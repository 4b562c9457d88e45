"""Damage, restarts and short memory: nothing wrong is ever loaded, nothing sealed is lost."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess


class Weights:
    """A stateful with one tensor."""

    def __init__(self, seed: int, num_bytes: int = 300_000) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensor = torch.randn(num_bytes // 4, generator=generator)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.tensor = state["tensor"]


@pytest.fixture(params=["0", "1"], ids=["local", "remote"])
def data(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    monkeypatch.setenv("FOREBAY_NO_LOCAL", request.param)
    return tmp_path / "data"


RAW = ("--object-encoding", "raw")
"""Copies as large as what they are copies of."""


def flip_a_bit(folder: Path, known: set[Path]) -> set[Path]:
    """Damage every large file that came since; the files that there are now."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    for path in files - known:
        if path.stat().st_size >= 300_000 and "catalog" not in path.name:
            path.chmod(0o600)
            with path.open("r+b") as file:
                file.seek(100_000)
                byte = file.read(1)
                file.seek(100_000)
                file.write(bytes([byte[0] ^ 4]))
    return files


def test_damage_makes_latest_fall_back_and_a_named_step_an_error(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DaemonProcess(data, *RAW) as daemon, forebay.connect(data) as client:
        for step in (1, 2):
            weights = Weights(step)
            checkpointer = forebay.Checkpointer(client, "run", weights=weights)
            if step == 2:
                checkpointer.restore()
                weights.tensor = Weights(2).tensor
            checkpointer.save(step).wait("remote", 60)
            checkpointer.close()
            if step == 1:
                known = {path for path in data.rglob("*") if path.is_file()}
        flip_a_bit(data, known)
        daemon.restart()  # its memory has what was saved

        found = Weights(3)
        restorer = forebay.Checkpointer(client, "run", weights=found)
        with caplog.at_level(logging.WARNING):
            resumed = restorer.restore()
        assert resumed is not None
        assert (resumed.attempt, resumed.step) == (1, 1)
        assert [(one.attempt, one.step) for one in resumed.skipped] == [(2, 2)]
        assert "does not match" in resumed.skipped[0].reason or "damaged" in str(resumed.skipped[0])
        assert "run@2/2 is damaged" in caplog.text
        assert torch.equal(found.tensor, Weights(1).tensor)
        with pytest.raises(forebay.IntegrityError, match="run@2/2"):
            restorer.restore("2/2")
        restorer.close()


def test_a_fallback_that_does_not_fit_says_that_something_was_written(tmp_path: Path) -> None:
    data = tmp_path / "data"

    def net(num_layers: int) -> torch.nn.Module:
        return torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(num_layers)))

    with DaemonProcess(data, "--object-url", "none") as daemon, forebay.connect(data) as client:
        with forebay.Checkpointer(client, "run", model=net(2)) as checkpointer:
            checkpointer.save(1).wait("local", 60)
        known = {path for path in data.rglob("*") if path.is_file()}
        with forebay.Checkpointer(client, "run", model=net(3)) as checkpointer:
            checkpointer.restore(only="model.0.bias")
            checkpointer.save(2).wait("local", 60)
        flip_a_bit(data, known)
        daemon.restart()
        with (
            forebay.Checkpointer(client, "run", model=net(3)) as checkpointer,
            pytest.raises(forebay.InvalidRequest, match="holds a part of it"),
        ):
            checkpointer.restore()


def test_nothing_undamaged_left_is_an_error_that_names_it(data: Path) -> None:
    with DaemonProcess(data, *RAW) as daemon, forebay.connect(data) as client:
        checkpointer = forebay.Checkpointer(client, "run", weights=Weights(1))
        checkpointer.save(1).wait("remote", 60)
        flip_a_bit(data, set())
        daemon.restart()
        with pytest.raises(forebay.IntegrityError, match=r"no generation could be verified.*1/1"):
            checkpointer.restore()
        checkpointer.close()


def test_what_was_saved_last_is_restored_from_memory(data: Path) -> None:
    """Also when it is committed: its files are not read as long as the slots lie warm."""
    with DaemonProcess(data, *RAW), forebay.connect(data) as client:
        weights = Weights(1)
        checkpointer = forebay.Checkpointer(client, "run", weights=weights)
        checkpointer.save(1).wait("remote", 60)
        flip_a_bit(data, set())
        saved, weights.tensor = weights.tensor, torch.zeros(1)
        resumed = checkpointer.restore()
        assert resumed is not None
        assert (resumed.step, resumed.skipped) == (1, ())
        assert torch.equal(weights.tensor, saved)
        for step in range(2, 5):  # both slots are used again: nothing stale is read
            weights.tensor = Weights(step).tensor
            checkpointer.save(step).wait("local", 60)
            weights.tensor = torch.zeros(1)
            resumed = checkpointer.restore()
            assert resumed is not None
            assert resumed.step == step
            assert torch.equal(weights.tensor, Weights(step).tensor)
        checkpointer.close()


def test_a_sealed_generation_survives_a_restart_of_the_daemon(data: Path) -> None:
    daemon = DaemonProcess(data, environment={"FOREBAY_FAILPOINTS": "upload.before_publish:2"})
    with daemon, forebay.connect(daemon.address()["rpc"]) as client:
        weights = Weights(1)
        checkpointer = forebay.Checkpointer(client, "run", weights=weights)
        checkpointer.save(1).wait("local", 60)
        weights.tensor = Weights(2).tensor
        saved = checkpointer.save(2)  # the daemon dies while it lands this
        weights.tensor.zero_()
        assert daemon.wait_exit() == -9
        daemon.environment.clear()
        daemon.start().wait_ready()
        saved.wait("local", 90)
        found = Weights(3)
        restorer = forebay.Checkpointer(client, "run", weights=found)
        resumed = restorer.restore()
        assert resumed is not None
        assert resumed.step == 2
        assert torch.equal(found.tensor, Weights(2).tensor)
        restorer.close()
        checkpointer.close()


@pytest.mark.parametrize("place", ["pack.before_seal", "pack.after_seal"])
def test_a_restart_in_the_middle_of_a_save_does_not_fail_it(tmp_path: Path, place: str) -> None:
    daemon = DaemonProcess(tmp_path / "data", environment={"FOREBAY_FAILPOINTS": f"{place}:2"})

    def restart() -> None:
        daemon.wait_exit()
        daemon.environment.clear()
        daemon.start().wait_ready()

    with (
        daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        ThreadPoolExecutor(1) as executor,
    ):
        executor.submit(restart)
        weights = Weights(1)
        checkpointer = forebay.Checkpointer(client, "run", weights=weights)
        checkpointer.save(1).wait("local", 60)
        weights.tensor = Weights(2).tensor
        saved = checkpointer.save(2)
        weights.tensor = Weights(3).tensor
        saved.wait("local", 60)
        resumed = checkpointer.restore()
        assert resumed is not None
        assert (resumed.attempt, resumed.step) == (1, 2)
        assert torch.equal(weights.tensor, Weights(2).tensor)
        checkpointer.close()


def test_too_little_memory_makes_a_chunked_save(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DaemonProcess(data, "--ram-bytes", "16MiB"), forebay.connect(data) as client:
        weights = Weights(1, 40 << 20)
        checkpointer = forebay.Checkpointer(client, "run", weights=weights)
        for step in (1, 2):
            saved = checkpointer.save(step)
            saved.wait("local", 60)
        assert checkpointer.report().num_chunked == 2
        assert "saving piece by piece" in caplog.text
        expected, weights.tensor = weights.tensor, torch.zeros(1)
        assert checkpointer.restore().step == 2
        assert torch.equal(weights.tensor, expected)
        checkpointer.close()


def test_no_room_is_an_error_and_the_previous_generation_stays(data: Path) -> None:
    limits = ("--ssd-bytes", "16MiB", "--hdd-path", "none")
    with DaemonProcess(data, *limits), forebay.connect(data) as client:
        weights = Weights(1, 4 << 20)
        checkpointer = forebay.Checkpointer(client, "run", weights=weights)
        checkpointer.save(1).wait("local", 60)
        small, weights.tensor = weights.tensor, Weights(2, 32 << 20).tensor
        with pytest.raises(forebay.ResourceExhausted):
            checkpointer.save(2)
        assert checkpointer.restore().step == 1
        assert torch.equal(weights.tensor, small)
        checkpointer.close()
