"""Tensors that wrap others are saved as what they consist of, and rebuilt, or refused by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing

import forebay
from forebay.testing.values import Values
from forebay_server.testing.daemon import DaemonProcess

SECONDS = 60.0


class Scaled(torch.Tensor):
    """Eight-bit numbers with a scale for each row; the context says for which dtype they stand."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, context: Any) -> "Scaled":
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=context["dtype"])

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, context: Any) -> None:
        self.data8, self.scale, self.context = data, scale, context

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["data8", "scale"], self.context

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> "Scaled":
        assert (tuple(size), tuple(stride)) == (inner["data8"].shape, inner["data8"].stride())
        return Scaled(inner["data8"], inner["scale"], context)

    @classmethod
    def of(cls, seed: int, **context: Any) -> "Scaled":
        generator = torch.Generator().manual_seed(seed)
        data = torch.randint(-128, 128, (700, 800), generator=generator).to(torch.int8)
        scale = torch.rand(700, 1, generator=generator)
        return cls(data, scale, {"dtype": torch.bfloat16, "axis": (0, None), **context})

    def bits(self) -> tuple[bytes, bytes, Any]:
        return self.data8.numpy().tobytes(), self.scale.numpy().tobytes(), self.context

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            [one] = args
            made = cls(one.data8.detach(), one.scale.detach(), one.context)
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        if func is torch.ops.aten.copy_.default:
            one, other = args[:2]
            one.data8.copy_(other.data8)
            one.scale.copy_(other.scale)
            one.context = other.context
            return one
        raise NotImplementedError(f"{func} of {cls}")


@pytest.fixture(scope="module")
def client(daemon: DaemonProcess) -> Iterator[forebay.Client]:
    with forebay.connect(daemon.address()["rpc"]) as connected:
        yield connected


Make = Callable[..., forebay.Checkpointer]


class Holder(torch.nn.Module):
    """A module with one wrapped weight and one plain one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.bias = torch.nn.Parameter(torch.zeros(3))


def two(seed: int, *shape: int) -> TwoTensor:
    generator = torch.Generator().manual_seed(seed)
    return TwoTensor(
        torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    )


@pytest.mark.parametrize("verb", ["save", "save_overlapped"])
def test_parameters_and_optimizer_state_that_are_wrapped_come_back(make: Make, verb: str) -> None:
    def trained(seed: int, steps: int) -> tuple[Holder, torch.optim.Optimizer]:
        model = Holder(two(seed, 600, 700).requires_grad_())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
        for _ in range(steps):
            model.weight.grad = two(seed + 1, 600, 700)
            optimizer.step()
        return model, optimizer

    def bits(model: Holder, optimizer: torch.optim.Optimizer) -> list[bytes]:
        tensors = [model.weight, optimizer.state[model.weight]["momentum_buffer"]]
        return [part.detach().numpy().tobytes() for one in tensors for part in (one.a, one.b)]

    model, optimizer = trained(1, 2)
    expected = bits(model, optimizer)
    checkpointer = make(model=model, optimizer=optimizer)
    saved = getattr(checkpointer, verb)(1)
    assert saved.num_bytes > 4 * 4 * 600 * 700
    if verb == "save_overlapped":
        assert checkpointer.report().overlapped_bytes == 4 * 4 * 600 * 700
    optimizer.step()
    saved.wait("local", SECONDS)
    assert bits(model, optimizer) != expected
    checkpointer.restore()
    assert bits(model, optimizer) == expected

    other, fresh = trained(5, 1)
    make(model=other, optimizer=fresh).restore()
    assert bits(other, fresh) == expected
    assert isinstance(other.weight, TwoTensor)
    never, stepped = trained(5, 0)
    with pytest.raises(forebay.InvalidRequest, match=r"momentum_buffer.*step the optimizer once"):
        make(model=never, optimizer=stepped).restore()


def test_scales_and_context_come_back(make: Make) -> None:
    model = Holder(Scaled.of(1, version=3))
    values = Values(inner={"kept": Scaled.of(2)}, plain=torch.ones(3))
    checkpointer = make(model=model, values=values)
    expected = model.weight.bits(), values.values["inner"]["kept"].bits()
    checkpointer.save(1).wait("local", SECONDS)
    other, fresh = Holder(Scaled.of(3)), Values(inner={"kept": Scaled.of(4)}, plain=torch.ones(3))
    make(model=other, values=fresh).restore()
    assert (other.weight.bits(), fresh.values["inner"]["kept"].bits()) == expected


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (lambda: Scaled.of(1), lambda: torch.zeros(700, 800)),
        (lambda: torch.zeros(700, 800), lambda: Scaled.of(1)),
        (lambda: Scaled.of(1), lambda: two(1, 700, 800)),
    ],
    ids=["unwrapped", "wrapped", "other"],
)
def test_another_kind_of_tensor_is_refused_by_name_and_nothing_is_written(
    make: Make, saved: Callable[[], torch.Tensor], live: Callable[[], torch.Tensor]
) -> None:
    model = Holder(saved())
    with torch.no_grad():
        model.bias.fill_(7.0)
    make(model=model).save(1).wait("local", SECONDS)
    other = Holder(live())
    with pytest.raises(forebay.InvalidRequest, match=r"model\.weight: it was saved as a wrapper"):
        make(model=other).restore()
    assert not other.bias.any()


def test_what_has_no_safe_context_or_place_is_refused_by_name(make: Make) -> None:
    with pytest.raises(forebay.UnsupportedObject, match=r"model\.weight.*cannot be saved"):
        make(model=Holder(Scaled.of(1, config=object()))).save(1)
    with pytest.raises(forebay.UnsupportedObject, match=r"state\.w.*nothing here to rebuild"):
        make("other").save(1, state={"w": Scaled.of(1)})
