"""What a child of fork has to forget: sockets, channels and locks that belong to its parent.

A fork copies memory and descriptors but only the calling thread. An inherited socket would be
shared with the parent, an inherited lock may be held by a thread that does not exist any more.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol


class ForkAware(Protocol):
    """Something with state that a child of fork must not use."""

    def forget_parent(self) -> None:
        """Called in the child before anything else runs there; must not wait for any lock."""
        ...


_watched: Final[weakref.WeakSet[ForkAware]] = weakref.WeakSet()


def watch(thing: ForkAware) -> None:
    """Have ``thing.forget_parent()`` called in every child, as long as *thing* lives."""
    _watched.add(thing)


def _forget_parent() -> None:
    for thing in list(_watched):
        thing.forget_parent()


os.register_at_fork(after_in_child=_forget_parent)
