"""What a child of fork has to forget: sockets, channels and locks that belong to its parent.

A fork copies memory and descriptors but only the calling thread. An inherited socket would be
shared with the parent, an inherited lock may be held by a thread that does not exist any more. And
what another thread was in the midst of using, gRPC's calls for one, must not be torn down: the
child's garbage collector leaves alone what the parent had made.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from typing import Final, Protocol


class ForkAware(Protocol):
    """Something with state that a child of fork must not use."""

    def forget_parent(self) -> None:
        """Called in the child before anything else runs there; must not wait for any lock."""
        ...


# gRPC's own fork handlers stop and restart its threads at each fork, or do nothing if another
# thread is in a call. Between two calls of another thread they hang parents and children. Our
# children never touch what they inherit, so nothing is lost without them. Read by gRPC when it
# makes its first channel.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# Arrow's own allocator has locks that a thread of the parent may hold at a fork; a child that
# allocates then waits for ever. The C library's allocator takes care of forks. Read by Arrow when
# it is loaded.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

_watched: Final[weakref.WeakSet[ForkAware]] = weakref.WeakSet()


def watch(thing: ForkAware) -> None:
    """Have ``thing.forget_parent()`` called in every child, as long as *thing* lives."""
    _watched.add(thing)


def _forget_parent() -> None:
    global _num_forking
    _num_forking = 0  # what the parent had made stays frozen here, also after forks of this one
    for thing in list(_watched):
        thing.forget_parent()
    arrow = sys.modules.get("pyarrow")
    if arrow is not None and hasattr(arrow, "set_memory_pool"):  # loaded before us, maybe
        arrow.set_memory_pool(arrow.system_memory_pool())


def _freeze() -> None:
    """Unless the program has done so for itself: what it has frozen must stay as it is."""
    global _num_forking
    if _num_forking or not gc.get_freeze_count():
        gc.freeze()
        _num_forking += 1


def _thaw() -> None:
    """After the last of several forks that go on at the same time, in as many threads."""
    global _num_forking
    if _num_forking:
        _num_forking -= 1
        if not _num_forking:
            gc.unfreeze()


_num_forking = 0
"""Forks for which what there is is frozen; the hooks hold the GIL."""

os.register_at_fork(before=_freeze, after_in_parent=_thaw, after_in_child=_forget_parent)
