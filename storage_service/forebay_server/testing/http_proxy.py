"""An HTTP proxy that misbehaves on demand: real sockets between a client and a real server."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self
from urllib.parse import parse_qsl, quote, urlsplit

FaultKind = Literal["answer", "answer after", "cut request", "cut answer"]

_PIECE_BYTES: Final = 64 * 1024
_HEAD_END: Final = b"\r\n\r\n"
_MAX_HEAD_BYTES: Final = 64 * 1024
_IDLE_SECONDS: Final = 60.0


@dataclass
class Fault:
    """What happens to the next *times* requests that match."""

    kind: FaultKind
    """``answer``: the server never sees the request; ``answer after``: it does, and its good answer
    is replaced; ``cut request``, ``cut answer``: the connection breaks after *num_bytes* of the
    body."""
    method: str = ""
    contains: str = ""
    """A part of the path with its query."""
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    num_bytes: int = 0

    def matches(self, request: _Message) -> bool:
        is_method = self.method in ("", request.method)
        return self.times > 0 and is_method and self.contains in request.target


class FaultyProxy:
    """Listens on a free port and passes requests on to *upstream*, except for its faults.

    A context manager. Every connection has two threads' worth of work in one thread: a request goes
    up, its answer comes down. Thread-safe.
    """

    def __init__(self, upstream: str) -> None:
        """*upstream*: ``http://host:port``."""
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.latency_seconds = 0.0
        """Every request waits so long before it is passed on."""
        self.ignores_conditions: tuple[str, str] | None = None
        """Key id and secret: requests go on without ``If-None-Match``, signed again with these."""
        self.ignores_in = ("PUT", "POST")
        """The methods of those requests: POST completes uploads in parts."""
        self.most_at_once = 0
        """Requests that were on their way together."""
        self._num_now = 0
        self.requests: list[str] = []
        """``METHOD target`` of all requests that came, faulty ones included."""
        self.agents: list[str] = []
        """The clients that sent them, by their own words."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def fail(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """No faults any more."""
        with self._lock:
            self._faults.clear()
        self.latency_seconds = 0.0

    def count(self, method: str, contains: str = "") -> int:
        """How many such requests came."""
        with self._lock:
            return sum(one.startswith(f"{method} ") and contains in one for one in self.requests)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """One connection of a client, with one of its own to the server."""
        with client, suppress(OSError):
            client.settimeout(_IDLE_SECONDS)
            with socket.create_connection(self._upstream, timeout=_IDLE_SECONDS) as server:
                with self._lock:
                    self._open |= {client, server}
                try:
                    down, up = _Stream(client), _Stream(server)
                    while self._exchange(down, up):
                        pass
                finally:
                    with self._lock:
                        self._open -= {client, server}

    def _exchange(self, down: _Stream, up: _Stream) -> bool:
        """One request and its answer; False when the connection ends with it."""
        request = down.read_head()
        if request is None:
            return False
        with self._counted():
            return self._pass_on(request, down, up)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._num_now += 1
            self.most_at_once = max(self.most_at_once, self._num_now)
        try:
            yield
        finally:
            with self._lock:
                self._num_now -= 1

    def _pass_on(self, request: _Message, down: _Stream, up: _Stream) -> bool:
        fault = self._take_fault(request)
        if self.ignores_conditions is not None and request.method in self.ignores_in:
            request.drop_condition(*self.ignores_conditions)
        time.sleep(self.latency_seconds)
        if request.expects_continue:
            down.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is not None and fault.kind == "cut request":
            up.send(request.head)
            down.pass_body(request, up, limit=fault.num_bytes)
            return False
        if fault is not None and fault.kind == "answer":
            down.pass_body(request, None)
            down.send(_answer(fault, request))
            return True
        up.send(request.head)
        down.pass_body(request, up)
        return self._pass_answer(request, fault, down, up)

    def _pass_answer(
        self, request: _Message, fault: Fault | None, down: _Stream, up: _Stream
    ) -> bool:
        answer = up.read_head()
        if answer is None:
            return False
        answer.has_body = request.method != "HEAD" and answer.status not in (204, 304)
        if fault is not None and fault.kind == "answer after" and answer.status < 300:
            up.pass_body(answer, None)
            down.send(_answer(fault, request))
            return True
        down.send(answer.head)
        if fault is not None and fault.kind == "cut answer":
            up.pass_body(answer, down, limit=fault.num_bytes)
            return False
        up.pass_body(answer, down)
        return True

    def _take_fault(self, request: _Message) -> Fault | None:
        with self._lock:
            self.requests.append(f"{request.method} {request.target}")
            self.agents.append(request.agent)
            fault = next((one for one in self._faults if one.matches(request)), None)
            if fault is not None:
                fault.times -= 1
            return fault


class _Message:
    """The head of a request or an answer."""

    def __init__(self, head: bytes) -> None:
        lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        words = lines[0].split(" ")
        self.method, self.target = words[0], words[1]
        self.status = int(words[1]) if words[1].isdecimal() else 0
        named = dict(line.split(":", 1) for line in lines[1:])
        self._headers = {name.lower(): value.strip() for name, value in named.items()}
        self.has_body = True
        self.expects_continue = "expect" in self._headers
        kept = [line for line in lines if not line.lower().startswith("expect:")]
        self.head = "\r\n".join(kept).encode("latin-1") + _HEAD_END

    @property
    def agent(self) -> str:
        """What the client calls itself."""
        return self._headers.get("user-agent", "")

    def drop_condition(self, key: str, secret: str) -> None:
        """Take ``If-None-Match`` out of a request of S3, and sign what is left."""
        if self._headers.pop("if-none-match", None) is None:
            return
        scope = re.search(r"Credential=[^/]+/([^,]+)", self._headers["authorization"])
        signed = re.search(r"SignedHeaders=([^,]+)", self._headers["authorization"])
        assert scope is not None, "signed as S3 has it since 2012"
        assert signed is not None
        names = [one for one in signed[1].split(";") if one != "if-none-match"]
        self._headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={key}/{scope[1]}, SignedHeaders={';'.join(names)}, "
            f"Signature={self._signature(names, scope[1], secret)}"
        )
        lines = [f"{name}: {value}" for name, value in self._headers.items() if name != "expect"]
        first = f"{self.method} {self.target} HTTP/1.1"
        self.head = "\r\n".join([first, *lines]).encode("latin-1") + _HEAD_END

    def _signature(self, names: list[str], scope: str, secret: str) -> str:
        url = urlsplit(self.target)
        query = sorted(parse_qsl(url.query, keep_blank_values=True))
        canonical = [
            self.method,
            url.path,
            "&".join(f"{quote(name, '')}={quote(value, '')}" for name, value in query),
            *(f"{name}:{self._headers[name]}" for name in names),
            "",
            ";".join(names),
            self._headers["x-amz-content-sha256"],
        ]
        digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
        text = "\n".join(["AWS4-HMAC-SHA256", self._headers["x-amz-date"], scope, digest])
        signing = f"AWS4{secret}".encode()
        for word in [*scope.split("/"), text]:
            signing = hmac.digest(signing, word.encode(), "sha256")
        return signing.hex()

    @property
    def is_chunked(self) -> bool:
        return self._headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def num_bytes(self) -> int:
        return int(self._headers.get("content-length", 0)) if self.has_body else 0


class _Stream:
    """A socket with what was read too much from it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read_head(self) -> _Message | None:
        """None where the other side is done. Interim answers (100) are passed over."""
        while True:
            while _HEAD_END not in self._rest:
                data = self._socket.recv(_PIECE_BYTES)
                if not data or len(self._rest) > _MAX_HEAD_BYTES:
                    return None
                self._rest += data
            head, _, self._rest = self._rest.partition(_HEAD_END)
            message = _Message(head + _HEAD_END)
            if message.status != 100:
                return message

    def pass_body(self, message: _Message, target: _Stream | None, limit: int = -1) -> None:
        """Send the body of *message* to *target* (None: nowhere), at most *limit* bytes of it."""
        if message.has_body and message.is_chunked:
            self._pass_chunks(target)
            return
        left = message.num_bytes if limit < 0 else min(limit, message.num_bytes)
        while left:
            piece = self._read(min(left, _PIECE_BYTES))
            left -= len(piece)
            if target is not None:
                target.send(piece)

    def _pass_chunks(self, target: _Stream | None) -> None:
        while True:
            line = b""
            while not line.endswith(b"\r\n"):
                line += self._read(1)
            num_bytes = int(line.split(b";")[0], 16)
            chunk = line
            while len(chunk) < len(line) + num_bytes + 2:
                chunk += self._read(len(line) + num_bytes + 2 - len(chunk))
            if target is not None:
                target.send(chunk)
            if num_bytes == 0:
                return

    def _read(self, num_bytes: int) -> bytes:
        if not self._rest:
            self._rest = self._socket.recv(_PIECE_BYTES)
            if not self._rest:
                raise ConnectionError("the other side has gone")
        piece, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return piece


def _answer(fault: Fault, request: _Message) -> bytes:
    text = (
        f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>on demand</Message></Error>"
    )
    body = b"" if request.method == "HEAD" else text.encode()
    head = (
        f"HTTP/1.1 {fault.status} On Demand\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
