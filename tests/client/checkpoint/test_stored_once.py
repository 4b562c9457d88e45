"""What a run saves again is stored once, through a real daemon, and restored as if it were not."""

import uuid
from pathlib import Path

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.errors import IntegrityError

SECONDS = 60.0


class Adapted(torch.nn.Module):
    """A frozen base with a small adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(1500, 1500)
        self.base.requires_grad_(requires_grad=False)
        self.adapter = torch.nn.Linear(1500, 64)


def checkpointer(client: forebay.Client, run: str, model: torch.nn.Module) -> forebay.Checkpointer:
    return forebay.Checkpointer(client, run=run, model=model)


def shared_of(client: forebay.Client, run: str) -> dict[int, tuple[int, int]]:
    """Step to (bytes, those that were not written)."""
    _, found = client.describe_run(run)
    return {one.step: (one.num_bytes, one.shared_bytes) for one in found}


def test_a_frozen_base_is_stored_once_and_restored_by_each_generation(
    client: forebay.Client,
) -> None:
    run = f"lora-{uuid.uuid4().hex}"
    model = Adapted()
    states = {}
    with checkpointer(client, run, model) as saving:
        for step in (1, 2, 3):
            with torch.no_grad():
                model.adapter.weight.add_(1.0)
            states[step] = {name: value.clone() for name, value in model.state_dict().items()}
            saving.save(step).wait("local", SECONDS)
    base_bytes = model.base.weight.nbytes
    shared = shared_of(client, run)
    assert shared[1][1] < base_bytes
    for step in (2, 3):
        num_bytes, not_written = shared[step]
        assert base_bytes <= not_written <= num_bytes - model.adapter.weight.nbytes
    for step in (3, 1, 2):
        other = Adapted()
        with checkpointer(client, run, other) as restoring:
            found = restoring.restore(f"1/{step}")
            assert found is not None
            assert found.step == step
        for name, value in other.state_dict().items():
            assert torch.equal(value, states[step][name]), name


def test_a_fork_stores_its_changes_alone(client: forebay.Client) -> None:
    run = f"base-{uuid.uuid4().hex}"
    model = Adapted()
    with checkpointer(client, run, model) as saving:
        saving.save(1).wait("local", SECONDS)
    with forebay.Checkpointer(client, run=f"{run}-fork", model=model, fork_from=run) as forked:
        assert forked.restore() is not None
        forked.save(2).wait("local", SECONDS)
    num_bytes, not_written = shared_of(client, f"{run}-fork")[2]
    assert num_bytes - not_written < 0.02 * num_bytes


def test_damage_to_what_two_share_is_never_given_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both generations refer to it, and there is no other copy."""
    alone = ("--hdd-path", "none", "--object-url", "none")
    runs = ("by-descriptors", "by-http")
    with DaemonProcess(tmp_path / "data", *alone) as daemon:
        with forebay.connect(daemon.address()["rpc"]) as client:
            for run in runs:
                model = Adapted()
                with checkpointer(client, run, model) as saving:
                    for step in (1, 2):
                        with torch.no_grad():
                            model.adapter.weight.add_(1.0)
                        saving.save(step).wait("local", SECONDS)
        folder = tmp_path / "data" / "ssd" / "files"
        files = [path for path in folder.rglob("*") if path.is_file()]
        for base in sorted(files, key=lambda path: path.stat().st_size)[-len(runs) :]:
            assert base.stat().st_size > model.base.weight.nbytes, "each run has one"
            with base.open("r+b") as file:
                file.seek(100_000)
                file.write(b"damaged")
        daemon.restart()  # what was saved last can be read from memory before
        for run in runs:
            if run == "by-http":
                monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
            with (
                forebay.connect(daemon.address()["rpc"]) as client,
                checkpointer(client, run, Adapted()) as restoring,
                pytest.raises(IntegrityError),
            ):
                restoring.restore()
