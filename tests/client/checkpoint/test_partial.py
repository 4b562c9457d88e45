"""What a restore takes, leaves alone and refuses; and generations that are only looked into."""

import copy
from collections.abc import Callable

import pytest
import torch

import forebay
import forebay.checkpoint
from forebay.testing.values import Values
from forebay_server.testing.daemon import DaemonProcess

Make = Callable[..., forebay.Checkpointer]


class Net(torch.nn.Module):
    def __init__(self, seed: int, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        self.head = torch.nn.Linear(4, outputs)
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def trained(net: Net) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def values(net: Net) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.fixture
def saved(client: forebay.Client, run: str) -> Net:
    net = Net(1)
    optimizer = trained(net)
    with forebay.Checkpointer(
        client, run, model=net, optimizer=optimizer, mine=Values(a=1, b={"c": torch.ones(3)})
    ) as checkpointer:
        checkpointer.save(5, metrics={"loss": 0.5}, state={"note": "x"}).wait("local", 60)
    return net


@pytest.fixture(scope="module")
def saved_once(daemon: DaemonProcess) -> str:
    """A run of which nothing more is saved."""
    net = Net(1)
    with (
        forebay.connect(daemon.address()["rpc"]) as connected,
        forebay.Checkpointer(connected, "saved-once", model=net, optimizer=trained(net)) as one,
    ):
        one.save(5).wait("local", 60)
    return "saved-once"


def test_only_and_ignore_choose_by_name_and_the_rest_stays(
    client: forebay.Client, run: str, saved: Net
) -> None:
    net = Net(2)
    optimizer, mine = trained(net), Values(a=7, b={"c": torch.zeros(3), "d": 4})
    before, moments = values(net), optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with forebay.Checkpointer(client, run, model=net, optimizer=optimizer, mine=mine) as one:
        found = one.restore(only=["model.body", "mine.b.*"], ignore="*.bias")
    assert found is not None
    after, wanted = values(net), values(saved)
    for name in after:
        is_taken = name.startswith("body") and name.endswith("weight")
        assert torch.equal(after[name], (wanted if is_taken else before)[name]), name
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moments)
    assert mine.values["a"] == 7
    assert mine.values["b"]["c"].tolist() == [1.0] * 3
    assert mine.values["b"]["d"] == 4
    assert found.state == {}
    assert {"model.head.weight", "model.body.0.bias", "mine.a", "state.note"} <= set(found.left)
    assert "model.body.0.weight" not in found.left


def test_a_part_of_an_optimizer(client: forebay.Client, run: str, saved: Net) -> None:
    net = Net(2)
    optimizer = trained(net)
    with forebay.Checkpointer(client, run, model=net, optimizer=optimizer) as one:
        one.restore(only="optimizer.state.body.0.weight")
        opened = one.open()
        wanted = opened["optimizer.state.body.0.weight.exp_avg"].read()
        other = opened["optimizer.state.body.1.weight.exp_avg"].read()
        opened.close()
    first, third = net.body[0].weight, net.body[1].weight
    assert torch.equal(optimizer.state[first]["exp_avg"], wanted)
    assert not torch.equal(optimizer.state[third]["exp_avg"], other)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_new_head_on_an_old_body(client: forebay.Client, run: str, saved: Net) -> None:
    net = Net(2, outputs=9)
    head = net.head.weight.detach().clone()
    with forebay.Checkpointer(client, run, model=net) as one:
        one.restore(only="model", ignore="model.head.*")
    assert torch.equal(net.head.weight, head)
    assert torch.equal(net.body[1].weight, saved.body[1].weight)


def test_all_that_differs_is_listed_before_anything_is_written(
    client: forebay.Client, run: str, saved: Net
) -> None:
    net = Net(2, outputs=9)
    net.extra = torch.nn.Parameter(torch.zeros(2))
    net.body[1].to(torch.bfloat16)
    del net.body[0].bias
    net.body[0].register_parameter("bias", None)
    before = values(net)
    with forebay.Checkpointer(client, run, model=net, other=Values(a=1)) as one:
        with pytest.raises(forebay.InvalidRequest) as caught:
            one.restore()
        assert one.attempt == 0
    text = str(caught.value)
    for line in (
        "in 7 places",
        "model.body.0.bias: it was saved and is not here",
        "model.body.1.bias: it is bfloat16[4] here and was saved as float32[4]",
        "model.body.1.weight: it is bfloat16[4, 5] here and was saved as float32[4, 5]",
        "model.extra: it is here and was not saved",
        "model.head.bias: it is float32[9] here and was saved as float32[3]",
        "model.head.weight: it is float32[9, 4] here and was saved as float32[3, 4]",
        "other: it is here and was not saved",
    ):
        assert line in text, (line, text)
    assert all(torch.equal(value, before[name]) for name, value in values(net).items())


GROUPS = "optimizer.param_groups"
FROZEN = "it was saved, and here this parameter is frozen (requires_grad=False)"


def momentum(net: Net) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def two_groups(net: Net) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": net.body.parameters()}, {"params": net.head.parameters()}])


def fewer(net: Net) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.body.parameters())


def frozen(net: Net) -> torch.optim.Optimizer:
    net.head.requires_grad_(False)
    return torch.optim.AdamW(net.parameters())


def other_moments(net: Net) -> torch.optim.Optimizer:
    optimizer = trained(net)
    optimizer.state[net.head.bias]["exp_avg"] = torch.ones(3, dtype=torch.float64)
    return optimizer


def plain_adam(net: Net) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), amsgrad=True)


@pytest.mark.parametrize(
    ("build", "lines"),
    [
        (
            momentum,
            [
                f"{GROUPS}.0.momentum: it is here and was not saved",
                f"{GROUPS}.0.betas: it was saved and is not here",
            ],
        ),
        (two_groups, [f"{GROUPS}: there are 2 groups here and 1 were saved"]),
        (
            fewer,
            [
                f"{GROUPS}.0.params: head.weight was in it when it was saved and is not here",
                "optimizer.state.head.bias: it was saved, and no group here has this parameter",
            ],
        ),
        (
            frozen,
            [f"optimizer.state.head.bias: {FROZEN}", f"optimizer.state.head.weight: {FROZEN}"],
        ),
        (
            other_moments,
            ["optimizer.state.head.bias.exp_avg: it is float64[3] here and was saved as float32"],
        ),
        (
            plain_adam,
            [
                f"{GROUPS}.0.amsgrad: it is True here and was saved as False",
                f"{GROUPS}.0.decoupled_weight_decay: it is False here and was saved as True",
            ],
        ),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_an_optimizer_that_differs_is_refused_by_name(
    client: forebay.Client,
    saved_once: str,
    build: Callable[[Net], torch.optim.Optimizer],
    lines: list[str],
) -> None:
    net = Net(2)
    optimizer = build(net)
    before, moments = values(net), copy.deepcopy(optimizer.state_dict())
    with forebay.Checkpointer(client, saved_once, model=net, optimizer=optimizer) as one:
        with pytest.raises(forebay.InvalidRequest) as caught:
            one.restore()
        assert one.attempt == 0
        text = str(caught.value)
        for line in (*lines, 'ignore=["optimizer*"], or a Checkpointer without it'):
            assert line in text, (line, text)
        assert all(torch.equal(value, before[name]) for name, value in values(net).items())
        assert repr(optimizer.state_dict()) == repr(moments)
        found = one.restore(ignore="optimizer*")
    assert found is not None
    assert f"{GROUPS}" in found.left
    assert repr(optimizer.state_dict()) == repr(moments)


def test_state_of_a_parameter_of_another_shape_is_refused(
    client: forebay.Client, saved_once: str
) -> None:
    net = Net(2, outputs=9)
    optimizer = torch.optim.AdamW(net.parameters())
    line = r"optimizer.state.head.weight: its parameter is \[9, 4\] here and was saved as \[3, 4\]"
    with (
        forebay.Checkpointer(client, saved_once, model=net, optimizer=optimizer) as one,
        pytest.raises(forebay.InvalidRequest, match=line),
    ):
        one.restore(ignore="model.head.*")


def test_an_optimizer_that_fits_takes_the_values_of_the_generation(
    client: forebay.Client, saved_once: str, run: str
) -> None:
    net = Net(2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=7.0, weight_decay=3.0, foreach=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)  # its initial_lr is no hyperparameter
    with forebay.Checkpointer(client, saved_once, model=net, optimizer=optimizer) as one:
        one.restore()
    assert (optimizer.param_groups[0]["lr"], len(optimizer.state)) == (0.1, 6)
    partly = Net(3)
    optimizer = torch.optim.AdamW(partly.parameters())
    partly.body(torch.ones(2, 6)).sum().backward()
    optimizer.step()  # the head never had a gradient: it has no state
    with forebay.Checkpointer(client, run, model=partly, optimizer=optimizer) as one:
        one.save(1).wait("local", 60)
    again = trained(net)
    with forebay.Checkpointer(client, run, model=net, optimizer=again) as one:
        one.restore()
    assert len(again.state) == 4
    assert again.param_groups[0]["lr"] == 0.001


def test_patterns_that_take_nothing_are_an_error(
    client: forebay.Client, run: str, saved: Net
) -> None:
    with forebay.Checkpointer(client, run, model=Net(2)) as one:
        message = r"^only='modle.\*' takes nothing of .*; near it are model$"
        with pytest.raises(forebay.InvalidRequest, match=message):
            one.restore(only="modle.*")
        for selector in ("", None, True):
            with pytest.raises(forebay.InvalidRequest, match="names no generation"):
                one.restore(selector)  # type: ignore[arg-type]
        with pytest.raises(forebay.InvalidRequest, match="names nothing"):
            one.restore(only=[])


def test_a_generation_is_looked_into_without_a_model(
    client: forebay.Client, run: str, saved: Net
) -> None:
    with forebay.checkpoint.open(client, run, "1/5") as opened:
        assert (opened.generation.step, opened.metrics) == (5, {"loss": 0.5})
        weight = opened["model.body.0.weight"]
        assert (weight.shape, weight.dtype, weight.num_bytes) == ((5, 6), torch.float32, 120)
        assert opened.bytes_read == 0
        expected = saved.body[0].weight.detach()
        assert torch.equal(weight[1:3], expected[1:3])
        assert opened.bytes_read == 2 * 6 * 4
        for index in (0, -1, (2, 3), (..., 1), slice(None, None, 2), (slice(1, 4), slice(2, -1))):
            assert torch.equal(weight[index], expected[index]), index
        assert weight[4:2].shape == (0, 6)
        into = torch.zeros(6, 5).t()
        assert torch.equal(weight.read(into), expected)
        assert torch.equal(into, expected)
        assert int(opened["model.count"].read()) == 1
        assert opened.object("state.note") == "x"
        net = Net(2)
        net.load_state_dict(opened.state_dict("model"))
        assert torch.equal(net.head.weight, saved.head.weight)
        with forebay.checkpoint.open(client, run, 5) as again:
            assert torch.equal(again["model.body.0.weight"][0], expected[0])
        with pytest.raises(KeyError, match=r"body.9.weight is no tensor of .*near it are model"):
            opened["model.body.9.weight"]
        with pytest.raises(KeyError, match=r"read it by object\(\)"):
            opened["state.note"]
        with pytest.raises(forebay.NotFound, match=r"nothing below 'modell'; near it are model$"):
            opened.state_dict("modell")
        with pytest.raises(forebay.NotFound, match="has no object"):
            opened.object("model.nothing")
        with pytest.raises(IndexError):
            weight[5]
        with pytest.raises(forebay.InvalidRequest, match="nothing is cast"):
            weight.read(torch.zeros(5, 6, dtype=torch.float64))
    with pytest.raises(forebay.InvalidRequest, match="closed"):
        weight.read()


def test_aliased_tensors_are_one_again(client: forebay.Client, run: str) -> None:
    shared = torch.arange(10_000.0)
    holder = Values(one=shared, two={"again": shared}, other=shared.clone())
    with forebay.Checkpointer(client, run, mine=holder) as one:
        one.save(1, state={"a": shared, "b": shared}).wait("local", 60)
        found = one.restore()
        assert found is not None
        report = one.report()
    assert report.saved_bytes < 2.5 * shared.nbytes
    assert holder.values["one"] is holder.values["two"]["again"]
    assert holder.values["other"] is not holder.values["one"]
    assert found.state["a"] is found.state["b"]
    with forebay.checkpoint.open(client, run) as opened:
        state = opened.state_dict("mine")
    assert state["one"] is state["two"]["again"]
    assert state["one"] is not state["other"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_onto_a_gpu_in_place_whole_and_in_columns(client: forebay.Client, run: str) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(3000, 5000, generator=generator)  # more than one piece
    model = torch.nn.Linear(5000, 3000)
    model.weight.data.copy_(whole)
    with forebay.Checkpointer(client, run, model=model) as one:
        one.save(1).wait("local", 60)
    there = torch.nn.Linear(5000, 3000, device="cuda")
    address = there.weight.data_ptr()
    with forebay.Checkpointer(client, run, model=there) as one:
        one.restore()
    assert there.weight.data_ptr() == address
    assert torch.equal(there.weight.cpu(), whole)
    with forebay.checkpoint.open(client, run) as opened:
        target = torch.zeros(5000, 3000, device="cuda").t()
        assert torch.equal(opened["model.weight"].read(target).cpu(), whole)
