"""What all ranks have sealed is restored out of the daemon's memory while it lands."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import forebay
from forebay.checkpoint import StorageReader
from forebay.checkpoint.service import CheckpointService, PackTerms
from forebay.checkpoint.snapshot import Part, build_pack
from forebay.checkpoint.upload import PackUpload
from forebay.transfer.connection import DescriptorConnection
from forebay.waiting import Deadline
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.stall import Stall
from forebay_wire.ids import GenerationId
from forebay_wire.limits import MAX_BLOBS_PER_OPEN, MAX_DESCRIPTORS_PER_MESSAGE
from forebay_wire.manifest import GenerationManifest

SECONDS = 60.0


class Weights:
    """A stateful with one tensor, whose pack has several segments."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tensor = self.of(seed)

    @staticmethod
    def of(seed: int) -> torch.Tensor:
        return torch.randn(3_000_000, generator=torch.Generator().manual_seed(seed))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"tensor": self.tensor}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.tensor = state["tensor"]


@pytest.fixture
def stall(tmp_path: Path) -> Iterator[Stall]:
    """Holds up every landing, when the test begins it."""
    with Stall(tmp_path / "stall", "upload.before_publish") as made:
        yield made


@pytest.fixture
def daemon(tmp_path: Path, stall: Stall) -> Iterator[DaemonProcess]:  # overrides the shared one
    process = DaemonProcess(tmp_path / "data", environment=stall.environment)
    try:
        with process:
            yield process
            stall.end()  # else its drain would wait for what lands
    finally:
        stall.end()


Make = Callable[[Weights], forebay.Checkpointer]


@pytest.fixture
def make(client: forebay.Client) -> Iterator[Make]:
    """Makes Checkpointers of one run, closed at the end."""
    made: list[forebay.Checkpointer] = []

    def one(weights: Weights) -> forebay.Checkpointer:
        made.append(forebay.Checkpointer(client, "run", weights=weights, timeout=SECONDS))
        return made[-1]

    yield one
    for checkpointer in made:
        checkpointer.close()


def save_two(make: Make, stall: Stall) -> tuple[forebay.Checkpointer, forebay.checkpoint.Saved]:
    """Step 1 is local, step 2 is sealed and cannot land."""
    weights = Weights(1)
    checkpointer = make(weights)
    checkpointer.save(1).wait("local")
    stall.begin()
    weights.tensor = Weights.of(2)
    return checkpointer, checkpointer.save(2)


def test_a_sealed_generation_is_restored_while_its_landing_stalls(
    make: Make, stall: Stall, client: forebay.Client
) -> None:
    _, saved = save_two(make, stall)
    found = Weights(3)
    restorer = make(found)
    resumed = restorer.restore(durability="ram")
    assert resumed is not None
    assert (resumed.attempt, resumed.step, resumed.skipped) == (1, 2, ())
    assert torch.equal(found.tensor, Weights.of(2))
    assert restorer.attempt == 2
    assert {one.step: one.state for one in client.checkpoints("run")}[2] == "sealed"
    assert not saved.reached("local")

    # What it is restored from lands all the same, and the new attempt stands on it.
    found.tensor = Weights.of(4)
    later = restorer.save(5)
    stall.end()
    saved.wait("local")
    later.wait("local")
    again = Weights(3)
    resumed = make(again).restore()
    assert resumed is not None
    assert (resumed.attempt, resumed.step) == (2, 5)
    assert torch.equal(again.tensor, Weights.of(4))
    assert make(again).restore(2) is not None
    assert torch.equal(again.tensor, Weights.of(2))


def test_the_same_process_goes_on_from_memory_again_and_again(make: Make, stall: Stall) -> None:
    stall.begin()
    weights = Weights(1)
    checkpointer = make(weights)
    for step in (1, 2, 3):
        weights.tensor = Weights.of(step)
        checkpointer.save(step)
        weights.tensor = torch.zeros(1)
        resumed = checkpointer.restore(durability="ram")
        assert resumed is not None
        assert (resumed.attempt, resumed.step) == (step, step)
        assert torch.equal(weights.tensor, Weights.of(step))


def test_without_ram_the_landing_is_waited_for(
    make: Make, stall: Stall, client: forebay.Client
) -> None:
    save_two(make, stall)
    with forebay.Checkpointer(client, "run", weights=Weights(3), timeout=0.3) as restorer:
        for selector in ("latest", 2):
            with pytest.raises(forebay.DeadlineExceeded, match="still landing"):
                restorer.restore(selector)


def test_after_a_restart_it_is_gone(make: Make, stall: Stall, daemon: DaemonProcess) -> None:
    saver, _ = save_two(make, stall)
    saver.close()  # a living trainer would offer its pack to the new daemon again
    daemon.kill()
    stall.end()
    daemon.start().wait_ready()
    found = Weights(3)
    resumed = make(found).restore(durability="ram")
    assert resumed is not None
    assert (resumed.step, resumed.skipped) == (1, ())
    assert torch.equal(found.tensor, Weights.of(1))
    with pytest.raises(forebay.NotFound):
        make(found).restore("1/2", durability="ram")


def test_bytes_that_a_trainer_changed_after_its_seal_are_never_restored(
    make: Make, stall: Stall, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FOREBAY_NO_LOCAL", raising=False)  # only shared memory can be changed
    _, saved = save_two(make, stall)
    real = CheckpointService.manifest

    def manifest(
        service: CheckpointService, manifest: str, generation: GenerationId
    ) -> GenerationManifest:
        slot = saved._upload._slot
        if generation.step == 2 and slot is not None:
            slot.buffer[1_000_000] ^= 1
        return real(service, manifest, generation)

    monkeypatch.setattr(CheckpointService, "manifest", manifest)
    found = Weights(3)
    resumed = make(found).restore(durability="ram")
    assert resumed is not None
    assert [one.step for one in resumed.skipped] == [2]
    assert resumed.step == 1
    assert torch.equal(found.tensor, Weights.of(1))


def test_a_landing_that_fails_before_it_is_read_makes_latest_fall_back(
    make: Make, stall: Stall, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, saved = save_two(make, stall)
    real = CheckpointService.manifest

    def manifest(
        service: CheckpointService, manifest: str, generation: GenerationId
    ) -> GenerationManifest:
        if generation.step == 2:
            fail_landing(daemon, stall, saved)
        return real(service, manifest, generation)

    monkeypatch.setattr(CheckpointService, "manifest", manifest)
    found = Weights(3)
    resumed = make(found).restore(durability="ram")
    assert resumed is not None
    assert [one.step for one in resumed.skipped] == [2]
    assert resumed.step == 1
    assert torch.equal(found.tensor, Weights.of(1))
    with pytest.raises(forebay.StorageError, match="failed"):
        saver.close()


def fail_landing(daemon: DaemonProcess, stall: Stall, saved: forebay.checkpoint.Saved) -> None:
    """Let what stalls land where no file can be made; then the tiers are as before."""
    folders = [path for path in daemon.data.rglob("files") if path.is_dir()]
    for files in folders:
        files.rename(files.with_name("away"))
        files.write_bytes(b"no folder")
    stall.end()
    with pytest.raises(forebay.StorageError, match="failed"):
        saved.wait("local")
    for files in folders:
        files.unlink()
        files.with_name("away").rename(files)


def sealed_packs(client: forebay.Client, stall: Stall, num_ranks: int) -> list[str]:
    """The blobs of a generation in memory: that of rank r holds ten times the number r."""
    service = CheckpointService(client, "run")
    generation = GenerationId("run", service.begin_attempt(None, num_ranks), 1)
    stall.begin()
    uploads = []
    for rank in range(num_ranks):
        pack = build_pack([Part(f"t{rank}", (10,), (0,), torch.full((10,), float(rank)))], {}, {})
        uploads.append(PackUpload(service, PackTerms(generation, rank, num_ranks), pack))
        uploads[-1].copy(Deadline(SECONDS))
        uploads[-1].seal()
        uploads[-1].close()
    found = service.resolve("latest", "ram", (), SECONDS)
    assert (found.step, found.state, found.durability) == (1, "sealed", "ram")
    return [pack.blob for pack in service.manifest(found.manifest, generation).packs]


def test_the_packs_of_many_ranks_are_opened_by_one(stall: Stall, client: forebay.Client) -> None:
    for rank, blob in enumerate(client.transfer.open(sealed_packs(client, stall, 70))):
        with blob:
            assert blob.tier == "ram"
            assert torch.frombuffer(bytearray(blob.map()), dtype=torch.float32)[0] == rank


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_loads_from_memory_too(make: Make, stall: Stall, client: forebay.Client) -> None:
    save_two(make, stall)
    state = {"weights": {"tensor": torch.zeros_like(Weights.of(1))}}
    reader = StorageReader(client, "run", durability="ram", timeout=SECONDS)
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state["weights"]["tensor"], Weights.of(2))


def test_what_an_answer_has_no_room_for_is_to_be_asked_for_again(
    stall: Stall, client: forebay.Client, daemon: DaemonProcess
) -> None:
    blobs = sealed_packs(client, stall, MAX_BLOBS_PER_OPEN + 1)
    connection, _ = DescriptorConnection.connect(daemon.address()["descriptor_socket"])
    with contextlib.closing(connection):
        for _ in range(2):
            answer, descriptors = connection.request({"op": "open", "blobs": blobs}, SECONDS)
            assert answer["blobs"][-1] == {"blob": blobs[-1], "again": True}
            assert len(descriptors) == MAX_DESCRIPTORS_PER_MESSAGE
            for descriptor in descriptors:
                os.close(descriptor)
