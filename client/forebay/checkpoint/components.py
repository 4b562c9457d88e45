"""What a Checkpointer saves: modules and optimizers by qualified name, the rest as it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from forebay.checkpoint.choice import ALL, Choice
from forebay.checkpoint.flatten import FlatState, flatten, local_part
from forebay.checkpoint.naming import NamedModule, NamedOptimizer
from forebay.checkpoint.objects import Path, dotted, dtype_name
from forebay.checkpoint.optimizer_fit import note_groups
from forebay.checkpoint.wrappers import class_name, class_of, plain_parts, rewrapped
from forebay_wire.errors import InvalidRequest


@runtime_checkable
class Stateful(Protocol):
    """What a scheduler, a loader and anything else must offer."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True)
class SavedComponent:
    """What a generation holds of one component."""

    name: str
    tensors: Mapping[Path, TensorStorageMetadata]
    """By path below the component; one inside a list or tuple has :func:`placeless`."""
    objects: frozenset[Path]
    choice: Choice = ALL
    """What of it is wanted; this class holds nothing else."""
    same: Mapping[Path, object] = field(default_factory=dict)
    """Equal for two names of one tensor, which becomes one again."""
    problems: list[str] = field(default_factory=list)
    """Why it does not fit here, one line for each name; whoever finds something appends to it."""
    outline: Callable[[Path], Any] = lambda path: None
    """The object at a path, without the values of what is large in it."""
    shape_of: Callable[[str], torch.Size | None] = lambda name: None
    """Of any tensor of the generation, by its whole name."""


def placeless(name: str) -> Path:
    """What stands for the path of a tensor inside a list or tuple, which has none."""
    return ("", name)


Targets = dict[Path, torch.Tensor]
"""Tensors to read into, by path below the component."""


class Component(Protocol):
    """One named part of the training state."""

    name: str

    def state(self) -> Any:
        """The state to save; tensors in it may be the live ones."""
        ...

    def lowest(self, flat: FlatState) -> set[str]:
        """Names of plain tensors that must all come from one rank."""
        ...

    def frozen(self, flat: FlatState) -> set[str]:
        """Names of tensors that the training leaves alone."""
        ...

    def targets(self, saved: SavedComponent) -> Targets:
        """Where to read the saved tensors to. What does not fit goes into ``saved.problems``."""
        ...

    def apply(self, state: Any) -> None:
        """Take over a state that was read: nested as it was saved."""
        ...


class ModuleComponent:
    """A module, plain or under DDP, FSDP2, tensor parallelism or torch.compile."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name = name
        self.module = module
        self._named = NamedModule(module)

    def state(self) -> dict[str, Any]:
        has_tensors = next(self.module.parameters(), None) is not None
        if not has_tensors and next(self.module.buffers(), None) is None:
            return dict(self.module.state_dict())  # torch's function refuses an empty one
        return self._named.state_dict()

    def lowest(self, flat: FlatState) -> set[str]:
        # Buffers differ between DDP ranks until the next forward: take all of them from one rank.
        known = _memories(self.module.parameters())
        tensors = _below(flat, self.name)
        return {name for name, tensor in tensors.items() if _memory(tensor) not in known}

    def frozen(self, flat: FlatState) -> set[str]:
        still = _memories(p for p in self.module.parameters() if not p.requires_grad)
        tensors = _below(flat, self.name)
        return {name for name, tensor in tensors.items() if _memory(tensor) in still}

    def targets(self, saved: SavedComponent) -> Targets:
        live = flatten({self.name: self.state()})
        present = {path[1:]: live.items[name] for name, path in live.paths.items()}
        stored = set(saved.tensors) | saved.objects
        here, there = ({path[:1] for path in paths} - {("",)} for paths in (present, stored))
        wanted = {path for path in here if saved.choice.takes(dotted((self.name, *path)))}
        _note_difference(saved, missing=wanted - there, surplus=there - here)
        live_wrappers = _same_wrappers(saved, live, wanted & there)
        found: Targets = {}
        for path in {**saved.tensors, **present}:
            item, whole = present.get(path), saved.tensors.get(path)
            if isinstance(item, torch.Tensor) and (len(path) == 1 or path[:1] in live_wrappers):
                if path[:1] in wanted & there and _fitting(saved, path, item, whole):
                    found[path] = item
            elif whole is not None:  # inside a module's extra state, which is a value of its own
                found[path] = torch.empty(whole.size, dtype=whole.properties.dtype)
        return found

    def apply(self, state: Any) -> None:
        if state:
            set_model_state_dict(self.module, rewrapped(state, self.state(), (self.name,)))


class OptimizerComponent:
    """An optimizer; its state is named by the parameters of ``module``."""

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        module: torch.nn.Module,
        module_name: str = "model",
    ) -> None:
        self.name = name
        self.optimizer = optimizer
        self.module = module
        self.module_name = module_name
        self._named = NamedOptimizer(module, optimizer)

    def state(self) -> dict[str, Any]:
        with _kept_from_initialising(self.optimizer), self._explained():
            found = self._named.state_dict()
        found["state"] = {name: held for name, held in found["state"].items() if held}
        return found

    def lowest(self, flat: FlatState) -> set[str]:
        return set()

    def frozen(self, flat: FlatState) -> set[str]:
        return set()

    def targets(self, saved: SavedComponent) -> Targets:
        state = self.state()
        live = flatten({self.name: state})
        present = {path[1:]: live.items[name] for name, path in live.paths.items()}
        params = get_model_state_dict(self.module)
        _same_wrappers(saved, live, {path[:1] for path in saved.tensors})
        if ("param_groups",) in saved.objects:
            groups = saved.outline(("param_groups",))
            note_groups(groups, state["param_groups"], lambda path, why: _note(saved, path, why))
        unfit = self._unfit(saved, params, state["param_groups"])
        found: Targets = {}
        for path, whole in saved.tensors.items():
            item = present.get(path)
            like = params.get(str(path[1])) if path[0] == "state" and len(path) > 1 else None
            if path[:2] in unfit:
                continue
            if isinstance(item, torch.Tensor):
                if _fitting(saved, path, item, whole):
                    found[path] = item
            elif isinstance(like, torch.Tensor) and like.shape == whole.size:
                found[path] = torch.empty_like(like, dtype=whole.properties.dtype)
            else:
                found[path] = torch.empty(whole.size, dtype=whole.properties.dtype)
        return found

    def _unfit(
        self, saved: SavedComponent, params: Mapping[str, Any], groups: Any
    ) -> set[tuple[str | int, ...]]:
        """The parameters, as the first two parts of a path, whose state has no place here."""
        held: dict[str, torch.nn.Parameter] = {}
        for named, live in zip(groups, self.optimizer.param_groups, strict=True):
            held.update(zip(named["params"], live["params"], strict=True))
        unfit: set[tuple[str | int, ...]] = set()
        for path in sorted({one[:2] for one in (*saved.tensors, *saved.objects)}, key=dotted):
            if path[0] != "state" or len(path) < 2:
                continue
            name = str(path[1])
            then = saved.shape_of(f"{self.module_name}.{name}")
            if name not in params:
                why = f"there is no parameter {name} here"
            elif name not in held:
                why = "it was saved, and no group here has this parameter"
            elif not held[name].requires_grad:
                why = "it was saved, and here this parameter is frozen (requires_grad=False)"
            elif then is not None and then != params[name].shape:
                now = list(params[name].shape)
                why = f"its parameter is {now} here and was saved as {list(then)}"
            else:
                continue
            _note(saved, path, why)
            unfit.add(path)
        return unfit

    def apply(self, state: Any) -> None:
        # Parameters that never had a gradient have no state: that is no error.
        options = StateDictOptions(strict=False)
        state = rewrapped(state, self.state(), (self.name,))
        wanted = {name: dict(held) for name, held in state.get("state", {}).items()}
        with _kept_from_initialising(self.optimizer), self._explained():
            set_optimizer_state_dict(self.module, self.optimizer, state, options=options)
            if wanted:
                self._undo_casts(wanted)

    def _undo_casts(self, wanted: Mapping[str, Mapping[Any, Any]]) -> None:
        """torch casts state to the parameter's dtype, which rounds float32 moments of bfloat16."""
        held: Any = get_optimizer_state_dict(self.module, self.optimizer)["state"]
        for name, values in wanted.items():
            live: Any = held.get(name, {})
            for key, value in values.items():
                found = live.get(key)
                both = isinstance(found, torch.Tensor) and isinstance(value, torch.Tensor)
                if both and found.dtype != value.dtype:
                    live[key] = value.to(found.device)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except KeyError as error:
            raise InvalidRequest(
                f"{self.name} holds parameters that do not belong to its module: pass every "
                f"module whose parameters it updates to the Checkpointer ({error!r})"
            ) from error


class PlainComponent:
    """Anything with ``state_dict`` and ``load_state_dict``: equal on all ranks but for DTensors."""

    def __init__(self, name: str, source: Stateful) -> None:
        self.name = name
        self.source = source

    def state(self) -> Any:
        return self.source.state_dict()

    def lowest(self, flat: FlatState) -> set[str]:
        return set(_below(flat, self.name))

    def frozen(self, flat: FlatState) -> set[str]:
        return set()

    def targets(self, saved: SavedComponent) -> Targets:
        state = self.source.state_dict()
        flat = flatten({self.name: state})
        _same_wrappers(saved, flat, {path[:1] for path in saved.tensors})
        return targets_like(self.name, state, saved)

    def apply(self, state: Any) -> None:
        self.source.load_state_dict(rewrapped(state, self.source.state_dict(), (self.name,)))


def targets_like(name: str, state: Any, saved: SavedComponent) -> Targets:
    """Sharded as in *state* where that has a DTensor of the same shape, else whole on the CPU.

    Two names of one tensor get one target.
    """
    live = by_path(flatten({name: state}), name)
    found: Targets = {}
    first: dict[object, torch.Tensor] = {}
    for path, whole in saved.tensors.items():
        like = live.get(path)
        if isinstance(like, DTensor) and like.shape == whole.size:
            found[path] = torch.empty_like(like, dtype=whole.properties.dtype)
        elif saved.same.get(path) in first:
            found[path] = first[saved.same.get(path)]
        else:
            found[path] = torch.empty(whole.size, dtype=whole.properties.dtype)
            if path in saved.same:
                first[saved.same[path]] = found[path]
    return found


def by_path(flat: FlatState, name: str) -> dict[Path, torch.Tensor]:
    """The tensors of component *name* by their path below it, or :func:`placeless`."""
    found: dict[Path, torch.Tensor] = {}
    for item_name, tensor in _below(flat, name).items():
        path = flat.paths.get(item_name)
        found[path[1:] if path is not None else placeless(item_name)] = tensor
    return found


def components(named: Mapping[str, Any]) -> list[Component]:
    """One component for each thing that is not None; lists of modules or optimizers are numbered.

    Order: modules, optimizers, the rest, each in the order given: a scheduler is restored after
    its optimizer.
    """
    single = dict(_numbered(named))
    modules = {name: one for name, one in single.items() if isinstance(one, torch.nn.Module)}
    found: list[Component] = [ModuleComponent(name, module) for name, module in modules.items()]
    for name, one in single.items():
        if isinstance(one, torch.optim.Optimizer):
            owner = _owner(name, one, modules)
            found.append(OptimizerComponent(name, one, modules[owner], owner))
    for name, one in single.items():
        if isinstance(one, (torch.nn.Module, torch.optim.Optimizer)):
            continue
        if not isinstance(one, Stateful):
            raise InvalidRequest(
                f"{name}={type(one)} has no state_dict() and load_state_dict(): pass raw values to "
                "save(step, state={...}) instead"
            )
        found.append(PlainComponent(name, one))
    return found


def _numbered(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    kinds = (torch.nn.Module, torch.optim.Optimizer)
    for name, one in named.items():
        if name == RAW_STATE:
            raise InvalidRequest(f"{name}= is the name of save()'s raw values: choose another")
        if isinstance(one, (list, tuple)) and all(isinstance(item, kinds) for item in one):
            yield from ((f"{name}{number}", item) for number, item in enumerate(one))
        elif one is not None:
            yield name, one


RAW_STATE = "state"
"""The component name of ``save(step, state={...})``."""


def _owner(
    name: str, optimizer: torch.optim.Optimizer, modules: Mapping[str, torch.nn.Module]
) -> str:
    wanted = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for owner, module in modules.items():
        if wanted <= {id(param) for param in module.parameters()}:
            return owner
    raise InvalidRequest(
        f"{name}: its parameters belong to no module given ({', '.join(modules) or 'none given'}); "
        "pass the module too, and make the optimizer after wrapping it (fully_shard replaces "
        "parameters)"
    )


@contextlib.contextmanager
def _kept_from_initialising(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """torch steps an optimizer without state to make some up, which moves its step counters on.

    It does so only if the state is empty: so for that time it holds an empty entry.
    """
    if optimizer.state:
        yield
        return
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    if first is None:
        yield
        return
    optimizer.state[first] = {}
    try:
        yield
    finally:
        if not optimizer.state.get(first, True):
            del optimizer.state[first]


def _fitting(
    saved: SavedComponent, path: Path, tensor: torch.Tensor, whole: TensorStorageMetadata | None
) -> bool:
    if whole is None:
        _note(saved, path, "it is a tensor here and was saved as an object")
    elif not _fits(tensor, whole):
        _note(
            saved,
            path,
            f"it is {dtype_name(tensor.dtype)}{list(tensor.shape)} here and was saved as "
            f"{dtype_name(whole.properties.dtype)}{list(whole.size)}",
        )
    else:
        return True
    return False


def _note(saved: SavedComponent, path: Path, why: str) -> None:
    saved.problems.append(f"{dotted((saved.name, *path))}: {why}")


def _fits(tensor: torch.Tensor, whole: TensorStorageMetadata) -> bool:
    return tensor.shape == whole.size and tensor.dtype == whole.properties.dtype


def _note_difference(saved: SavedComponent, missing: set[Path], surplus: set[Path]) -> None:
    for path in sorted(missing, key=dotted):
        _note(saved, path, "it is here and was not saved")
    for path in sorted(surplus, key=dotted):
        _note(saved, path, "it was saved and is not here")


def _same_wrappers(saved: SavedComponent, live: FlatState, tops: set[Path]) -> set[Path]:
    """The paths, one long, of live wrappers; those that were saved as something else, or the other
    way round, are noted. Only what is below *tops* is looked at."""
    here = {path[1:]: class_name(tensor) for path, tensor in live.wrappers.items()}
    there = dict(filter(None, map(class_of, saved.objects)))
    for path in sorted({*here, *there}, key=dotted):
        if here.get(path) != there.get(path) and path[:1] in tops:
            now, then = here.get(path, "none"), there.get(path, "none")
            _note(
                saved,
                path,
                f"it was saved as a wrapper of class {then}, and here is {now}: build it (and step "
                "the optimizer once, if it is its state) as it was",
            )
    return {path for path in here if len(path) == 1}


def _below(flat: FlatState, name: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}."
    return {key: tensor for key, tensor in flat.tensors().items() if key.startswith(prefix)}


def _memories(params: Iterable[torch.nn.Parameter]) -> set[tuple[str, int]]:
    return {_memory(part) for param in params for part in plain_parts(param)}


def _memory(tensor: torch.Tensor) -> tuple[str, int]:
    local = local_part(tensor.detach())
    return str(local.device), local.data_ptr() if local.numel() else 0
