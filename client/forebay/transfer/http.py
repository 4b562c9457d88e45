"""Plain HTTP/1.1 to a daemon's byte endpoint: persistent connections that a fork drops."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from forebay.forking import watch
from forebay_wire.errors import HTTP_STATUS, ForebayError, InvalidRequest, rebuild
from forebay_wire.limits import MIB

IDLE_SECONDS: Final = 60.0
"""Longest wait for a single receive or send before the connection counts as dead."""

SEND_BYTES: Final = 4 * MIB
"""One send: Python's socket timeout is for all of a sendall."""

CA_VARIABLE: Final = "FOREBAY_TLS_CA"
"""A file of certificates to trust for grpcs:// and https:// addresses, beside the system's."""

_STATUS_NAMES: Final = {code: name for name, code in reversed(HTTP_STATUS.items())}

Result = TypeVar("Result")


class Refused(Exception):
    """The daemon answered with an error; kept apart from a connection that broke."""

    def __init__(self, error: ForebayError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class HttpRequest:
    """One request; the body's bytes are sent from where they lie."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: memoryview | None = None


class HttpPool:
    """Connections to one URL, as many as threads use at a time. Thread-safe, fork-safe."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"the byte endpoint {url!r} is no http:// or https:// URL")
        self.url = url
        self._host = parts.hostname
        self._port = parts.port
        self._is_tls = parts.scheme == "https"
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        watch(self)
        weakref.finalize(self, _close_all, self._idle)

    def exchange(
        self, request: HttpRequest, read: Callable[[http.client.HTTPResponse], Result]
    ) -> Result:
        """Send *request*, and *read* a good answer.

        Raises :class:`Refused` for an error of the daemon; OSError or HTTPException if the
        connection broke.
        """
        with self._lock:
            connection = self._idle.pop() if self._idle else self._new()
        try:
            _send(connection, request)
            response = connection.getresponse()
            if response.status >= 400:
                raise Refused(_refusal(response))
            result = read(response)
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)
        return result

    def close(self) -> None:
        """Close idle connections; a later exchange makes new ones."""
        with self._lock:
            _close_all(self._idle)

    def forget_parent(self) -> None:
        """In a child of fork: the parent goes on using these sockets."""
        self._lock = threading.Lock()
        _close_all(self._idle)

    def _new(self) -> http.client.HTTPConnection:
        if not self._is_tls:
            return http.client.HTTPConnection(self._host, self._port, timeout=IDLE_SECONDS)
        context = ssl.create_default_context()
        if os.environ.get(CA_VARIABLE):
            context.load_verify_locations(os.environ[CA_VARIABLE])
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=IDLE_SECONDS, context=context
        )


def json_request(path: str, body: Mapping[str, Any], token: str) -> HttpRequest:
    """A POST of *body* by the holder of *token*."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return HttpRequest("POST", path, headers, memoryview(json.dumps(body).encode()))


def read_json(response: http.client.HTTPResponse) -> dict[str, Any]:
    """The JSON object of an answer."""
    found = json.loads(response.read())
    if not isinstance(found, dict):
        raise http.client.HTTPException("the answer is no JSON object")
    return found


def read_exactly(response: http.client.HTTPResponse, target: memoryview) -> None:
    """Fill *target* from the answer's body, without a copy in between."""
    done = 0
    while done < len(target):
        count = response.readinto(target[done:])
        if count == 0:
            raise http.client.IncompleteRead(b"", len(target) - done)
        done += count


def _send(connection: http.client.HTTPConnection, request: HttpRequest) -> None:
    connection.putrequest(request.method, request.path, skip_accept_encoding=True)
    for name, value in request.headers.items():
        connection.putheader(name, value)
    body = request.body
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    if body is not None:
        for start in range(0, len(body), SEND_BYTES):
            connection.send(body[start : start + SEND_BYTES])


def _refusal(response: http.client.HTTPResponse) -> ForebayError:
    status = _STATUS_NAMES.get(response.status, "UNKNOWN")
    text = response.read(65536).decode(errors="replace")
    try:
        body = json.loads(text)
        return rebuild(str(body["error"]), status, str(body["message"]))
    except (ValueError, KeyError, TypeError):
        return rebuild(None, status, f"HTTP {response.status} {response.reason}: {text[:200]}")


def _close_all(connections: list[http.client.HTTPConnection]) -> None:
    while connections:
        connections.pop().close()
