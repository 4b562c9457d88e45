"""State dicts by qualified name as torch makes them, with names that are kept from save to save.

torch works the names out anew each time, module by module for every parameter: of 145 parameters
with AdamW that takes half as long as to copy 100 MB. They only change with the modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

WRAPPERS: Final = ("module", "_orig_mod")
"""What DDP and torch.compile put into the names of their state dicts, and torch takes out."""


class NamedModule:
    """A module's state dict. Not thread-safe."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._keys: list[str] | None = None
        self._names: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """As ``get_model_state_dict`` makes it; its tensors are the live ones."""
        if self._keys is not None:
            plain = self._module.state_dict()
            if list(plain) == self._keys:
                return dict(zip(self._names, plain.values(), strict=True))
            self._keys = None
        found = dict(get_model_state_dict(self._module))
        if not _has_flat_parameters(self._module):
            keys = list(self._module.state_dict())
            names = next((each for each in (keys, _unwrapped(keys)) if set(each) == set(found)), [])
            if len(names) == len(found) == len(keys):
                self._keys, self._names = keys, names
        return found


class NamedOptimizer:
    """An optimizer's state dict, by the names of a module's parameters. Not thread-safe."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        self._known: list[tuple[str, torch.nn.Parameter]] | None = None
        self._held: list[torch.nn.Parameter] = []
        self._names: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """As ``get_optimizer_state_dict`` makes it; its tensors are the live ones."""
        known = list(self._module.named_parameters())
        held = list(_parameters(self._optimizer.param_groups))
        if self._known is not None and _is_same(known, self._known) and _are(held, self._held):
            found = self._renamed(self._optimizer.state_dict())
            if found is not None:
                return found
        self._known = None
        named: dict[str, Any] = dict(get_optimizer_state_dict(self._module, self._optimizer))
        names = list(_parameters(named["param_groups"]))
        if len(names) == len(held) and not _has_flat_parameters(self._module):
            self._known, self._held, self._names = known, held, names
        return named

    def _renamed(self, plain: dict[str, Any]) -> dict[str, Any] | None:
        """None for a state dict that does not number the parameters, as torch's own do."""
        if list(_parameters(plain["param_groups"])) != list(range(len(self._names))):
            return None
        if any(number not in range(len(self._names)) for number in plain["state"]):
            return None
        state = {self._names[number]: held for number, held in plain["state"].items()}
        groups = [
            {**group, "params": [self._names[number] for number in group["params"]]}
            for group in plain["param_groups"]
        ]
        return {**plain, "state": state, "param_groups": groups}


def _parameters(groups: Iterable[Any]) -> Iterable[Any]:
    return chain.from_iterable(group["params"] for group in groups)


def _unwrapped(keys: Iterable[str]) -> list[str]:
    return [".".join(part for part in key.split(".") if part not in WRAPPERS) for key in keys]


def _has_flat_parameters(module: torch.nn.Module) -> bool:
    """Whether its state dict is no plain one: of FSDP as it was before ``fully_shard``."""
    return any(isinstance(each, FullyShardedDataParallel) for each in module.modules())


def _are(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(a is b for a, b in zip(ones, others, strict=True))


def _is_same(
    ones: list[tuple[str, torch.nn.Parameter]], others: list[tuple[str, torch.nn.Parameter]]
) -> bool:
    return len(ones) == len(others) and all(
        a[1] is b[1] and a[0] == b[0] for a, b in zip(ones, others, strict=True)
    )
