"""What others' checkpoints get wrong, one test each: ours holds.

- an error of a rank while data are written is lost, and the checkpoint looks complete:
  ``test_an_exception_while_data_are_written_is_not_lost``
- a save over an existing one that fails leaves files of two steps:
  ``test_a_second_save_that_fails_does_not_mix_two_steps``
- the second save in flight overwrites the first one's staged values:
  ``test_a_second_save_leaves_the_first_one_its_values``
- a cached plan stores a new dtype under the old one:
  ``test_a_plan_that_is_kept_knows_of_a_new_dtype``
- tied weights are stored twice, or come back as two:
  ``test_two_names_of_one_storage_are_stored_once_and_one_again``
- a staging that has failed says that it is complete: ``test_overlapped.py``,
  ``test_what_changes_without_a_wait_fails_the_save_and_the_next_one_works``
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import forebay
import forebay.checkpoint
from forebay.checkpoint import StorageReader, StorageWriter
from forebay_server.testing.daemon import DaemonProcess

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[forebay.Client]:
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected


class FailsAt(DefaultSavePlanner):
    """Has no data for one of its tensors."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == self.name:
            raise OSError("a device went away")
        return super().resolve_data(write_item)


def state(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((300_000,), value) for name in ("w1", "w2")}


def loaded(client: forebay.Client, run: str) -> dict[str, list[float]]:
    found = {name: torch.zeros(300_000) for name in ("w1", "w2")}
    dcp.load(found, storage_reader=StorageReader(client, run), no_dist=True)
    return {name: tensor.unique().tolist() for name, tensor in found.items()}


def test_an_exception_while_data_are_written_is_not_lost(client: forebay.Client) -> None:
    saving = dcp.async_save(
        state(1.0),
        storage_writer=StorageWriter(client, "lost-exception"),
        planner=FailsAt("w2"),
        no_dist=True,
    )
    with pytest.raises(CheckpointException, match="a device went away"):
        saving.result()  # type: ignore[union-attr]
    assert all(one.state != "committed" for one in client.checkpoints("lost-exception"))


def test_a_second_save_that_fails_does_not_mix_two_steps(client: forebay.Client) -> None:
    dcp.save(state(1.0), storage_writer=StorageWriter(client, "mixed"), no_dist=True)
    for name in ("w1", "w2"):
        writer, planner = StorageWriter(client, "mixed"), FailsAt(name)
        with pytest.raises(CheckpointException):
            dcp.save(state(2.0), storage_writer=writer, planner=planner, no_dist=True)
        assert loaded(client, "mixed") == {"w1": [1.0], "w2": [1.0]}


def test_a_second_save_leaves_the_first_one_its_values(client: forebay.Client) -> None:
    tensor = torch.zeros(2_000_000)
    checkpointer = forebay.Checkpointer(client, "one-buffer")
    saved = []
    for step in (1, 2, 3):
        tensor.fill_(float(step))
        saved.append(checkpointer.save(step, state={"w": tensor}))  # nobody waits for the last
        tensor.fill_(-1.0)
    for one in saved:
        one.wait("local", 60)
    for step in (1, 2, 3):
        with forebay.checkpoint.open(client, "one-buffer", f"1/{step}") as opened:
            assert opened["state.w"].read().unique().tolist() == [float(step)]
    checkpointer.close()


def test_a_plan_that_is_kept_knows_of_a_new_dtype(
    client: forebay.Client, daemon: DaemonProcess, pool: Any
) -> None:
    checkpointer = forebay.Checkpointer(client, "kept-plan")
    for step, dtype in enumerate((torch.float32, torch.float32, torch.bfloat16, torch.int32)):
        expected = torch.arange(100).to(dtype) + step
        checkpointer.save(step, state={"w": expected}).wait("local", 60)
        with forebay.checkpoint.open(client, "kept-plan", step) as opened:
            assert opened["state.w"].dtype is dtype
            assert torch.equal(opened["state.w"].read(), expected)
    checkpointer.close()
    pool.run("cached_plans", 2, daemon.address()["rpc"], run="kept-by-torch")


def test_two_names_of_one_storage_are_stored_once_and_one_again(client: forebay.Client) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(1000, 300)
            self.out = torch.nn.Linear(300, 1000, bias=False)
            self.out.weight = self.embed.weight

    model = Tied()
    for run, save in (("tied", _by_us), ("tied-by-torch", _by_torch)):
        save(client, run, model)
        with forebay.checkpoint.open(client, run) as opened:
            found = opened.state_dict("model")
            total = sum(pack.num_bytes for pack in opened.manifest.packs)
        assert found["embed.weight"] is found["out.weight"]
        assert torch.equal(found["out.weight"], model.out.weight)
        assert total < 1.1 * model.out.weight.nbytes


def _by_us(client: forebay.Client, run: str, model: torch.nn.Module) -> None:
    with forebay.Checkpointer(client, run, model=model) as checkpointer:
        checkpointer.save(1).wait("local", 60)


def _by_torch(client: forebay.Client, run: str, model: torch.nn.Module) -> None:
    state = {"model": model.state_dict()}
    dcp.save(state, storage_writer=StorageWriter(client, run), no_dist=True)
