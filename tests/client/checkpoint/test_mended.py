"""Damage that many generations share, mended from what another run has, through a real daemon."""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import forebay
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.integrity import flip
from forebay_wire.errors import IntegrityError

SECONDS = 60.0
NUM_STEPS = 8
NUM_NUMBERS = 500_000


class Adapted(torch.nn.Module):
    """A frozen base with a small adapter."""

    def __init__(self, base: torch.Tensor) -> None:
        super().__init__()
        self.base = torch.nn.Parameter(base.clone(), requires_grad=False)
        self.adapter = torch.nn.Parameter(torch.randn(1000))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One with a single tier: what another file has is all the help that there is."""
    alone = ("--hdd-path", "none", "--object-url", "none")
    with DaemonProcess(tmp_path_factory.mktemp("mended") / "data", *alone) as process:
        yield process


def save(daemon: DaemonProcess, run: str, base: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """What the adapter was at each of *steps*, saved in *run*."""
    model = Adapted(base)
    adapters = []
    with (
        forebay.connect(daemon.address()["rpc"]) as client,
        forebay.Checkpointer(client, run=run, model=model) as saving,
    ):
        for step in range(1, steps + 1):
            with torch.no_grad():
                model.adapter.add_(1.0)
            adapters.append(model.adapter.detach().clone())
            saving.save(step).wait("local", SECONDS)
    return adapters


def large_files(daemon: DaemonProcess) -> set[Path]:
    """Those with a base."""
    paths = (daemon.data / "ssd" / "files").rglob("*")
    return {one for one in paths if one.is_file() and one.stat().st_size > 4 * NUM_NUMBERS}


def written_bytes(daemon: DaemonProcess) -> float:
    """Into the tier, since the daemon's start."""
    with urllib.request.urlopen(f"{daemon.address()['http_url']}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    name = 'forebay_tier_moved_bytes_total{operation="write",tier="ssd"}'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_eight_generations_of_a_damaged_base_are_restored_and_it_is_written_once(
    daemon: DaemonProcess,
) -> None:
    base = torch.randn(NUM_NUMBERS)
    save(daemon, "helper", base, 1)
    before = large_files(daemon)
    adapters = save(daemon, "hurt", base, NUM_STEPS)
    (file,) = large_files(daemon) - before
    for offset in (100_000, 4 * NUM_NUMBERS - 100_000):
        flip(file, offset)
    daemon.restart()  # what was saved last could be read from memory
    with forebay.connect(daemon.address()["rpc"]) as client:
        for step, adapter in enumerate(adapters, 1):
            model = Adapted(torch.zeros(NUM_NUMBERS))
            with forebay.Checkpointer(client, run="hurt", model=model) as restoring:
                found = restoring.restore(f"1/{step}")
                assert found is not None
                assert not found.skipped
            assert torch.equal(model.base, base)
            assert torch.equal(model.adapter, adapter)
        assert not file.exists()
        (new,) = large_files(daemon) - before
        assert new.stat().st_size <= written_bytes(daemon) < 1.1 * new.stat().st_size
        assert client.scrub().num_damaged == 0
        assert not client.fsck().found


def test_a_segment_that_is_damaged_in_all_copies_stays_and_the_error_names_it(
    daemon: DaemonProcess,
) -> None:
    base = torch.randn(NUM_NUMBERS)
    before = large_files(daemon)
    for run in ("first", "second"):
        save(daemon, run, base, 1)
    files = large_files(daemon) - before
    assert len(files) == 2
    for file in files:
        flip(file, 100_000)
    daemon.restart()
    with forebay.connect(daemon.address()["rpc"]) as client:
        with (
            forebay.Checkpointer(client, run="first", model=Adapted(base)) as restoring,
            pytest.raises(IntegrityError) as caught,
        ):
            restoring.restore("1/1")
        blob = hurt_blob(str(caught.value), files)
        for words in ("tier ssd", "segments 0 are bad", "give a lost tier", f"forebay why {blob}"):
            assert words in str(caught.value)
        assert all(file.exists() for file in files)
        kinds = {one.kind for one in client.fsck().found}
        assert kinds == {"quarantined", "lost blob"}


def hurt_blob(error: str, files: set[Path]) -> str:
    """The blob that *error* names with its file, which is one of *files*."""
    found = re.search(r"blob (\w{64}) has no good copy left: in tier ssd, file (\w{32})", error)
    assert found is not None, error
    assert found[2] in {file.name for file in files}
    return found[1]
