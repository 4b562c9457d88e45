"""The net below ``wait_snapshot()``: no optimizer steps while a copy of the state is under way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer
from torch.utils.hooks import RemovableHandle


class StepNet:
    """Has every optimizer's ``step()`` wait, before its other hooks run and anything changes.

    A closure is run first, as it only computes, and then waited after: before the optimizer uses
    what it computed. Optimizers that are not torch's own may write before they call it: they wait
    at once. Removed only by :meth:`remove`, never by a step: that would change the hooks while
    torch walks through them. Keeps nobody alive.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        """*wait* is a bound method."""
        self._waiter = weakref.WeakMethod(wait)
        self._handle: RemovableHandle | None = None

    def spread(self) -> None:
        """Catch all steps from here on. Idempotent."""
        hooks: Any = torch_optimizer._global_optimizer_pre_hooks
        if self._handle is None:
            hook = partial(_before_step, self._waiter)
            self._handle = torch_optimizer.register_optimizer_step_pre_hook(hook)
        # Hooks run in the order of their numbers' places: whatever another one writes comes later.
        hooks.move_to_end(self._handle.id, last=False)

    def remove(self) -> None:
        """Let steps pass. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()


def _before_step(
    waiter: Callable[[], Callable[[], None] | None],
    optimizer: torch.optim.Optimizer,
    args: Any,
    kwargs: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    wait = waiter()
    if wait is None:
        return None
    closure, place = _closure(args, kwargs)
    if closure is None or not type(optimizer).__module__.startswith("torch.optim."):
        wait()
        return None

    def then_wait(*inputs: Any, **named: Any) -> Any:
        loss = closure(*inputs, **named)
        wait()
        return loss

    if place is None:
        return args, {**kwargs, "closure": then_wait}
    return (*args[:place], then_wait, *args[place + 1 :]), kwargs


def _closure(args: Any, kwargs: Any) -> tuple[Callable[..., Any] | None, int | None]:
    """The closure given to ``step()``, and its place among the arguments after the optimizer."""
    if kwargs.get("closure") is not None:
        return kwargs["closure"], None
    for place, value in enumerate(args):
        if place and callable(value):
            return value, place
    return None, None
