"""The slot of the next save is there before it is needed, and what comes of it otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import forebay
from forebay import Checkpointer
from forebay.checkpoint.ahead import estimate
from forebay.checkpoint.components import components
from forebay.client import Client
from forebay.methods import Blobs, Checkpoints
from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.v1 import blobs_pb2
from forebay_wire.v1 import checkpoints_pb2 as pb

MIB = 1 << 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder: Path = tmp_path_factory.mktemp("ahead")
    with DaemonProcess(folder / "data", "--object-url", "none") as running:
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Client]:
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def ask(client: Client, run: str, attempt: int, num_bytes: int = MIB) -> pb.PackSession:
    request = pb.PreparePackRequest(
        run=run, attempt=attempt, rank=0, total_bytes=num_bytes, slot_bytes=num_bytes
    )
    return client.channel.call(Checkpoints.PreparePack, request)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    return "".join(c if c.isalnum() else "-" for c in request.node.name)


def state(num_bytes: int = MIB, fill: float = 0.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((num_bytes // 4,), float(fill))}


def sessions(client: Client) -> int:
    """Upload sessions that are open."""
    return int(client.status().num_uploads)


def test_a_session_asked_for_ahead_is_the_next_packs_own(client: Client, run: str) -> None:
    with Checkpointer(client, run) as checkpointer:
        checkpointer.save(1, state=state()).wait()
    granted = ask(client, run, 1)
    assert granted.session
    assert granted.session == ask(client, run, 1).session  # one at a time
    request = pb.BeginPackRequest(
        run=run, attempt=1, step=2, rank=0, num_ranks=1, total_bytes=99, slot_bytes=199
    )
    begun = client.channel.call(Checkpoints.BeginPack, request)
    assert begun.session == granted.session
    client.channel.call(Blobs.Abort, blobs_pb2.AbortRequest(session=begun.session))
    other = ask(client, run, 1)
    assert other.session != granted.session
    client.channel.call(Blobs.Abort, blobs_pb2.AbortRequest(session=other.session))
    assert client.channel.call(Checkpoints.BeginPack, request).session != other.session
    with Checkpointer(client, run) as checkpointer:
        checkpointer.start()  # ends what is open
        until(lambda: sessions(client) == 0, "it is ended")


def saved_ahead(
    client: Client, checkpointer: Checkpointer, step: int, **values: torch.Tensor
) -> int:
    """Save *values* once a session is there ahead, whoever asked first; how many saves had one."""
    run, attempt = checkpointer.run, checkpointer.attempt
    until(lambda: bool(ask(client, run, attempt, 2 * MIB).session), "there is a session ahead")
    checkpointer.save(step, state=values).wait()
    return checkpointer.report().num_ahead


def test_each_save_but_the_first_has_its_memory_ahead(client: Client, run: str) -> None:
    with Checkpointer(client, run) as checkpointer:
        checkpointer.save(1, state=state()).wait()
        assert checkpointer.report().num_ahead == 0
        for step in range(2, 5):
            assert saved_ahead(client, checkpointer, step, **state(fill=step)) == step - 1
        restored = checkpointer.restore(3)
        assert restored is not None
        assert torch.equal(restored.state["w"], state(fill=3)["w"])
    until(lambda: sessions(client) == 0, "it is given back at the end")


def test_the_first_save_after_a_start_has_it_too(client: Client, run: str) -> None:
    model = torch.nn.Linear(700, 700)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(client, run, model=model, optimizer=optimizer) as checkpointer:
        checkpointer.start()
        until(lambda: sessions(client) == 1, "a session is asked for ahead")
        model(torch.ones(1, 700)).sum().backward()
        optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]
        checkpointer.save(1).wait()
        assert checkpointer.report().num_ahead == 1
        optimizer.step()
        checkpointer.restore()
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_a_first_pack_is_estimated_well(client: Client, run: str, make: type) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.BatchNorm1d(512))
    optimizer = make(model.parameters())
    fresh = estimate(components({"model": model, "optimizer": optimizer}), 1)
    shared = estimate(components({"model": model, "optimizer": optimizer}), 4)
    model(torch.randn(8, 512)).sum().backward()
    optimizer.step()
    stepped = estimate(components({"model": model, "optimizer": optimizer}), 1)
    with Checkpointer(client, run, model=model, optimizer=optimizer) as checkpointer:
        num_bytes = checkpointer.save(1).num_bytes
    for guess in fresh, stepped:
        assert num_bytes <= guess <= num_bytes + 96 * 1024
    assert num_bytes // 4 <= shared <= num_bytes // 4 + 96 * 1024


def test_a_larger_pack_gets_another_session(client: Client, run: str) -> None:
    with Checkpointer(client, run) as checkpointer:
        checkpointer.save(1, state=state()).wait()
        assert saved_ahead(client, checkpointer, 2, **state(5 * MIB, 2.0)) == 0
        until(lambda: sessions(client) == 1, "the next one is asked for, and the small one is gone")
        restored = checkpointer.restore(2)
        assert restored is not None
        assert torch.equal(restored.state["w"], state(5 * MIB, 2.0)["w"])


def test_what_was_copied_before_a_refusal_is_nowhere(client: Client, run: str) -> None:
    with Checkpointer(client, run) as checkpointer:
        checkpointer.save(1, state=state(fill=1)).wait()
        until(lambda: sessions(client) == 1, "a session is asked for ahead")
        with pytest.raises(forebay.AlreadyExists, match="step 1"):
            checkpointer.save(1, state=state(fill=7))
        assert [found.step for found in client.run(run).generations()] == [1]
        assert saved_ahead(client, checkpointer, 2, **state(fill=2)) == 1
        for step in 1, 2:
            restored = checkpointer.restore(f"1/{step}")
            assert restored is not None
            assert torch.equal(restored.state["w"], state(fill=step)["w"])


def test_another_structure_is_planned_anew(client: Client, run: str) -> None:
    with Checkpointer(client, run) as checkpointer:
        checkpointer.save(1, state=state()).wait()
        checkpointer.save(2, state=state()).wait()
        other = {"a": torch.arange(9.0), "w": state(fill=3)["w"]}
        until(lambda: sessions(client) == 1, "a session is asked for ahead")
        checkpointer.save(3, state=other).wait()
        restored = checkpointer.restore(3)
        assert restored is not None
        assert {name: value.tolist() for name, value in restored.state.items()} == {
            name: value.tolist() for name, value in other.items()
        }


def test_a_newer_attempt_ends_it(client: Client, run: str) -> None:
    with Checkpointer(client, run) as old, Checkpointer(client, run) as new:
        old.save(1, state=state()).wait()
        until(lambda: sessions(client) == 1, "a session is asked for ahead")
        new.start()
        until(lambda: sessions(client) == 0, "the old attempt's is ended")
        with pytest.raises(forebay.Fenced):
            ask(client, run, 1)
        with pytest.raises(forebay.Fenced):
            old.save(2, state=state())


def test_nothing_is_asked_for_where_there_is_no_room(tmp_path: Path, run: str) -> None:
    limit = ("--ssd-bytes", str(12 * MIB), "--hdd-path", "none", "--object-url", "none")
    with (
        DaemonProcess(tmp_path / "data", *limit) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        Checkpointer(client, run) as checkpointer,
    ):
        for step in 1, 2:
            checkpointer.save(step, state={"w": torch.randn(5 * MIB // 4)}).wait()
        assert not ask(client, run, 1, 6 * MIB).session
        assert [found.step for found in client.run(run).generations()] == [2, 1]


def test_a_deleted_runs_client_reaches_nothing_of_the_new_one(
    daemon: DaemonProcess, client: Client, run: str
) -> None:
    mine, other = state(2 * MIB, 1.0), state(2 * MIB, 9.0)
    with Checkpointer(client, run) as old:
        old.save(1, state=other).wait()
        until(lambda: sessions(client) == 1, "a session is asked for ahead")
        client.delete_checkpoints(run, now=True)
        until(lambda: sessions(client) == 0, "the deleted run's session is ended")
        with forebay.connect(daemon.address()["rpc"]) as second, Checkpointer(second, run) as new:
            new.save(1, state=mine).wait()
            assert new.attempt == 2  # the name 1/1 was used
            new.save(2, state=mine)
            for step in 2, 6:
                with pytest.raises(forebay.Fenced):
                    old.save(step, state=other)
            found = [(one.attempt, one.step) for one in second.run(run).generations()]
            assert sorted(found) == [(2, 1), (2, 2)]
            restored = new.restore("2/2")
            assert restored is not None
            assert torch.equal(restored.state["w"], mine["w"])


def test_what_is_asked_for_ahead_gives_way(tmp_path: Path, run: str) -> None:
    limits = ("--ssd-bytes", str(40 * MIB), "--ram-bytes", str(40 * MIB))
    idle = torch.nn.Linear(1500, 1500, bias=False)
    optimizer = torch.optim.AdamW(idle.parameters())
    with (
        DaemonProcess(
            tmp_path / "data", *limits, "--hdd-path", "none", "--object-url", "none"
        ) as daemon,
        forebay.connect(daemon.address()["rpc"]) as client,
        Checkpointer(client, f"{run}-idle", model=idle, optimizer=optimizer) as first,
        Checkpointer(client, run) as second,
    ):
        first.start()
        until(lambda: sessions(client) == 1, "27 MB are asked for ahead")
        values = {"w": torch.randn(20 * MIB // 4)}
        second.save(1, state=values).wait()
        assert second.report().num_chunked == 0
        restored = second.restore(1)
        assert restored is not None
        assert torch.equal(restored.state["w"], values["w"])


def test_nothing_is_left_behind_a_close(client: Client, run: str) -> None:
    model = torch.nn.Linear(3000, 3000)
    for _ in range(3):
        checkpointer = Checkpointer(
            client, run, model=model, optimizer=torch.optim.AdamW(model.parameters())
        )
        checkpointer.start()
        checkpointer.close()
    until(lambda: sessions(client) == 0, "what was on its way is given back", 20.0)


def test_a_client_that_is_gone_is_no_failure(
    daemon: DaemonProcess, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with forebay.connect(daemon.address()["rpc"]) as client:
        checkpointer = Checkpointer(client, run)
        checkpointer.save(1, state=state()).wait()
    checkpointer.close()
    told = capsys.readouterr().err
    assert "FAILED" not in told
    assert f"{run}@1/1" in told
    assert "local" in told
