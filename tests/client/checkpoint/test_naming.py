"""State dicts by remembered names are those that torch makes, whatever changed since."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from forebay.checkpoint.naming import NamedModule, NamedOptimizer


class Wrapper(nn.Module):
    """A user's own, with a part that is called as DDP's is."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.module(x)


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def trained(model, optimizer, width=4):
    model(torch.randn(5, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def check(named, model, optimizer=None):
    found = named.state_dict()
    if optimizer is None:
        wanted = get_model_state_dict(model)
    else:
        wanted = get_optimizer_state_dict(model, optimizer)
        assert found["param_groups"] == wanted["param_groups"]
        found, wanted = found["state"], wanted["state"]
        assert set(found) == set(wanted)
        found = {
            f"{name}.{key}": value for name, each in found.items() for key, value in each.items()
        }
        wanted = {
            f"{name}.{key}": value for name, each in wanted.items() for key, value in each.items()
        }
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].data_ptr() == value.data_ptr(), name


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's, inside it
@pytest.mark.parametrize("make", [net, lambda: torch.compile(net()), Wrapper])
def test_a_module_is_named_as_torch_does_the_second_time_too(make):
    model = make()
    named = NamedModule(model)
    for _ in range(3):
        check(named, model)


def test_a_module_that_changes_is_named_anew():
    model = net()
    named = NamedModule(model)
    check(named, model)
    model.append(nn.Linear(2, 2))
    check(named, model)
    check(named, model)
    model[0] = nn.Linear(4, 3, bias=False)
    check(named, model)
    model[0].weight = nn.Parameter(torch.ones(3, 4))
    check(named, model)


def test_hooks_of_state_dicts_are_heard_each_time():
    model = net()
    named = NamedModule(model)
    calls = []
    model.register_state_dict_post_hook(lambda *hooked: calls.append(1))
    check(named, model)
    num_calls = len(calls)
    named.state_dict()
    assert len(calls) > num_calls


def test_an_optimizer_is_named_as_torch_does_whatever_changes():
    model = net()
    optimizer = torch.optim.AdamW(model[0].parameters())
    named = NamedOptimizer(model, optimizer)
    trained(model, optimizer)
    for _ in range(3):
        check(named, model, optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    check(named, model, optimizer)
    trained(model, optimizer)
    check(named, model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    check(named, model, optimizer)
    model.insert(0, nn.Identity())  # every name moves on, every parameter stays
    check(named, model, optimizer)
    check(named, model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check(named, model, optimizer)


def test_an_optimizer_that_keeps_something_else_is_left_to_torch():
    class Odd(torch.optim.SGD):
        def state_dict(self):
            found = super().state_dict()
            found["state"]["all"] = {"x": torch.ones(1)}
            return found

    model = net()
    optimizer = Odd(model.parameters(), lr=0.1, momentum=0.9)
    named = NamedOptimizer(model, optimizer)
    trained(model, optimizer)
    for _ in range(2):
        with pytest.raises(KeyError):  # as torch does
            named.state_dict()


def test_remembered_names_are_faster():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(60)))
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer)
    named = NamedOptimizer(model, optimizer), NamedModule(model)

    def seconds(make):
        def once():
            started = time.perf_counter()
            make()
            return time.perf_counter() - started

        return min(once() for _ in range(10))

    for each in named:
        each.state_dict()
    ours = seconds(lambda: [each.state_dict() for each in named])
    torchs = seconds(
        lambda: (get_optimizer_state_dict(model, optimizer), get_model_state_dict(model))
    )
    assert ours < 0.6 * torchs
