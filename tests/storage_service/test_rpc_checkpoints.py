"""The Checkpoints service of a real daemon, as any gRPC client sees it."""

import json
import os
import urllib.parse
import urllib.request

import pytest

from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.rpc import RpcClient
from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    Fenced,
    InvalidRequest,
    NotFound,
)
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB
from forebay_wire.v1 import checkpoints_pb2 as pb


class Trainer:
    """Saves one-rank generations of the run ``r`` over HTTP."""

    def __init__(self, daemon: DaemonProcess, client: RpcClient) -> None:
        self.client = client
        self.stub = client.checkpoints
        self.http_url = daemon.address()["http_url"]

    def begin(self, **parent: int) -> pb.Attempt:
        request = pb.BeginAttemptRequest(
            run="r", num_ranks=1, request=new_random_name(), has_parent=bool(parent), **parent
        )
        return self.client.call(self.stub.BeginAttempt, request)

    def save(self, attempt: int, step: int, data: bytes) -> pb.SealPackResponse:
        plan = pb.BeginPackRequest(
            run="r",
            attempt=attempt,
            step=step,
            num_ranks=1,
            total_bytes=len(data),
            slot_bytes=len(data) + KIB,
        )
        granted = self.client.call(self.stub.BeginPack, plan)
        description = b'{"tensors": []}'
        query = urllib.parse.urlencode({"ticket": granted.put_ticket, "offset": 0})
        put = urllib.request.Request(
            f"{self.http_url}/v1/uploads/{granted.session}?{query}",
            data=data + description,
            method="PUT",
        )
        urllib.request.urlopen(put, timeout=30).close()
        seal = pb.SealPackRequest(
            session=granted.session,
            num_bytes=len(data),
            cuts=[len(data)],
            description_bytes=len(description),
            metrics_json='{"loss": 0.25}',
        )
        return self.client.call(self.stub.SealPack, seal)

    def wait(self, attempt: int, step: int, durability: str, seconds: float = 30) -> pb.Generation:
        request = pb.WaitGenerationRequest(
            run="r", attempt=attempt, step=step, durability=durability, timeout_seconds=seconds
        )
        return self.client.call(self.stub.WaitGeneration, request)

    def resolve(self, selector: str, *skip: str) -> pb.Generation:
        request = pb.ResolveGenerationRequest(
            run="r", selector=selector, skip=skip, timeout_seconds=10
        )
        return self.client.call(self.stub.ResolveGeneration, request)

    def delete(self, **which: int | bool) -> int:
        request = pb.DeleteGenerationRequest(run="r", **which)
        return self.client.call(self.stub.DeleteGeneration, request).num_deleted


@pytest.fixture
def trainer(daemon: DaemonProcess, client: RpcClient) -> Trainer:
    return Trainer(daemon, client)


def test_a_run_from_its_first_save_to_its_deletion(trainer: Trainer) -> None:
    assert trainer.begin().attempt == 1
    for step in (1, 2):
        assert trainer.save(1, step, os.urandom(10 * KIB)).all_sealed
    remote = trainer.wait(1, 2, "remote")
    assert (remote.state, remote.durability, remote.num_bytes) == ("committed", "remote", 10 * KIB)
    assert json.loads(remote.metrics_json) == {"loss": 0.25}
    assert remote.manifest
    assert not remote.has_parent
    assert trainer.resolve("latest").step == 2
    assert trainer.resolve("latest", "1/2").step == 1

    second = trainer.begin(parent_attempt=1, parent_step=1)
    assert (second.attempt, second.has_parent, second.parent_step) == (2, True, 1)
    trainer.save(2, 2, b"again")
    assert trainer.wait(2, 2, "local").parent_attempt == 1
    assert trainer.resolve("latest").attempt == 2

    client, stub = trainer.client, trainer.stub
    listed = client.call(stub.ListGenerations, pb.ListGenerationsRequest(run="r"))
    assert [(one.attempt, one.step) for one in listed.generations] == [(2, 2), (1, 2), (1, 1)]
    assert [one.attempt for one in listed.attempts] == [2, 1]
    (run,) = client.call(stub.ListRuns, pb.ListRunsRequest()).runs
    assert (run.run, run.num_attempts, run.num_generations) == ("r", 2, 3)
    assert (run.has_latest, run.latest_attempt, run.latest_step) == (True, 2, 2)

    assert trainer.delete(attempt=1, step=2) == 1
    assert trainer.delete(attempt=1, step=2) == 0
    assert trainer.delete(all=True) == 2
    assert not client.call(stub.ListRuns, pb.ListRunsRequest()).runs


def test_each_refusal_crosses_the_wire_as_itself(trainer: Trainer) -> None:
    with pytest.raises(NotFound, match="there is no run r"):
        trainer.resolve("latest")
    trainer.begin()
    with pytest.raises(NotFound):
        trainer.wait(1, 1, "local")
    trainer.save(1, 1, b"one")
    trainer.wait(1, 1, "local")
    with pytest.raises(AlreadyExists, match="save each step once"):
        trainer.save(1, 1, b"two")
    with pytest.raises(InvalidRequest):
        trainer.wait(1, 1, "everywhere")
    trainer.begin(parent_attempt=1, parent_step=1)
    with pytest.raises(Fenced, match="attempt 2 began after it"):
        trainer.save(1, 2, b"zombie")
    with pytest.raises(Conflict, match="is what attempt 2 restored"):
        trainer.delete(attempt=1, step=1)
    plan = pb.BeginPackRequest(run="r", attempt=2, step=1, num_ranks=1, total_bytes=1, slot_bytes=9)
    trainer.client.call(trainer.stub.BeginPack, plan)
    with pytest.raises(DeadlineExceeded, match="0 of 1 ranks have sealed"):
        trainer.wait(2, 1, "local", seconds=0.1)
