"""An overlapped save holds the state at its call, whatever the training does; or it fails."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import forebay
from forebay.checkpoint import overlapped
from forebay.checkpoint.overlap import Snapshot, copy_quietly
from forebay.testing.values import Values
from forebay.waiting import Deadline
from forebay_server.testing.daemon import DaemonProcess

WIDTH = 600  # weights above 1 MiB
SECONDS = 60.0


class Gate:
    """Holds the copy in the background up until somebody waits for it, or it is opened."""

    def __init__(self) -> None:
        self._opened = threading.Event()
        self.num_waits = 0
        self.at_wait: Callable[[], object] = lambda: None
        """Called whenever the training begins to wait."""

    def copy(self, *what: Any) -> None:
        assert self._opened.wait(SECONDS)
        copy_quietly(*what)

    def wait(self, snapshot: Snapshot, deadline: Deadline) -> None:
        if threading.current_thread() is threading.main_thread():
            self.num_waits += 1
            self.at_wait()
        self._opened.set()
        _real_wait(snapshot, deadline)


_real_wait = Snapshot.wait


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    found = Gate()
    monkeypatch.setattr(overlapped, "copy_quietly", found.copy)
    monkeypatch.setattr(Snapshot, "wait", _method(found))
    return found


def _method(gate: Gate) -> Callable[[Snapshot, Deadline], None]:
    return lambda snapshot, deadline: gate.wait(snapshot, deadline)


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[forebay.Client]:
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected


Make = Callable[..., forebay.Checkpointer]


def new_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.BatchNorm1d(WIDTH),
        torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(WIDTH, WIDTH)),
    )


def backward(model: torch.nn.Module) -> torch.Tensor:
    loss: torch.Tensor = model(torch.randn(4, WIDTH)).square().sum()
    loss.backward()
    return loss


def copied(*things: Any) -> list[Any]:
    """The state dicts of *things*, with memory of their own."""
    import copy

    return [copy.deepcopy(thing.state_dict()) for thing in things]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw-fused": lambda params: torch.optim.AdamW(params, fused=True),
    "lbfgs": lambda params: torch.optim.LBFGS(params, max_iter=2),
}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(lambda: backward(model))
    else:
        backward(model)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_the_call_whatever_forward_and_step_change(
    make: Make, gate: Gate, name: str
) -> None:
    model = new_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    ema = Values(average=model[0].weight.detach().clone(), count=1)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    checkpointer = make(**parts)
    before = copied(*parts.values())
    weights = [param.detach().clone() for param in model.parameters()]
    unchanged = []
    gate.at_wait = lambda: unchanged.append(same(weights, list(model.parameters())))

    saved = checkpointer.save_overlapped(1)
    assert not saved.reached("ram")
    ema.values["average"].zero_()  # it is no optimizer's: it has been copied
    step(model, optimizer)  # buffers of the norms change, and the closure runs, before the wait
    scheduler.step()
    assert gate.num_waits == 1
    assert unchanged == [True]
    assert not same(weights, list(model.parameters()))
    saved.wait("local", SECONDS)

    report = checkpointer.report()
    assert report.num_overlapped == 1
    assert report.overlapped_bytes >= 2 * 4 * WIDTH * WIDTH
    assert checkpointer.restore() is not None
    assert same(copied(*parts.values()), before)


def test_two_optimizers_and_either_waits(make: Make, gate: Gate) -> None:
    models = [new_model(1), new_model(2)]
    optimizers = [OPTIMIZERS["adamw-fused"](model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    checkpointer = make(model=models, optimizer=optimizers)
    before = copied(*models, *optimizers)
    saved = checkpointer.save_overlapped(1)
    for model, optimizer in reversed(list(zip(models, optimizers, strict=True))):
        step(model, optimizer)
    assert gate.num_waits == 1
    saved.wait("local", SECONDS)
    checkpointer.restore()
    assert same(copied(*models, *optimizers), before)


def test_the_wait_comes_before_hooks_that_write(make: Make, gate: Gate) -> None:
    model = new_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.01, 0.01)

    everywhere = [torch_optimizer.register_optimizer_step_pre_hook(clamp)]
    optimizer.register_step_pre_hook(clamp)
    checkpointer = make(model=model, optimizer=optimizer)
    before = copied(model)
    saved = checkpointer.save_overlapped(1)
    everywhere.append(torch_optimizer.register_optimizer_step_pre_hook(clamp))
    try:
        backward(model)
        optimizer.step()
    finally:
        for handle in everywhere:
            handle.remove()
    saved.wait("local", SECONDS)
    checkpointer.restore()
    assert same(copied(model)[0]["0.weight"], before[0]["0.weight"])


class WritesFirst(torch.optim.SGD):
    """An optimizer that is not torch's, and moves the parameters before it calls its closure."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.add_(1.0)
        return super().step(closure)


def test_an_optimizer_of_ones_own_waits_before_it_does_anything(make: Make, gate: Gate) -> None:
    model = new_model()
    optimizer = WritesFirst(model.parameters(), lr=0.1)
    checkpointer = make(model=model, optimizer=optimizer)
    before = copied(model)
    saved = checkpointer.save_overlapped(1)
    optimizer.step(lambda: backward(model))
    saved.wait("local", SECONDS)
    checkpointer.restore()
    assert same(copied(model)[0]["0.weight"], before[0]["0.weight"])


def test_a_scaler_that_skips_a_step_leaves_the_copy_going_on(make: Make, gate: Gate) -> None:
    model = new_model()
    optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, WIDTH)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step(1.0)
    checkpointer = make(model=model, optimizer=optimizer, scaler=scaler)
    before = copied(model, optimizer, scaler)
    saved = checkpointer.save_overlapped(1)
    scaled_step(float("inf"))
    scale = scaler.get_scale()
    scaled_step(1.0)
    assert (gate.num_waits, scale) == (1, 8.0)
    saved.wait("local", SECONDS)
    checkpointer.restore()
    assert same(copied(model, optimizer, scaler), before)


def _add_to_data(weight: torch.nn.Parameter) -> None:
    weight.data.add_(1.0)


def _add(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 5] += 1.0


def _replace(weight: torch.nn.Parameter) -> None:
    weight.data = torch.zeros_like(weight)


def test_a_write_behind_torchs_back_is_seen_whatever_the_strides(make: Make, gate: Gate) -> None:
    """Channels last: what lies in memory is in another order than what is stored."""
    model = torch.nn.Conv2d(192, 192, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = make(model=model, optimizer=optimizer)
    expected = copied(model)
    checkpointer.save(1).wait("local", SECONDS)
    checkpointer.save_overlapped(2)
    model.weight.data.mul_(2.0)
    with pytest.raises(forebay.Conflict, match=r"model\.weight changed while it was saved"):
        checkpointer.wait_snapshot()
    checkpointer.restore()
    assert same(copied(model), expected)
    checkpointer.save_overlapped(3).wait("local", SECONDS)


@pytest.mark.parametrize("change", [_add_to_data, _add])
def test_what_changes_without_a_wait_fails_the_save_and_the_next_one_works(
    make: Make, gate: Gate, client: forebay.Client, change: Callable[[torch.nn.Parameter], None]
) -> None:
    model = new_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    checkpointer = make(model=model, optimizer=optimizer)
    checkpointer.save(1).wait("local", SECONDS)
    saved = checkpointer.save_overlapped(2)
    change(model[0].weight)
    with pytest.raises(forebay.Conflict, match=r"model\.0\.weight changed while it was saved"):
        checkpointer.wait_snapshot()
    with pytest.raises(forebay.Conflict, match="changed while it was saved"):
        saved.wait("local", SECONDS)
    with pytest.raises(forebay.Conflict, match="changed while it was saved"):
        _ = saved.durability
    assert [one.step for one in client.checkpoints(checkpointer.run)] == [1]
    checkpointer.wait_snapshot()
    checkpointer.save_overlapped(2).wait("local", SECONDS)
    step(model, optimizer)
    assert checkpointer.restore() is not None


def test_memory_is_not_freed_while_it_is_copied(make: Make, gate: Gate) -> None:
    model = new_model()
    checkpointer = make(model=model, optimizer=OPTIMIZERS["sgd"](model.parameters()))
    saved = checkpointer.save_overlapped(1)
    with pytest.raises(RuntimeError, match="not resizable"):
        model[0].weight.untyped_storage().resize_(0)
    checkpointer.wait_snapshot()
    saved.wait("local", SECONDS)


def test_a_save_leaves_storages_that_can_be_resized(make: Make) -> None:
    weight = torch.nn.Linear(WIDTH, WIDTH)
    make(model=weight).save(1)
    assert weight.weight.untyped_storage().resizable()
    assert weight.bias.untyped_storage().resizable()


def test_a_parameter_that_is_replaced_is_saved_as_it_was(make: Make, gate: Gate) -> None:
    model = new_model()
    checkpointer = make(model=model, optimizer=OPTIMIZERS["sgd"](model.parameters()))
    before = model[0].weight.detach().clone()
    saved = checkpointer.save_overlapped(1)
    _replace(model[0].weight)
    checkpointer.wait_snapshot()
    saved.wait("local", SECONDS)
    checkpointer.restore()
    assert torch.equal(model[0].weight, before)


def test_every_verb_waits_for_the_copy(make: Make, gate: Gate) -> None:
    model = new_model()
    checkpointer = make(model=model, optimizer=OPTIMIZERS["sgd"](model.parameters()))
    first = checkpointer.save_overlapped(1)
    second = checkpointer.save(2)
    assert first.reached("ram")
    assert gate.num_waits >= 1
    third = checkpointer.save_overlapped(3)
    assert checkpointer.restore("latest") is not None
    for saved in (first, second, third):
        saved.wait("local", SECONDS)
    fourth = checkpointer.save_overlapped(4)
    checkpointer.close()
    fourth.wait("local", SECONDS)


def test_there_is_a_hook_from_the_first_overlapped_save_to_the_close(make: Make) -> None:
    hooks = torch_optimizer._global_optimizer_pre_hooks
    model = new_model()
    checkpointer = make(model=model, optimizer=OPTIMIZERS["sgd"](model.parameters()))
    checkpointer.wait_snapshot()
    checkpointer.save(1)
    assert not hooks
    for step_number in (2, 3):
        checkpointer.save_overlapped(step_number)
        assert len(hooks) == 1
    checkpointer.close()
    assert not hooks


def test_too_little_memory_copies_all_at_once(own_daemon_small: forebay.Client) -> None:
    model = torch.nn.Linear(3000, 3000)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with forebay.Checkpointer(
        own_daemon_small, "small", model=model, optimizer=optimizer
    ) as checkpointer:
        before = copied(model)
        saved = checkpointer.save_overlapped(1)
        model.weight.data.zero_()
        checkpointer.wait_snapshot()
        saved.wait("local", SECONDS)
        assert checkpointer.report().num_chunked == 1
        checkpointer.restore()
        assert same(copied(model), before)


@pytest.fixture
def own_daemon_small(tmp_path: Any) -> Iterator[forebay.Client]:
    data = tmp_path / "data"
    with DaemonProcess(data, "--ram-bytes", "16MiB"), forebay.connect(data) as client:
        yield client


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::UserWarning")
def test_compiled_models_and_steps(make: Make, gate: Gate) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    compiled_step = torch.compile(optimizer.step, backend="aot_eager")

    def train() -> None:
        optimizer.zero_grad()
        compiled(torch.randn(4, WIDTH)).square().sum().backward()
        compiled_step()

    train()
    checkpointer = make(model=compiled, optimizer=optimizer)
    before = copied(model, optimizer)
    saved = checkpointer.save_overlapped(1)
    train()
    saved.wait("local", SECONDS)
    checkpointer.restore()
    assert same(copied(model, optimizer), before)
