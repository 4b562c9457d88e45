"""torch's own save and load functions over Forebay, on one rank and on several."""

import pickle
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import forebay
from forebay.checkpoint import StorageReader, StorageWriter
from forebay_server.testing.daemon import DaemonProcess

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def load(client: forebay.Client, run: str, like: dict[str, Any]) -> dict[str, Any]:
    dcp.load(like, checkpoint_id=run, storage_reader=StorageReader(client), no_dist=True)
    return like


def save(client: forebay.Client, run: str, state: dict[str, Any], **more: Any) -> None:
    dcp.save(state, checkpoint_id=run, storage_writer=StorageWriter(client), no_dist=True, **more)


def test_saving_to_one_id_again_makes_a_new_generation_and_the_newest_wins(
    client: forebay.Client, run: str
) -> None:
    for value in (1.0, 2.0, 3.0):
        save(client, run, {"w": torch.full((4,), value)})
    assert load(client, run, {"w": torch.zeros(4)})["w"].tolist() == [3.0] * 4
    assert load(client, f"{run}@2/0", {"w": torch.zeros(4)})["w"].tolist() == [2.0] * 4
    found = client.checkpoints(run)
    assert {(one.attempt, one.step) for one in found} == {(1, 0), (2, 0), (3, 0)}


class Casts(DefaultLoadPlanner):
    """Reads as it was saved and casts by itself."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return super().resolve_tensor(read_item).float()

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor)


def test_nothing_is_cast_unless_the_planner_does(client: forebay.Client, run: str) -> None:
    save(client, run, {"w": torch.full((4,), 1.0 + 2.0**-20)})
    target = {"w": torch.zeros(4, dtype=torch.float16)}
    with pytest.raises(CheckpointException, match="w: it is float16 here and was saved as float32"):
        load(client, run, target)
    assert target["w"].tolist() == [0.0] * 4
    reader = StorageReader(client, run)
    dcp.load(target, storage_reader=reader, planner=Casts(), no_dist=True)
    assert target["w"].tolist() == [1.0] * 4


def test_a_checkpoint_id_names_run_and_step_or_is_a_path(
    client: forebay.Client, run: str, tmp_path: Any
) -> None:
    save(client, f"{run}@500", {"w": torch.ones(2)})
    assert client.checkpoints(run)[0].step == 500
    for folder in ("a/step-1", "b/step-1"):
        save(client, str(tmp_path / folder), {"w": torch.full((2,), float(ord(folder[0])))})
    found = load(client, str(tmp_path / "a/step-1"), {"w": torch.zeros(2)})
    assert found["w"].tolist() == [97.0, 97.0]
    with pytest.raises(forebay.InvalidRequest, match="no run is named"):
        StorageWriter(client).set_up_storage_writer(True)


@pytest.mark.parametrize("kind", ["THREAD", "PROCESS"])
def test_async_save_on_two_ranks(daemon: DaemonProcess, pool: Any, run: str, kind: str) -> None:
    pool.run("asynchronous", 2, daemon.address()["rpc"], run=run, kind=kind)


def test_a_fault_on_one_rank_is_one_on_all_and_leaves_what_was_there(
    daemon: DaemonProcess, pool: Any, run: str
) -> None:
    pool.run("faults", 3, daemon.address()["rpc"], run=run)


def test_ranks_that_save_without_collectives_do_not_collide(
    daemon: DaemonProcess, pool: Any, run: str
) -> None:
    pool.run("separate", 3, daemon.address()["rpc"], run=run)
    with forebay.connect(daemon.address()["rpc"]) as client:
        reader = _Rankless(client, run)
        with pytest.raises(CheckpointException, match="metadata is None"):
            dcp.load({"w": torch.zeros(5)}, storage_reader=reader, no_dist=True)
        with pytest.raises(forebay.InvalidRequest, match="holds 3 states, one of each rank"):
            StorageReader(client, run).read_metadata()


class _Rankless(StorageReader):
    def read_metadata(self, *args: Any) -> Metadata:
        return super().read_metadata()


def test_nothing_commits_before_the_results_were_compared(client: forebay.Client, run: str) -> None:
    class Slow(StorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            states.append([one.state for one in client.checkpoints(run)])
            super().finish(metadata, results)

    states: list[list[str]] = []
    state = {"w": torch.ones(4)}
    dcp.save(state, storage_writer=Slow(client, run), no_dist=True)
    assert states == [["open"]]
    assert client.checkpoints(run)[0].state == "committed"


def test_metadata_comes_back_as_it_was(client: forebay.Client, run: str) -> None:
    state = {
        "a": {"b": torch.zeros(3, 2, requires_grad=True), 7: torch.ones(1, dtype=torch.int8)},
        "list": [torch.zeros(2), {"deep": torch.ones(2)}],
        "text": "x",
    }
    metadata = dcp.save(state, storage_writer=StorageWriter(client, run), no_dist=True)
    found = StorageReader(client, run).read_metadata()
    assert isinstance(metadata, Metadata)
    assert found.planner_data == metadata.planner_data
    assert found.state_dict_metadata == metadata.state_dict_metadata


class OwnData(DefaultSavePlanner):
    """Keeps something else than paths for its loader."""

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        data = {("a", 1): frozenset({2}), "n": 2.5}
        return [plan.__class__(plan.items, planner_data=data) for plan in plans], metadata


def test_planner_data_of_any_shape_comes_back(client: forebay.Client, run: str) -> None:
    save(client, run, {"w": torch.ones(2)}, planner=OwnData())
    found = StorageReader(client, run).read_metadata()
    assert found.planner_data == {("a", 1): frozenset({2}), "n": 2.5}


def test_a_writer_is_no_stager_and_travels_as_an_address(client: forebay.Client, run: str) -> None:
    writer = StorageWriter(client, run)
    assert not isinstance(writer, AsyncStager)
    save(client, run, {"w": torch.ones(2)})
    data = pickle.dumps(writer)
    assert len(data) < 2000
    copy = pickle.loads(data)  # noqa: S301 - our own
    dcp.save({"w": torch.full((2,), 5.0)}, storage_writer=copy, no_dist=True)
    reader = pickle.loads(pickle.dumps(StorageReader(client, run)))  # noqa: S301
    found = {"w": torch.zeros(2)}
    dcp.load(found, storage_reader=reader, no_dist=True)
    assert found["w"].tolist() == [5.0, 5.0]
    copy._client.close()
    reader._client.close()


def test_two_saves_to_one_id_at_a_time_never_mix(client: forebay.Client, run: str) -> None:
    writer = StorageWriter(client, run, timeout=60.0)
    outcomes = []
    for value in range(4):
        state = {name: torch.full((1000,), float(value)) for name in ("v", "w")}
        outcomes.append(
            dcp.async_save(
                state,
                storage_writer=writer,
                no_dist=True,
                async_checkpointer_type=AsyncCheckpointerType.THREAD,
            )
        )
    errors = [one.exception() for one in outcomes]  # type: ignore[union-attr]
    assert None in errors
    assert all(error is None or isinstance(error, CheckpointException) for error in errors)
    for generation in client.checkpoints(run):
        if generation.state == "committed":
            name = f"{run}@{generation.attempt}/{generation.step}"
            found = load(client, name, {"v": torch.zeros(1000), "w": torch.zeros(1000)})
            assert found["v"].unique().tolist() == found["w"].unique().tolist()
