"""A nested state as one flat table: every tensor under a name, everything else encoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from forebay.checkpoint.objects import EncodedObject, Path, dotted, encode, unsupported
from forebay.checkpoint.wrappers import MARK, class_name, inner_tensors, is_wrapper, wrapping


@dataclass
class FlatState:
    """A state, flattened: ``items`` in the state's own order."""

    items: dict[str, torch.Tensor | EncodedObject] = field(default_factory=dict)
    """Tensors (plain or DTensor) and encoded objects by name."""
    paths: dict[str, Path] = field(default_factory=dict)
    """Where each item hangs; tensors inside a list or tuple have no place of their own."""

    wrappers: dict[Path, torch.Tensor] = field(default_factory=dict)
    """Tensors of which only the inner ones are items, by path."""

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: item for name, item in self.items.items() if isinstance(item, torch.Tensor)}


def flatten(state: Mapping[str, Any]) -> FlatState:
    """Take *state* apart along its dicts with string and integer keys.

    A name is the path joined by dots, as torch's checkpoints have it. Raises
    :class:`UnsupportedObject` for the first tensor or object that cannot be saved as it is.
    """
    flat = FlatState()
    for key, value in state.items():
        _walk(flat, (key,), value)
    return flat


def nest(values: Iterable[tuple[Path, Any]]) -> dict[str | int, Any]:
    """The inverse of :func:`flatten`: nested dicts from paths and their values."""
    root: dict[str | int, Any] = {}
    for path, value in values:
        place = root
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return root


def overlaid(base: Any, values: Iterable[tuple[Path, Any]]) -> Any:
    """*base* with some values replaced, along its dicts; *base* itself stays as it is."""
    root: dict[Any, Any] = dict(base)
    for path, value in values:
        place = root
        for key in path[:-1]:
            below = place.get(key)
            place[key] = dict(below) if isinstance(below, Mapping) else {}
            place = place[key]
        place[path[-1]] = value
    return root


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that this rank holds of *tensor*."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_plain(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    """*tensor* if its bytes are what it means, else :class:`UnsupportedObject`.

    Wrapper subclasses (float8, quantised, lazily built tensors) often have a storage of nothing:
    copying that would save garbage.
    """
    if isinstance(tensor, ShardedTensor):
        raise unsupported(tensor, path, "it comes from FSDP1; use fully_shard (FSDP2) or DDP")
    local = local_part(tensor)
    if is_traceable_wrapper_subclass(local) or type(local) not in _PLAIN:
        name = f"{type(tensor).__name__} of {type(local).__name__}"
        why = f"the tensor subclass ({name}) keeps its values elsewhere"
        raise unsupported(local, path, f"{why}; save its plain parts, or dequantize it")
    if local.layout is not torch.strided:
        raise unsupported(tensor, path, f"its layout is {local.layout}; save indices and values")
    if local.is_quantized:
        raise unsupported(
            tensor, path, "it is quantized; save its int_repr(), scale and zero point"
        )
    if local.is_meta:
        raise unsupported(tensor, path, "it is on the meta device and holds no data")
    if local.numel() and not local.untyped_storage().nbytes():
        raise unsupported(tensor, path, "its storage is empty; a resharded or freed parameter?")
    return tensor


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _walk(flat: FlatState, path: Path, value: Any) -> None:
    if isinstance(value, torch.Tensor) and is_wrapper(value):
        flat.wrappers[path] = value
        about = encode(wrapping(value), path)  # refuses a context that would need pickle
        mark = (*path, MARK, class_name(value))
        flat.paths[_add(flat, mark, about)] = mark
        for attribute, inner in inner_tensors(value).items():
            _walk(flat, (*path, attribute), inner)
    elif isinstance(value, torch.Tensor):
        flat.paths[_add(flat, path, check_plain(value, path))] = path
    elif type(value) in (dict, OrderedDict) and value and _plain_keys(value):
        for key, item in value.items():
            _walk(flat, (*path, key), item)
    else:
        encoded = encode(value, path, lambda tensor, at: _add(flat, at, check_plain(tensor, at)))
        flat.paths[_add(flat, path, encoded)] = path


def _plain_keys(value: Mapping[Any, Any]) -> bool:
    return all(type(key) is str or type(key) is int for key in value)


def _add(flat: FlatState, path: Path, item: torch.Tensor | EncodedObject) -> str:
    wanted = dotted(path)
    name, number = wanted, 2
    # "a.b" may be one key or two: then the later one gets a number, the same on every rank.
    while name in flat.items:
        name, number = f"{wanted}~{number}", number + 1
    flat.items[name] = item
    return name
