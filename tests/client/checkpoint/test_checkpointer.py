"""One process saves and restores through a real daemon, by descriptors and by HTTP."""

import asyncio
import os
import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import forebay
from forebay.checkpoint import StorageReader, StorageWriter
from forebay.testing.values import Values
from forebay_server.testing.daemon import DaemonProcess

Make = Callable[..., forebay.Checkpointer]


@pytest.fixture(scope="module", params=["local", "remote"])
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[forebay.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOREBAY_NO_LOCAL", "1" if request.param == "remote" else "0")
        data = tmp_path_factory.mktemp("daemon") / "data"
        with DaemonProcess(data), forebay.connect(data) as connected:
            yield connected


def new_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2)
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(state: Any) -> Any:
    """*state* with every tensor as (dtype, shape, bytes), for exact comparison."""
    if isinstance(state, torch.Tensor):
        raw = state.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (state.dtype, state.shape, raw)
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(bits(value) for value in state)
    return state


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1), weight_decay=0.3),
    "adam-fused": lambda params: torch.optim.Adam(params, fused=True),
    "adagrad": lambda params: torch.optim.Adagrad(params),
    "lbfgs": lambda params: torch.optim.LBFGS(params),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_comes_back_exactly_and_goes_on_alike(make: Make, name: str) -> None:
    model = new_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    if name == "lbfgs":
        data = torch.randn(4, 6)
        optimizer.step(lambda: _closure(model, optimizer, data))
    else:
        train(model, optimizer, 3)
    before = bits([model.state_dict(), optimizer.state_dict()])
    make(model=model, optimizer=optimizer).save(3).wait("local")
    assert bits([model.state_dict(), optimizer.state_dict()]) == before

    other = new_model(1)
    fresh = OPTIMIZERS[name](other.parameters())
    resumed = make(model=other, optimizer=fresh).restore()
    assert resumed is not None
    assert resumed.step == 3
    assert bits([other.state_dict(), fresh.state_dict()]) == before
    if name != "lbfgs":
        for one, its in ((model, optimizer), (other, fresh)):
            torch.manual_seed(3)
            train(one, its)
        assert bits(other.state_dict()) == bits(model.state_dict())


def _closure(model: Any, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> Any:
    optimizer.zero_grad()
    loss = model(data).square().sum()
    loss.backward()
    return loss


def test_saving_a_fresh_optimizer_does_not_start_it(make: Make) -> None:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters())
    before = bits(model.state_dict())
    make(model=model, optimizer=optimizer).save(0).wait("local")
    assert not optimizer.state
    assert bits(model.state_dict()) == before
    other = new_model(1)
    used = torch.optim.AdamW(other.parameters())
    train(other, used)
    make(model=other, optimizer=used).restore()
    assert not used.state
    assert bits(other.state_dict()) == before


def test_float32_moments_of_bfloat16_weights_are_not_rounded(make: Make) -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for held in optimizer.state.values():
        held["exp_avg"] = torch.randn(held["exp_avg"].shape)
    before = bits(optimizer.state_dict())
    make(model=model, optimizer=optimizer).save(1).wait("local")
    other = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    fresh = torch.optim.AdamW(other.parameters())
    make(model=other, optimizer=fresh).restore()
    assert bits(fresh.state_dict()) == before


def test_two_models_and_optimizers(make: Make) -> None:
    models = [new_model(1), new_model(2)]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    before = bits([thing.state_dict() for thing in (*models, *optimizers)])
    make(model=models, optimizer=optimizers).save(1).wait("local")
    others = [new_model(3), new_model(4)]
    fresh = [torch.optim.Adam(model.parameters()) for model in others]
    make(model=others, optimizer=fresh).restore()
    assert bits([thing.state_dict() for thing in (*others, *fresh)]) == before


def test_tied_weights_stay_tied_and_are_stored_once(make: Make) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(500, 500, bias=False)})
    model["b"] = torch.nn.Linear(500, 500, bias=False)
    model["b"].weight = model["a"].weight
    saved = make(model=model).save(1)
    assert saved.num_bytes == 1_000_000
    saved.wait("local")
    expected = model["a"].weight.clone()
    with torch.no_grad():
        model["a"].weight.zero_()
    make(model=model).restore()
    assert torch.equal(model["b"].weight, expected)
    assert model["b"].weight is model["a"].weight


class Remembering(torch.nn.Module):
    """A module with extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Any = None

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state


@pytest.mark.parametrize("memory", [7, {"a": torch.ones(2), "b": (1, None)}, {}, [torch.ones(1)]])
def test_extra_state_of_a_module(make: Make, memory: Any) -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), Remembering()])
    model[1].memory = memory
    make(model=model).save(1).wait("local")
    other = torch.nn.ModuleList([torch.nn.Linear(2, 2), Remembering()])
    make(model=other).restore()
    assert bits(other[1].memory) == bits(memory)


def test_other_state_comes_back_with_its_types(make: Make) -> None:
    values = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "keys": {1: "int", "1": "str"},
        "large": b"x" * 100_000,
        "array": np.arange(100_000),
        "nested": [{"tensor": torch.ones(3, dtype=torch.bfloat16)}, ()],
    }
    make(mine=Values(**values)).save(1).wait("local")
    found = Values()
    make(mine=found).restore()
    assert bits(found.values["nested"]) == bits(values["nested"])
    assert torch.equal(found.values["torch"], values["torch"])
    np.testing.assert_array_equal(found.values["array"], values["array"])
    np.testing.assert_array_equal(found.values["numpy"][1], values["numpy"][1])
    for name in ("python", "keys", "large"):
        assert found.values[name] == values[name]
        assert type(found.values[name]) is type(values[name])


def test_raw_state_comes_back_in_the_result(make: Make) -> None:
    state = {"step": (1, 2), "ema": {"w": torch.randn(4)}}
    checkpointer = make()
    checkpointer.save(1, metrics={"loss": torch.tensor(0.5)}, state=state).wait("local")
    resumed = checkpointer.restore(1)
    assert resumed is not None
    assert bits(dict(resumed.state)) == bits(state)
    assert resumed.metrics == {"loss": 0.5}


def test_schedulers(make: Make) -> None:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def schedulers(its: torch.optim.Optimizer) -> dict[str, Any]:
        lr = torch.optim.lr_scheduler
        return {
            "steps": lr.MultiStepLR(its, [2, 4]),
            "plateau": lr.ReduceLROnPlateau(its),
            "chain": lr.SequentialLR(its, [lr.LinearLR(its), lr.CosineAnnealingLR(its, 5)], [2]),
        }

    first = schedulers(optimizer)
    train(model, optimizer)
    first["steps"].step()
    first["chain"].step()
    first["plateau"].step(0.3)
    make(**first).save(1).wait("local")
    second = schedulers(torch.optim.SGD(model.parameters(), lr=9.0))
    make(**second).restore()
    assert {n: s.state_dict() for n, s in second.items()} == {
        n: s.state_dict() for n, s in first.items()
    }


def test_the_loader_state_is_kept_readable_with_the_generation(
    make: Make, client: forebay.Client, run: str
) -> None:
    state = {"dataset": "d", "version": 3, "manifest": "m", "epoch": 1, "position": 40}
    make(loader=Values(**state)).save(1).wait("local")
    from forebay_wire.manifest import GenerationManifest, parse

    (generation,) = client.checkpoints(run)
    manifest = parse(client.read_manifest(generation.manifest), "test")
    assert isinstance(manifest, GenerationManifest)
    assert manifest.dataset == state


# ------------------------------------------------------------------------------ attempts, lineage


def test_a_rollback_opens_an_attempt_on_the_generation_it_restored(
    make: Make, client: forebay.Client, run: str
) -> None:
    values = Values(at=0)
    checkpointer = make(mine=values)
    assert checkpointer.restore(missing_ok=True) is None
    assert checkpointer.attempt == 1
    for step in (10, 20, 30):
        values.values = {"at": step}
        checkpointer.save(step).wait("local")
    resumed = checkpointer.restore(20)
    assert resumed is not None
    assert (resumed.attempt, resumed.step, values.values) == (1, 20, {"at": 20})
    assert checkpointer.attempt == 2
    assert make(mine=Values()).restore().step == 20  # 30 is not on this lineage
    checkpointer = make(mine=values)
    checkpointer.restore("1/30")
    values.values = {"at": -20}
    checkpointer.save(20).wait("local")
    newest = make(mine=values).restore()
    assert (newest.attempt, newest.step) == (4, 20)
    attempts, _ = client.describe_run(run)
    parents = {a.attempt: (a.parent_attempt, a.parent_step) for a in attempts if a.has_parent}
    assert parents == {2: (1, 20), 3: (1, 20), 4: (1, 30), 5: (4, 20)}


def test_an_older_attempt_may_not_save_any_more(make: Make) -> None:
    old, new = (make(mine=Values(a=1)) for _ in range(2))
    old.save(1).wait("local")
    new.restore()
    with pytest.raises(forebay.Fenced, match="may not save any more"):
        old.save(2)


def test_a_step_is_saved_once_in_an_attempt(make: Make) -> None:
    checkpointer = make(mine=Values(a=1))
    checkpointer.save(1).wait("local")
    with pytest.raises(forebay.AlreadyExists, match="step 1 was already saved"):
        checkpointer.save(1)
    checkpointer.restore(1)
    checkpointer.save(1).wait("local")


def test_start_begins_afresh(make: Make) -> None:
    first = make(mine=Values(a=1))
    first.save(1).wait("local")
    second = make(mine=Values())
    second.start()
    assert second.attempt == 2
    with pytest.raises(forebay.NotFound):
        second.restore()


# ------------------------------------------------------------------------------------- bad input


def test_what_is_not_there(make: Make) -> None:
    with pytest.raises(forebay.NotFound, match=r"has no generation latest.*missing_ok=True"):
        make().restore()
    for selector in ("latest", "a-tag", 7, "best"):
        assert make().restore(selector, missing_ok=True) is None
    make(mine=Values(a=1)).save(1).wait("local")
    for selector in ("mistyped", 7, "1/7"):
        with pytest.raises(forebay.NotFound):
            make(mine=Values(a=1)).restore(selector, missing_ok=True)
    with pytest.raises(forebay.InvalidRequest, match="no metric"):
        make(mine=Values(a=1)).restore("best", missing_ok=True)
    assert make(mine=Values(a=1)).restore(missing_ok=True) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: torch.nn.Linear(6, 4), r"weight: it is float32\[4, 6\] here.*float32\[5, 6\]"),
        (lambda: torch.nn.Linear(6, 5).half(), r"weight: it is float16(.|\n)*model\.bias: it is"),
        (lambda: torch.nn.Linear(6, 5, bias=False), r"model\.bias: it was saved and is"),
        (lambda: torch.nn.ModuleList([torch.nn.Linear(6, 5)]), r"model\.0\.bias: it is here"),
        (lambda: torch.nn.Linear(6, 5, device="meta"), "meta device"),
    ],
    ids=["shape", "dtype", "surplus", "missing", "meta"],
)
def test_a_model_that_does_not_fit_is_refused_untouched(
    make: Make, change: Callable[[], torch.nn.Module], message: str
) -> None:
    make(model=torch.nn.Linear(6, 5)).save(1).wait("local")
    model = change()
    before = None if any(p.is_meta for p in model.parameters()) else bits(model.state_dict())
    with pytest.raises(forebay.InvalidRequest, match=message):
        make(model=model).restore()
    assert before is None or bits(model.state_dict()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thing": 3}, r"thing=<class 'int'> has no state_dict"),
        ({"state": Values()}, "state= is the name of save"),
        ({"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])}, "no module given"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(
    make: Make, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(forebay.InvalidRequest, match=message):
        make(**arguments)


def test_nothing_and_metrics_without_names_are_refused(make: Make, run: str) -> None:
    with pytest.raises(forebay.InvalidRequest, match="there is nothing to save: give"):
        make().save(1)
    checkpointer = make(mine=Values(a=1))
    with pytest.raises(forebay.InvalidRequest, match=r"metrics=\[1\] is no dict"):
        checkpointer.save(1, metrics=[1])  # type: ignore[arg-type]
    checkpointer.save(1).wait("local", 60)


@pytest.mark.parametrize("step", [-1, 1.5, True, "1"])
def test_a_step_is_a_whole_number(make: Make, step: Any) -> None:
    with pytest.raises(forebay.InvalidRequest, match="whole number"):
        make().save(step)


def test_an_unsupported_object_is_named_and_nothing_is_left(
    make: Make, client: forebay.Client, run: str
) -> None:
    values = Values(a={"b": [1, object()]})
    checkpointer = make(mine=values)
    with pytest.raises(forebay.UnsupportedObject, match=r"mine\.a\.b\.1: <class 'object'>"):
        checkpointer.save(1)
    assert client.checkpoints(run) == []
    values.values = {"a": 1}
    checkpointer.save(1).wait("local")


def test_metrics_are_numbers(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = make(mine=Values(a=1))
    with pytest.raises(forebay.InvalidRequest, match=r"metrics\['a'\] = 'x' is no number"):
        checkpointer.save(1, metrics={"a": "x"})  # type: ignore[dict-item]
    checkpointer.save(1, metrics={"loss": float("nan"), "ok": 1}).wait("local")
    assert "loss is nan" in caplog.text
    assert checkpointer.restore().metrics == {"ok": 1.0}  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------- handles


def test_handle_tells_how_durable_it_is(make: Make) -> None:
    saved = make(mine=Values(a=torch.ones(100))).save(5)
    assert (saved.step, saved.attempt) == (5, 1)
    assert saved.reached("ram")
    saved.wait("local", timeout=60)
    assert saved.reached("local")
    asyncio.run(saved.wait_async("remote", timeout=60))
    assert saved.reached("remote")
    assert saved.durability == "remote"
    with pytest.raises(forebay.InvalidRequest, match="durability 'done' is unknown"):
        saved.wait("done")


def test_report_counts_saves(make: Make) -> None:
    checkpointer = make(mine=Values(a=torch.ones(1000)))
    for step in range(3):
        checkpointer.save(step).wait("local")
    checkpointer.restore()
    report = checkpointer.report()
    assert report.num_saves == 3
    assert 0 < report.save_seconds_p50 <= report.save_seconds_p99 <= report.save_seconds_max
    assert report.saved_bytes == 3 * 4032
    assert report.restored_bytes == 4000
    assert report.num_chunked == 0


def test_close_says_what_became_of_the_last_save(
    make: Make, client: forebay.Client, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointer = make(mine=Values(a=1))
    with checkpointer:
        saved = checkpointer.save(7, tags="good")
        assert re.search(r"@1/7, (ram|local|remote)>$", repr(saved))
    said = capsys.readouterr().err
    assert f"forebay: generation {run}@1/7 is " in said
    assert re.search(r"is (ram: it becomes local without this process|local|remote)\n", said)
    saved.wait("local", 60)
    assert list(client.run(run).tags()) == ["good"]
    with pytest.raises(forebay.InvalidRequest, match="closed"):
        checkpointer.save(8)


def test_the_end_of_a_program_waits_for_the_seal(client: forebay.Client, run: str) -> None:
    program = f"""
        import forebay, torch
        client = forebay.connect({str(client.address.folder)!r})
        checkpointer = forebay.Checkpointer(client, {run!r}, model=torch.nn.Linear(2, 2))
        checkpointer.save(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=dict(os.environ),
    )
    assert f"generation {run}@1/3 is" in done.stderr
    (generation,) = client.checkpoints(run)
    assert generation.state in ("sealed", "committed")


# -------------------------------------------------------------------------- torch's own functions


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_saves_and_loads_through_us(client: forebay.Client, run: str) -> None:
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    state = {"model": model.state_dict(), "more": {"step": 3, "list": [1, (2, "x")]}}
    expected = bits(state)
    dcp.save(state, storage_writer=StorageWriter(client, run, 1), no_dist=True)
    found = {
        "model": new_model(1).state_dict(),
        "more": {"step": 0, "list": []},
    }
    dcp.load(found, storage_reader=StorageReader(client, run), no_dist=True)
    assert bits(found) == expected
