"""Tensor subclasses that wrap others (float8, quantized): taken apart to be saved, and rebuilt.

What such a tensor is is said by its inner tensors and by a context; its own storage holds nothing.
``__tensor_flatten__`` and ``__tensor_unflatten__`` are torch's protocol for both directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from forebay.checkpoint.objects import Path, dotted
from forebay_wire.errors import InvalidRequest

MARK: Final = "$wrapper"
"""Below the tensor's path, then its class: the object there holds context, size and stride."""


def is_wrapper(value: object) -> bool:
    """Whether *value* is a tensor whose values are those of inner tensors."""
    return is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor)


def class_name(tensor: torch.Tensor) -> str:
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"


def inner_tensors(tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """By attribute, those that a wrapper directly holds."""
    attributes, _ = _flattened(tensor)
    return {name: getattr(tensor, name) for name in attributes}


def wrapping(tensor: torch.Tensor) -> list[Any]:
    """What has to be known of a wrapper beside its class and its inner tensors."""
    _, context = _flattened(tensor)
    return [context, tuple(tensor.shape), tuple(tensor.stride())]


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with values of their own that *tensor* consists of on this rank."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not is_wrapper(local):
        yield local
        return
    for inner in inner_tensors(local).values():
        yield from plain_parts(inner)


def class_of(path: Path) -> tuple[Path, str] | None:
    """(path of the wrapper, its class) where *path* is that of what :data:`MARK` names."""
    if len(path) > 1 and path[-2] == MARK:
        return path[:-2], str(path[-1])
    return None


def rewrapped(read: Any, live: Any, path: Path = ()) -> Any:
    """*read*, nested, with wrappers in place of their parts, as *live* has them there."""
    if not isinstance(read, Mapping):
        return read
    if isinstance(read.get(MARK), Mapping):
        return _rebuilt(read, live, path)
    found = {
        key: rewrapped(value, live.get(key) if isinstance(live, Mapping) else None, (*path, key))
        for key, value in read.items()
    }
    changed = any(found[key] is not value for key, value in read.items())
    return found if changed else read


def _rebuilt(read: Mapping[Any, Any], live: Any, path: Path) -> Any:
    [(name, (context, size, stride))] = read[MARK].items()
    if not isinstance(live, torch.Tensor) or not is_wrapper(live) or class_name(live) != name:
        raise InvalidRequest(
            f"{dotted(path)} was saved as {name} and is {type(live)} here: build it as it was"
        )
    held = inner_tensors(live)
    inner = {key: rewrapped(value, held.get(key), (*path, key)) for key, value in read.items()}
    del inner[MARK]
    rebuild: Any = type(live).__tensor_unflatten__  # type: ignore[attr-defined]
    return rebuild(inner, context, torch.Size(size), tuple(stride))


def _flattened(tensor: Any) -> tuple[list[str], Any]:
    attributes, context = tensor.__tensor_flatten__()
    return list(attributes), context
