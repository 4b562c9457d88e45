"""One connection to a descriptor socket: hello first, then requests and answers in order."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any, Final, Self

from forebay_wire.errors import DaemonUnavailable
from forebay_wire.handover import raise_if_error, receive_frame, send_frame
from forebay_wire.protocol import agree, protocol_range

HELLO_SECONDS: Final = 10.0
"""Longest wait for a daemon that accepted the connection to say hello."""

NAME: Final = "forebay"
"""How this kind of client calls itself in the daemon's status."""


@dataclass(frozen=True)
class Hello:
    """What a daemon tells the processes of its host."""

    node: str
    incarnation: str
    token: str
    http_url: str


class DescriptorConnection:
    """A connected descriptor socket. Not thread-safe; the owner closes it, which releases opens."""

    def __init__(self, path: str, sock: socket.socket) -> None:
        self.path = path
        self._socket = sock

    @classmethod
    def connect(cls, path: str, timeout: float = HELLO_SECONDS) -> tuple[Self, Hello]:
        """A connection and the daemon's hello, within *timeout* seconds.

        Raises DaemonUnavailable, VersionMismatch or PermissionDenied (another user's daemon).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection = cls(path, sock)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
            body = {
                "op": "hello",
                "protocol": protocol_range(),
                "pid": os.getpid(),
                "name": "client",
            }
            answer = raise_if_error(connection.request(body, timeout)[0])
            # A daemon that answers at all found a common protocol; this names a broken one early.
            agree(_as_range(answer["protocol"]), protocol_range(), caller="daemon", here="client")
        except OSError as error:
            connection.close()
            raise DaemonUnavailable(f"no daemon answers at {path}: {error}") from error
        except BaseException:
            connection.close()
            raise
        hello = Hello(
            str(answer["node"]),
            str(answer["incarnation"]),
            str(answer["token"]),
            str(answer["http_url"]),
        )
        return connection, hello

    def request(self, body: dict[str, Any], timeout: float) -> tuple[dict[str, Any], list[int]]:
        """The answer to *body* as it came, and its descriptors, which the caller closes.

        Any exception means that the connection broke and is of no more use.
        """
        self._socket.settimeout(timeout)
        send_frame(self._socket, body, [])
        return receive_frame(self._socket)

    def close(self) -> None:
        """Close this process's end; in a child of fork the parent's stays open."""
        self._socket.close()


def _as_range(protocol: object) -> str:
    """``OLDEST-NEWEST`` from what a daemon answered: that, or the one number it agreed to."""
    text = str(protocol)
    return text if "-" in text else f"{text}-{text}"
