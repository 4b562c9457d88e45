"""What else passes between a reader and the daemon: whose plan it reads for, and the blobs that the
daemon asks back because it needs their room for what is read sooner."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_plan: Final[ContextVar[str]] = ContextVar("forebay_plan", default="")


@contextmanager
def reading_for(plan: str) -> Iterator[None]:
    """What this thread opens inside the ``with`` block is read for *plan*."""
    before = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(before)


def current_plan() -> dict[str, str]:
    """What an open says of its plan: nothing if there is none."""
    plan = _plan.get()
    return {"plan": plan} if plan else {}


class WantedBack:
    """Passes on what the daemon asks for. Thread-safe; listeners are held weakly."""

    def __init__(self) -> None:
        self._listeners: list[weakref.WeakMethod[Callable[[Sequence[str]], object]]] = []

    def listen(self, listener: Callable[[Sequence[str]], object]) -> None:
        """Have the bound method *listener* told which blobs to close, if it can do without."""
        self._listeners.append(weakref.WeakMethod(listener))

    def tell(self, answer: dict[str, object]) -> None:
        """Take what an *answer* of the daemon asks back."""
        blobs = answer.pop("wanted_back", None)
        if not isinstance(blobs, list):
            return
        for reference in list(self._listeners):
            listener = reference()
            if listener is None:
                self._listeners.remove(reference)
            else:
                listener(blobs)
