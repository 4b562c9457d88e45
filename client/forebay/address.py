"""Where a daemon is: the forms of an address, and what has to be known to call it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from forebay_wire.errors import InvalidRequest
from forebay_wire.protocol import DESCRIPTOR_SOCKET_NAME

ADDRESS_VARIABLE: Final = "FOREBAY_ADDRESS"
DATA_VARIABLE: Final = "FOREBAY_DATA"
TOKEN_VARIABLE: Final = "FOREBAY_TOKEN"
TOKEN_FILE_VARIABLE: Final = "FOREBAY_TOKEN_FILE"
DEFAULT_DATA_FOLDER: Final = "data"

FORMS: Final = (
    'a data folder ("data/"), a Unix socket ("unix:/run/…/rpc.sock"), or a host and port '
    '("grpc://host:7070", with TLS "grpcs://host:7070")'
)


@dataclass(frozen=True)
class FolderAddress:
    """A data folder on this host; its daemon is started if none runs."""

    folder: Path
    may_start: bool = True

    def __str__(self) -> str:
        return f"data folder {self.folder}"


@dataclass(frozen=True)
class SocketAddress:
    """The gRPC socket of a daemon on this host; its descriptor socket lies beside it."""

    path: Path

    @property
    def descriptor_socket(self) -> Path:
        return self.path.with_name(DESCRIPTOR_SOCKET_NAME)

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A daemon elsewhere, or one on this host that shares no socket with us."""

    host: str
    port: int
    is_tls: bool
    token: str = ""

    @property
    def netloc(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'grpcs' if self.is_tls else 'grpc'}://{self.netloc}"


Address = FolderAddress | SocketAddress | TcpAddress


def parse_address(
    address: str | os.PathLike[str] | None,
    token: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Address:
    """The address that *address* means; None: what the environment says.

    That is ``$FOREBAY_ADDRESS``, else the data folder ``$FOREBAY_DATA`` or ``./data`` if its daemon
    runs already. *token* is for TCP; without one ``$FOREBAY_TOKEN``, else the file
    ``$FOREBAY_TOKEN_FILE``.
    """
    if address is None:
        address = environment.get(ADDRESS_VARIABLE) or None
    if address is None:
        folder = environment.get(DATA_VARIABLE) or DEFAULT_DATA_FOLDER
        return FolderAddress(Path(folder).absolute(), may_start=False)
    text = os.fspath(address)
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/"):
            raise InvalidRequest(f"address {text!r} needs an absolute path: unix:/path/rpc.sock")
        return SocketAddress(Path(path))
    if "://" in text:
        return _parse_tcp(text, token, environment)
    if not text:
        raise InvalidRequest(f"the address is empty: give {FORMS}")
    return FolderAddress(Path(text).absolute())


def _parse_tcp(text: str, token: str | None, environment: Mapping[str, str]) -> TcpAddress:
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or not port or parts.path:
        raise InvalidRequest(f"address {text!r} is none of: {FORMS}")
    if token is None:
        token = environment.get(TOKEN_VARIABLE, "") or _token_of_file(environment)
    return TcpAddress(parts.hostname, port, parts.scheme == "grpcs", token.strip())


def _token_of_file(environment: Mapping[str, str]) -> str:
    name = environment.get(TOKEN_FILE_VARIABLE)
    if not name:
        return ""
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"${TOKEN_FILE_VARIABLE} names {name}: {error.strerror}") from error
