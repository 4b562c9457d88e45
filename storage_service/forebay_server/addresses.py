"""Where the daemon listens on TCP."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True)
class Address:
    """Where to listen on TCP."""

    scheme: str
    host: str
    port: int
    """0: any free one."""
    tls: bool

    @property
    def is_loopback(self) -> bool:
        return self.host == "localhost" or _is_address(self.host, "is_loopback")

    @property
    def is_wildcard(self) -> bool:
        return _is_address(self.host, "is_unspecified")

    @property
    def target(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self, port: int, host: str = "") -> str:
        """The URL of the port that was bound, with *host* in the place of a wildcard."""
        bound = Address(self.scheme, host if self.is_wildcard else self.host, port, self.tls)
        return f"{self.scheme}://{bound.target}"


def _is_address(host: str, attribute: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(host), attribute))
    except ValueError:
        return False


def parse_address(text: str, option: str, plain: str, secure: str) -> Address:
    """The address of ``HOST:PORT``, ``[V6]:PORT`` or either after ``plain://`` or ``secure://``."""
    match = re.fullmatch(r"(?:([a-z]+)://)?(?:\[([0-9a-fA-F:.]+)\]|([^:/\[\]]+)):(\d+)/?", text)
    scheme = (match[1] or plain) if match else ""
    if match is None or scheme not in (plain, secure) or int(match[4]) > 65535:
        raise InvalidRequest(
            f"{option} = {text!r} is no address: write {plain}://HOST:PORT, as in "
            f"{plain}://127.0.0.1:7070 or {plain}://[::1]:7070"
        )
    return Address(scheme, match[2] or match[3], int(match[4]), tls=scheme == secure)
