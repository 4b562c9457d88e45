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

    def get(self, endpoint: DataEndpoint) -> LocalTransfer | RemoteTransfer:
        is_local = endpoint.descriptor_socket is not None and local_path_is_on()
        with self._lock:
            found = self._known.get((endpoint, is_local))
            if found is None:
                found = LocalTransfer(endpoint) if is_local else RemoteTransfer(endpoint)
                self._known[endpoint, is_local] = found
            return found

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
