"""Tokens, which say who is calling, and tickets, which open one blob or slot for a short time.

Both are signed with the daemon's secret key, so that they outlive its restart. Neither is ever
logged.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from forebay_wire.errors import PermissionDenied, Unauthenticated

TICKET_SECONDS: Final = 300.0
"""How long a ticket opens; a client renews it by asking again."""

KEY_BYTES: Final = 32

Method = Literal["GET", "PUT"]


@dataclass(frozen=True)
class Ticket:
    """What one ticket allows."""

    method: Method
    uid: int
    client: str
    """Under whose name blobs are held open."""
    blob: str | None
    session: str | None
    start: int
    """First byte of the blob or slot that may be touched."""
    stop: int
    """The byte after the last one."""


class Auth:
    """Gives and checks tokens and tickets. Thread-safe: it holds no state."""

    def __init__(self, secret: bytes, node: str, clock: Callable[[], float] = time.time) -> None:
        """*secret* has :data:`KEY_BYTES`; *clock* answers seconds since 1970."""
        self._secret = secret
        self._node = node
        self._clock = clock
        self._key_id = hashlib.sha256(b"forebay key id|" + secret).hexdigest()[:16]

    def token(self, uid: int) -> str:
        """The token of user *uid*; the same every time."""
        return f"v1.{uid}.{self._sign(f'token|v1|{uid}')}"

    def check_token(self, text: str) -> int:
        """The uid whose token *text* is. :class:`Unauthenticated` otherwise."""
        version, _, rest = text.partition(".")
        uid, _, signature = rest.partition(".")
        known = version == "v1" and uid.isascii() and uid.isdigit()
        if not known or not self._same(signature, self._sign(f"token|v1|{uid}")):
            raise Unauthenticated(
                "no token of this daemon: on its host connect by folder or Unix socket, elsewhere "
                "pass the token that lies in its data folder"
            )
        return int(uid)

    def ticket(
        self,
        method: Method,
        *,
        uid: int,
        start: int = 0,
        stop: int,
        blob: str | None = None,
        session: str | None = None,
        client: str = "",
        lifetime_seconds: float = TICKET_SECONDS,
    ) -> str:
        """A ticket for the bytes [start, stop) of *blob* (GET) or of *session*'s slot (PUT)."""
        body = {
            "k": self._key_id,
            "m": method,
            "n": self._node,
            "u": uid,
            "c": client,
            "r": [start, stop],
            "e": round(self._clock() + lifetime_seconds, 3),
            **({"b": blob} if blob is not None else {}),
            **({"s": session} if session is not None else {}),
        }
        payload = base64.urlsafe_b64encode(json.dumps(body, separators=(",", ":")).encode())
        text = payload.decode().rstrip("=")
        return f"{text}.{self._sign(f'ticket|v1|{text}')}"

    def check_ticket(self, text: str, method: Method) -> Ticket:
        """What *text* allows.

        :class:`Unauthenticated` if this daemon did not give it or it is over,
        :class:`PermissionDenied` if it is for another method.
        """
        payload, _, signature = text.partition(".")
        if not self._same(signature, self._sign(f"ticket|v1|{payload}")):
            raise Unauthenticated("no ticket of this daemon: open the blob again")
        body: dict[str, Any] = json.loads(
            base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        )
        if body["k"] != self._key_id or body["n"] != self._node:
            raise Unauthenticated("the ticket is another node's: open the blob again")
        if self._clock() > body["e"]:
            raise Unauthenticated("the ticket is over: open the blob again")
        if body["m"] != method:
            raise PermissionDenied(f"the ticket is for {body['m']}, not for {method}")
        return Ticket(
            method=method,
            uid=body["u"],
            client=body["c"],
            blob=body.get("b"),
            session=body.get("s"),
            start=body["r"][0],
            stop=body["r"][1],
        )

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    @staticmethod
    def _same(given: str, expected: str) -> bool:
        # compare_digest refuses text that is not ASCII; bytes compare whatever was sent.
        return hmac.compare_digest(given.encode(errors="replace"), expected.encode())
