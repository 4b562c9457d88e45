"""Reads of S3 objects over plain sockets: by the kernel into the reader's buffer, without the GIL.

The S3 client knows where the bucket is and who we are; what it reads passes through its event loop
in small ``bytes``, copied once more by it and once by us. Here the kernel copies into the buffer
that the caller gave, and requests are signed by the thread that makes them.
"""

from __future__ import annotations

import http.client
import io
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from botocore.httpsession import get_cert_path

from forebay_server.tier.s3_faults import kind_of
from forebay_server.tier.s3_options import CONNECT_SECONDS, MAX_CONNECTIONS, READ_SECONDS
from forebay_server.tier.store_client import StoreFault

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AGENT: Final = "forebay"
"""What we are called in the logs of the store."""

CREDENTIALS_SECONDS: Final = 60.0
"""Credentials that expire are renewed ten minutes before, by who keeps them."""

IDLE_SECONDS: Final = 20.0
"""A connection that was idle for longer is not used again: servers drop them after some time."""

HEADER_BYTES: Final = 16384
"""What is read at once while the headers of an answer come."""

_ERROR_BYTES: Final = 64 * 1024
"""The most that is read of an answer that says what is wrong."""


class Elsewhere(Exception):
    """An answer that only the S3 client understands: a redirect to another region, for one."""


class Denied(Elsewhere):
    """An answer that other credentials may change."""


@dataclass(frozen=True)
class Got:
    """What a ranged read brought."""

    num_bytes: int
    size_bytes: int
    """Of the whole object."""
    headers: Mapping[str, str]
    """By lower-case names."""


class Signer:
    """Signs GETs of one bucket's objects as its S3 client would. Thread-safe."""

    def __init__(
        self, base_url: str, region: str, credentials: Callable[[], ReadOnlyCredentials]
    ) -> None:
        """*base_url* and a key make an address; *credentials* may block, and is asked again every
        :data:`CREDENTIALS_SECONDS`, long before any that it gave expire."""
        self._base_url = base_url
        self._region = region
        self._find = credentials
        self._lock = threading.Lock()
        self._known: tuple[float, ReadOnlyCredentials] | None = None

    def sign(self, key: str, headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
        """Where to read *key*, and *headers* with the signature."""
        url = self._base_url + quote(key, safe="/~")
        request = AWSRequest("GET", url, headers={"User-Agent": AGENT, **headers})
        request.context["payload_signing_enabled"] = False
        S3SigV4Auth(self._credentials(), "s3", self._region).add_auth(request)
        return url, dict(request.headers.items())

    def _credentials(self) -> ReadOnlyCredentials:
        with self._lock:
            if self._known is None or self._known[0] < time.monotonic() - CREDENTIALS_SECONDS:
                self._known = (time.monotonic(), self._find())
            return self._known[1]

    def forget(self) -> None:
        """Ask for the credentials again: the store did not take what they signed."""
        with self._lock:
            self._known = None


class SocketReads:
    """Kept-alive connections to one endpoint. Thread-safe; a call blocks its thread."""

    def __init__(self, is_tls: bool, ca_file: str | None) -> None:
        """Trusts the authorities of *ca_file*, by default those that botocore trusts; ``OSError``
        if they cannot be read."""
        self._context: ssl.SSLContext | None = None
        if is_tls:
            self._context = ssl.create_default_context(cafile=ca_file or get_cert_path(True))
        self._lock = threading.Lock()
        self._idle: list[tuple[float, str, _Connection]] = []
        """The one that was used last is at the end."""
        self._is_closed = False
        self._paused_until = 0.0

    def close(self) -> None:
        """Close what is idle; what is in use is closed after that. Idempotent."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for _, _, connection in idle:
            connection.close()

    def pause(self, seconds: float) -> bool:
        """Keep no connection, and be :attr:`is_paused`, for *seconds*; False: we are already."""
        with self._lock:
            if self.is_paused:
                return False
            self._paused_until = time.monotonic() + seconds
            idle, self._idle = self._idle, []
        for _, _, connection in idle:
            connection.close()
        return True

    @property
    def is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def read(
        self,
        url: str,
        headers: Mapping[str, str],
        first: int | None,
        view: memoryview,
        seconds: float,
    ) -> Got:
        """Fill *view* with what the ranged GET of *url* with *headers* answers, within *seconds*.

        The range has the size of *view* and begins at byte *first*; None: it is the object's end.
        :class:`StoreFault` as for all calls of a client, with the bytes that have come;
        :class:`Elsewhere`.
        """
        parts = urlsplit(url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        deadline = time.monotonic() + seconds
        progress = _Progress()
        connection = self._take(parts.netloc, deadline)
        try:
            try:
                response = connection.ask(target, headers, deadline)
            except ConnectionError:
                if not connection.is_reused:
                    raise
                connection.close()  # the server had closed it, which is its right
                connection = self._connect(parts.netloc, deadline)
                response = connection.ask(target, headers, deadline)
            got = _receive(response, first, view, progress)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise StoreFault("busy", text, progress.num_bytes) from error
        except BaseException:
            connection.close()
            raise
        self._give_back(parts.netloc, connection)
        return got

    def _take(self, netloc: str, deadline: float) -> _Connection:
        oldest = time.monotonic() - IDLE_SECONDS
        stale: list[_Connection] = []
        found: _Connection | None = None
        with self._lock:
            while self._idle and found is None:
                since, host, connection = self._idle.pop()
                if since < oldest or host != netloc:
                    stale.append(connection)
                else:
                    found = connection
        for connection in stale:
            connection.close()
        return found or self._connect(netloc, deadline)

    def _connect(self, netloc: str, deadline: float) -> _Connection:
        try:
            return _Connection(netloc, self._context, deadline)
        except ssl.SSLCertVerificationError as error:
            raise Elsewhere(f"{error} ({netloc})") from error  # which says what to do about it
        except OSError as error:
            raise StoreFault("busy", f"{type(error).__name__}: {error} ({netloc})") from error

    def _give_back(self, netloc: str, connection: _Connection) -> None:
        connection.is_reused = True
        now = time.monotonic()
        leaving: list[_Connection] = []
        with self._lock:
            while self._idle and self._idle[0][0] < now - IDLE_SECONDS:
                leaving.append(self._idle.pop(0)[2])
            is_kept = connection.is_open and not self._is_closed and not self.is_paused
            if is_kept and len(self._idle) < MAX_CONNECTIONS:
                self._idle.append((now, netloc, connection))
            else:
                leaving.append(connection)
        for one in leaving:
            one.close()


@dataclass
class _Progress:
    num_bytes: int = 0


class _Connection:
    """One HTTP/1.1 connection, used by one thread at a time."""

    def __init__(self, netloc: str, context: ssl.SSLContext | None, deadline: float) -> None:
        seconds = min(CONNECT_SECONDS, max(0.001, deadline - time.monotonic()))
        if context is not None:
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                netloc, timeout=seconds, context=context
            )
        else:
            self._http = http.client.HTTPConnection(netloc, timeout=seconds)
        self._http.auto_open = 0
        self._http.connect()
        self.is_reused = False

    @property
    def is_open(self) -> bool:
        """Whether another request may follow: the server has not said that it closes."""
        return self._http.sock is not None

    def ask(
        self, target: str, headers: Mapping[str, str], deadline: float
    ) -> http.client.HTTPResponse:
        """Send a GET; its answer, of which the headers have come."""
        self._http.response_class = partial(_Response, deadline=deadline)  # type: ignore[assignment]
        self._http.sock.settimeout(READ_SECONDS)
        self._http.request("GET", target, headers=dict(headers))
        return self._http.getresponse()

    def close(self) -> None:
        self._http.close()


class _Response(http.client.HTTPResponse):
    """Reads from a socket until a deadline."""

    def __init__(self, sock: socket.socket, *arguments: Any, deadline: float, **named: Any) -> None:
        super().__init__(_TimedSocket(sock, deadline), *arguments, **named)  # type: ignore[arg-type]


@dataclass
class _TimedSocket:
    """What an answer is read from, as :mod:`http.client` asks for it."""

    sock: socket.socket
    deadline: float

    def makefile(self, mode: str) -> io.BufferedReader:
        # The raw file keeps the socket open, also after the connection has let go of it.
        raw = self.sock.makefile("rb", buffering=0)
        return io.BufferedReader(_TimedBytes(raw, self.sock, self.deadline), HEADER_BYTES)


class _TimedBytes(io.RawIOBase):
    """The bytes of a socket; each wait ends by the deadline."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._raw = raw  # only kept open
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        left = self._deadline - time.monotonic()
        if left < READ_SECONDS:
            if left <= 0:
                raise TimeoutError("the answer took too long")
            self._sock.settimeout(left)
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def got_of(status: int, headers: Mapping[str, str], first: int | None, limit: int) -> Got:
    """What an answer brings to a read of *limit* bytes from *first* (None: of the object's end).

    :class:`StoreFault` ``misconfigured`` if by its *headers* it is another than was asked for: a
    store that knows no ranges sends all, for one.
    """
    told = headers.get("content-range") or ""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
    if status != HTTPStatus.PARTIAL_CONTENT or found is None or headers.get("content-encoding"):
        raise StoreFault(
            "misconfigured", f"a ranged GetObject was answered {status} with range {told!r}"
        )
    begin, last, size = (int(one) for one in found.groups())
    num_bytes = last - begin + 1
    if first is None:
        is_asked = last == size - 1 and num_bytes == min(size, limit)
    else:
        is_asked = begin == first and begin <= last < size and num_bytes <= limit
    if not is_asked or headers.get("content-length") != str(num_bytes):
        asked = f"the last {limit} bytes" if first is None else f"{limit} bytes from {first}"
        raise StoreFault(
            "misconfigured",
            f"a GetObject of {asked} was answered with range {told!r} and "
            f"{headers.get('content-length')} bytes",
        )
    return Got(num_bytes, size, headers)


def _receive(
    response: http.client.HTTPResponse, first: int | None, view: memoryview, progress: _Progress
) -> Got:
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        raise _refusal(response)
    headers = {name.lower(): value for name, value in response.getheaders()}
    try:
        got = got_of(response.status, headers, first, view.nbytes)
    except StoreFault as fault:
        raise Elsewhere(fault.text) from None
    if response.chunked:
        raise Elsewhere("a ranged GetObject was answered in chunks")
    _fill(response.fp, view[: got.num_bytes], progress)
    response.length = 0
    response.read()  # nothing: the connection knows now that the answer has ended
    return got


def _fill(stream: io.BufferedReader, view: memoryview, progress: _Progress) -> None:
    """Fill *view* with what came after the headers, then from the socket.

    A read of the stream itself that fails would lose count of what it had read until then.
    """
    begun = stream.peek()[: view.nbytes]
    view[: len(begun)] = begun
    progress.num_bytes = len(begun)
    while progress.num_bytes < view.nbytes:
        num_bytes = stream.raw.readinto(view[progress.num_bytes :])
        if not num_bytes:
            raise http.client.IncompleteRead(b"", view.nbytes - progress.num_bytes)
        progress.num_bytes += num_bytes


def _refusal(response: http.client.HTTPResponse) -> Exception:
    """What an answer without the bytes means."""
    body = b""
    with suppress(OSError, http.client.HTTPException):
        body = response.read(_ERROR_BYTES)
    text = body.decode(errors="replace")
    code, message = _tag("Code", text), _tag("Message", text)
    status = response.status
    kind = kind_of(code, status)
    if kind == "denied":
        return Denied(f"GetObject was answered {status} {code}")
    is_unclear = status == HTTPStatus.BAD_REQUEST and kind == "refused"
    if status < HTTPStatus.BAD_REQUEST or is_unclear or kind == "misconfigured":
        return Elsewhere(f"GetObject was answered {status} {code}")
    told = f"GetObject was answered {status} {code}: {message or 'no reason given'}"
    return StoreFault(kind, told)


def _tag(name: str, text: str) -> str:
    found = re.search(rf"<{name}>([^<]*)</{name}>", text)
    return found.group(1) if found is not None else ""


def goes_by_proxy(url: str) -> bool:
    """Whether this process is to reach *url* through a proxy, by its environment."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    if parts.scheme not in proxies and "all" not in proxies:
        return False
    return not urllib.request.proxy_bypass(parts.netloc)
