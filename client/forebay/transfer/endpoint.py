"""Which way of transfer an endpoint means, one object per process."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Final

from forebay.forking import watch
from forebay.transfer.blob import Transfer
from forebay.transfer.local import LocalTransfer
from forebay.transfer.remote import RemoteTransfer
from forebay_wire.protocol import DataEndpoint

NO_LOCAL_VARIABLE: Final = "FOREBAY_NO_LOCAL"
"""Set to 1, bytes travel by HTTP only, also on the daemon's host."""


def local_path_is_on() -> bool:
    """Whether the environment lets this process read through descriptors."""
    return os.environ.get(NO_LOCAL_VARIABLE, "") not in ("1", "true", "yes")


class _Registry:
    """The transfers of this process, by endpoint; each lives as long as somebody holds it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[
            tuple[DataEndpoint, bool], LocalTransfer | RemoteTransfer
        ] = weakref.WeakValueDictionary()
        self._successors: dict[DataEndpoint, DataEndpoint] = {}

    def get(self, endpoint: DataEndpoint) -> LocalTransfer | RemoteTransfer:
        is_local = endpoint.descriptor_socket is not None and local_path_is_on()
        with self._lock:
            found = self._known.get((endpoint, is_local))
            if found is None:
                now = self._successors.get(endpoint, endpoint)
                found = LocalTransfer(now) if is_local else RemoteTransfer(now)
                self._known[endpoint, is_local] = found
            return found

    def current(self, endpoint: DataEndpoint) -> DataEndpoint:
        return self._successors.get(endpoint, endpoint)

    def succeed(self, old: DataEndpoint, new: DataEndpoint) -> None:
        with self._lock:
            for one, successor in list(self._successors.items()):
                if successor == old:
                    self._successors[one] = new
            self._successors[old] = new
            self._successors.pop(new, None)
            transfers = list(self._known.values())
        for transfer in transfers:
            if isinstance(transfer, RemoteTransfer) and transfer.endpoint == old:
                transfer.follow(new)

    def forget_parent(self) -> None:
        """In a child of fork: another thread of the parent may have held it."""
        self._lock = threading.Lock()


_registry: Final = _Registry()
watch(_registry)


def make_transfer(endpoint: DataEndpoint) -> Transfer:
    """The transfer of this process for *endpoint*; no connection is made before its first use.

    All callers in a process share one, so closing it is for whoever knows that nobody reads.
    """
    return _registry.get(endpoint)


def current_endpoint(endpoint: DataEndpoint) -> DataEndpoint:
    """Where the daemon of *endpoint* is by now, as far as this process has heard."""
    return _registry.current(endpoint)


def succeed_endpoint(old: DataEndpoint, new: DataEndpoint) -> None:
    """A control connection found the daemon of *old* again, at *new*: who reads there follows."""
    if old != new:
        _registry.succeed(old, new)
