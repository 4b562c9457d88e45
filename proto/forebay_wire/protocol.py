"""The version handshake and the addresses that travel with a connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from forebay_wire.errors import VersionMismatch

PROTOCOL: Final = 1
"""The protocol that this build speaks."""

OLDEST_PROTOCOL: Final = 1
"""The oldest protocol that this build still understands."""

PROTOCOL_METADATA: Final = "forebay-protocol"
"""gRPC metadata key: ``OLDEST-NEWEST`` of the caller."""

TOKEN_METADATA: Final = "authorization"
"""gRPC metadata key: ``Bearer TOKEN``."""

ERROR_METADATA: Final = "forebay-error"
"""gRPC trailing metadata key: the name of the exception (see ``forebay_wire.errors``)."""

WAITS_HEADER: Final = "Forebay-Waits"
"""Header of an answer whose bytes come as they arrive: the name by which ``/v1/waits`` tells what
it waited for, once the bytes are there."""

RPC_SOCKET_NAME: Final = "rpc.sock"
DESCRIPTOR_SOCKET_NAME: Final = "data.sock"
"""Both sockets of a daemon lie in one folder of mode 0700."""

ADDRESS_FILE_NAME: Final = "daemon.json"
LOCK_FILE_NAME: Final = "lock"
"""In the data folder: addresses of the running daemon; the flock that makes it the only one."""


def protocol_range() -> str:
    """What this build offers, as sent in :data:`PROTOCOL_METADATA`."""
    return f"{OLDEST_PROTOCOL}-{PROTOCOL}"


def agree(offered: str, ours: str, *, caller: str, here: str) -> int:
    """The newest protocol in both ranges (``OLDEST-NEWEST`` each).

    Raises :class:`VersionMismatch` with a sentence that says which side to upgrade.
    """
    try:
        low, high = (int(part) for part in offered.split("-"))
        our_low, our_high = (int(part) for part in ours.split("-"))
    except ValueError as error:
        raise VersionMismatch(
            f"{caller} sent no protocol version ({offered!r}); is it a Forebay {caller}?"
        ) from error
    if high < our_low:
        raise VersionMismatch(
            f"the {caller} speaks protocol {low}-{high}, the {here} {our_low}-{our_high}: "
            f"upgrade the {caller} (pip install -U forebay)"
        )
    if low > our_high:
        raise VersionMismatch(
            f"the {caller} speaks protocol {low}-{high}, the {here} {our_low}-{our_high}: "
            f"upgrade the {here} (pip install -U forebay) and restart it"
        )
    return min(high, our_high)


@dataclass(frozen=True)
class DataEndpoint:
    """How a process reaches a daemon's bytes: small, picklable, free of gRPC.

    It travels with a dataset object into DataLoader workers.
    """

    descriptor_socket: str | None
    """Path of the descriptor socket, None where the local path is off or elsewhere."""
    http_url: str
    """``http://host:port`` of the range endpoint."""
    token: str
    incarnation: str
    """Random name of this start of the daemon."""
