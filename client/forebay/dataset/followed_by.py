"""The name under which the ranks and workers of one loader agree on what an epoch reads.

The daemon decides once for each name and epoch. So all of them need the same name, and a training
that starts anew needs another one. One rank alone makes one up. Several take the name of their run
if the user gives it; else one of them makes it up for the job and puts it into the store of
torch.distributed, where nobody waits for anybody: who comes first, wins. Either way loaders of one
kind share a name, however many of them a rank makes: so no rank can count otherwise than another.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Final

from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import new_random_name

_KEY: Final = "forebay/follow/run"


class ReaderName:
    """Found when the number of ranks is known, or before. Picklable."""

    def __init__(self, run: str | None, kind: str) -> None:
        """*kind*: what tells the loaders of a run from one another, alike on all ranks."""
        if run is not None and (not isinstance(run, str) or not 0 < len(run) <= 128):
            raise InvalidRequest(f"run={run!r}: it is a name of 1 to 128 characters")
        self._kind = kind
        self._own = new_random_name()
        self._name = "" if run is None else f"run {run}, loader {kind}"
        self._pid = os.getpid()

    def find(self, num_ranks: int) -> str:
        """The name. InvalidRequest if several ranks have nothing that they could agree by."""
        if not self._name:
            if num_ranks == 1:
                return f"loader {self._own}"
            if not self.look_early():
                raise InvalidRequest(
                    f'follow="latest" on {num_ranks} ranks: they have to agree on the version of '
                    "each epoch, and share neither torch.distributed (initialise it before the "
                    "loader is made) nor a name: give all of them the same run=, another one for "
                    "each training that starts from the beginning"
                )
        return self._name

    def look_early(self) -> bool:
        """Take the name from torch.distributed if that is there; whether there is a name.

        Before the first iteration for workers, which are forked and may not use its store.
        """
        if self._name:
            return True
        store = _store_of_torch() if self._pid == os.getpid() else None
        if store is None:
            return False
        agreed = store.compare_set(_KEY, "", self._own)
        self._name = f"job {agreed.decode()}, loader {self._kind}"
        return True


def _store_of_torch() -> Any:
    """The store that all processes of the job share; None without a process group."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    if distributed.get_world_size() == 1:
        return None
    return distributed.distributed_c10d._get_default_store()
