"""Saves that begin while earlier ones are on their way to disk: two slots, and never a mix-up."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import forebay
from forebay.checkpoint.snapshot import Pack
from forebay.transfer import local
from forebay_server.testing.daemon import DaemonProcess

SECONDS = 60.0


class Landing:
    """A daemon whose landings are held up as long as the FIFO is open for writing."""

    def __init__(self, folder: Path) -> None:
        self._fifo = folder / "hold"
        hold = {"FOREBAY_FAILPOINTS": f"upload.before_publish@{self._fifo}"}
        self.daemon = DaemonProcess(folder / "data", environment=hold)
        self._descriptor = -1

    def hold(self) -> None:
        os.mkfifo(self._fifo)
        self._descriptor = os.open(self._fifo, os.O_RDWR)

    def go_on(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            self._fifo.unlink()
            os.close(self._descriptor)
            self._descriptor = -1


@pytest.fixture(scope="module")
def held_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Landing]:
    found = Landing(tmp_path_factory.mktemp("landing"))
    with found.daemon:
        yield found


@pytest.fixture
def landing(held_daemon: Landing) -> Iterator[Landing]:
    held_daemon.hold()
    yield held_daemon
    held_daemon.go_on()


@pytest.fixture(scope="module")
def small_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon that has room for little."""
    limits = ("--ssd-bytes", "16MiB", "--hdd-path", "none")
    with DaemonProcess(tmp_path_factory.mktemp("small") / "data", *limits) as daemon:
        yield daemon


def new(
    client: forebay.Client, model: torch.nn.Module, run: str, **rules: Any
) -> forebay.Checkpointer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return forebay.Checkpointer(
        client, run, model=model, optimizer=optimizer, timeout=SECONDS, **rules
    )


@pytest.mark.parametrize("verb", ["save", pytest.param("save_overlapped", marks=pytest.mark.slow)])
def test_saves_in_flight_keep_their_own_values_and_a_third_waits(
    landing: Landing, run: str, verb: str
) -> None:
    model = torch.nn.Linear(600, 600)
    with forebay.connect(landing.daemon.address()["rpc"]) as client:
        checkpointer = new(client, model, run)
        saved = []

        def save(step: int) -> None:
            with torch.no_grad():
                model.weight.fill_(step)
            saved.append(getattr(checkpointer, verb)(step))
            checkpointer.settle_snapshot()

        for step in (1, 2):
            save(step)
            assert not saved[-1].reached("local")
        third = threading.Thread(target=save, args=(3,))
        third.start()
        third.join(1.0)
        assert third.is_alive(), "it waits for a slot"
        landing.go_on()
        third.join(SECONDS)
        assert not third.is_alive()
        for one in saved:
            one.wait("local", SECONDS)
        for step in (1, 2, 3):
            assert checkpointer.restore(f"1/{step}") is not None
            assert bool((model.weight == step).all())
        checkpointer.close()


def test_a_third_save_is_skipped_if_asked_for_and_later_ones_are_not(
    landing: Landing, run: str
) -> None:
    model = torch.nn.Linear(600, 600)
    with forebay.connect(landing.daemon.address()["rpc"]) as client:
        checkpointer = new(client, model, run, when_busy="skip")
        saved = [checkpointer.save(step) for step in (1, 2)]
        for step, verb in enumerate((checkpointer.save, checkpointer.save_overlapped), 3):
            skipped = verb(step)
            assert skipped.skipped
            assert not skipped
            assert not skipped.reached("ram")
            with pytest.raises(forebay.InvalidRequest, match="was skipped"):
                skipped.wait()
        assert all(saved)
        landing.go_on()
        for one in saved:
            one.wait("local", SECONDS)
        checkpointer.save(3).wait("local", SECONDS)
        assert [one.step for one in client.checkpoints(run)] == [3, 2, 1]
        report = checkpointer.report()
        assert (report.num_saves, report.num_skipped) == (3, 2)
        checkpointer.close()


@pytest.mark.slow
def test_a_third_save_that_waits_too_long_is_a_clear_error(landing: Landing, run: str) -> None:
    model = torch.nn.Linear(600, 600)
    with forebay.connect(landing.daemon.address()["rpc"]) as client:
        checkpointer = new(client, model, run)
        checkpointer.timeout = 6.0
        saved = [checkpointer.save(step) for step in (1, 2)]
        with pytest.raises(forebay.ResourceExhausted, match="2 earlier saves were still on their"):
            checkpointer.save(3)
        landing.go_on()
        for one in saved:
            one.wait("local", SECONDS)
        checkpointer.save(3).wait("local", SECONDS)
        checkpointer.close()


def test_slots_stay_mapped_between_saves(daemon: DaemonProcess, run: str, monkeypatch: Any) -> None:
    mapped: list[int] = []
    real = local._SlotMemory

    def counted(descriptor: int, capacity: int) -> Any:
        mapped.append(capacity)
        return real(descriptor, capacity)

    monkeypatch.setattr(local, "_SlotMemory", counted)
    model = torch.nn.Linear(600, 600)
    with forebay.connect(daemon.address()["rpc"]) as client:
        checkpointer = new(client, model, run)
        for step in range(8):
            saved = checkpointer.save(step)
            if step % 3 == 2:
                saved.wait("local", SECONDS)
        assert 1 <= len(mapped) <= 2, mapped
        checkpointer.close()


@pytest.mark.parametrize("verb", ["save", "save_overlapped"])
def test_no_room_is_found_out_before_anything_is_copied(
    small_daemon: DaemonProcess, run: str, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    small, large = torch.nn.Linear(600, 600), torch.nn.Linear(3000, 3000)
    before = small.weight.detach().clone()
    copies: list[object] = []
    with (
        forebay.connect(small_daemon.address()["rpc"]) as client,
        new(client, small, run) as first,
        new(client, large, f"{run}-large") as second,
    ):
        first.save(1).wait("local", SECONDS)
        monkeypatch.setattr(Pack, "copy_some", lambda *what: copies.append(what))
        with pytest.raises(forebay.ResourceExhausted, match="room"):
            getattr(second, verb)(2)
        assert copies == []
        with torch.no_grad():
            small.weight.zero_()
        assert first.restore() is not None
        assert torch.equal(small.weight, before)
