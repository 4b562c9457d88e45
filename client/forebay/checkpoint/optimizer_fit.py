"""Whether a saved optimizer fits the one that is here: torch itself drops what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from forebay.checkpoint.objects import Path

BY_SCHEDULERS: Final = frozenset(
    {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
)
"""What torch's schedulers put into the groups: there or not, the optimizer is the same."""

OF_THE_CODE: Final = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""How a step is computed, not what: it may differ."""

Note = Callable[[Path, str], object]
Groups = Sequence[Mapping[str, Any]]


def note_groups(saved: Groups, here: Groups, note: Note) -> None:
    """Tell *note* how the groups differ: their number, parameters, hyperparameters' names and what
    these switch on or off. Other values are the generation's."""
    where: Path = ("param_groups",)
    if len(saved) != len(here):
        note(where, f"there are {len(here)} groups here and {len(saved)} were saved")
        then, now = (_union(groups) for groups in (saved, here))
        _note_parameters(where, then, now, note)
        return
    for number, (old, new) in enumerate(zip(saved, here, strict=True)):
        group = (*where, number)
        _note_parameters(group, old.get("params", ()), new.get("params", ()), note)
        for key in sorted((new.keys() | old.keys()) - BY_SCHEDULERS - {"params"}):
            if key not in old:
                note((*group, key), "it is here and was not saved: another kind of optimizer?")
            elif key not in new:
                note((*group, key), "it was saved and is not here: another kind of optimizer?")
            elif key not in OF_THE_CODE and _is_switched(old[key], new[key]):
                note((*group, key), f"it is {new[key]} here and was saved as {old[key]}")


def _union(groups: Groups) -> set[str]:
    return {name for group in groups for name in group.get("params", ())}


def _note_parameters(where: Path, saved: Iterable[str], here: Iterable[str], note: Note) -> None:
    then, now = set(saved), set(here)
    for name in sorted(now - then):
        note((*where, "params"), f"{name} is in it here and was not when it was saved")
    for name in sorted(then - now):
        note((*where, "params"), f"{name} was in it when it was saved and is not here")


def _is_switched(old: Any, new: Any) -> bool:
    return type(old) is bool and type(new) is bool and old != new
