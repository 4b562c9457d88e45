"""Where the ranks of one start of a job meet: under a name that no earlier start has used.

torchrun keeps its store over restarts, and with it the addresses that dead ranks left there under
the names that new ranks use. No number that torchrun gives is new in every start and the same on
every node, so the ranks agree on one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final, Protocol

from forebay_wire.errors import DeadlineExceeded

POLL_SECONDS: Final = 0.01
NONCE_BYTES: Final = 8


class Keys(Protocol):
    """What is used of a store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


def meet(store: Keys, rank: int, num_ranks: int, timeout: timedelta) -> str:
    """The name of this start, the same on all ranks and never used before.

    Rank 0 offers a name; the others sign it, each with a number of its own; rank 0 countersigns.
    What an earlier start left can be offered again, but never countersigned for a new number.
    DeadlineExceeded if not all ranks come.
    """
    deadline = time.monotonic() + timeout.total_seconds()

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"not all {num_ranks} ranks have come to meet: see their logs"
                )
            time.sleep(POLL_SECONDS)

    mine = secrets.token_hex(NONCE_BYTES)
    if rank == 0:
        store.set("offered", mine)
        for other in range(1, num_ranks):
            until(lambda other=other: store.check([f"{mine}/signed/{other}"]))  # type: ignore[misc]
            store.set(f"{mine}/{store.get(f'{mine}/signed/{other}').decode()}", "countersigned")
        return mine
    name = ""

    def is_countersigned() -> bool:
        nonlocal name
        offered = store.get("offered").decode() if store.check(["offered"]) else ""
        if offered and offered != name:
            name = offered
            store.set(f"{name}/signed/{rank}", mine)
        return bool(name) and store.check([f"{name}/{mine}"])

    until(is_countersigned)
    return name
