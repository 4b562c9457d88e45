"""Wakes tasks that wait for something to change, without polling."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Changes:
    """Events by name. Belongs to one event loop.

    A waiter watches first, then looks, then waits: a change between look and wait is not lost.
    """

    def __init__(self) -> None:
        self._watchers: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def watch(self, *names: str) -> Iterator[asyncio.Event]:
        """An event that is set at each change of one of *names*; clear it before looking again."""
        event = asyncio.Event()
        for name in names:
            self._watchers.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            for name in names:
                watchers = self._watchers[name]
                watchers.discard(event)
                if not watchers:
                    del self._watchers[name]

    def announce(self, name: str) -> None:
        """What *name* stands for has changed."""
        for event in self._watchers.get(name, ()):
            event.set()
