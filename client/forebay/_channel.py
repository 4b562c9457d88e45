"""Control calls over gRPC: made lazily per process, with deadlines, retries and one error mapping.

The only module of the client that knows gRPC. What was forked off a process that has used it makes
its calls by a :mod:`relay <forebay._relay>`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from forebay._relay import Relay
from forebay.address import Address, FolderAddress, SocketAddress, TcpAddress
from forebay.daemon_folder import find_or_start, find_running, wait
from forebay.forking import watch
from forebay.methods import Admin, Method, Request, Response
from forebay.transfer.connection import DescriptorConnection
from forebay.transfer.endpoint import succeed_endpoint
from forebay.waiting import RECONNECT_SECONDS, Backoff, Deadline
from forebay_wire.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    ForebayError,
    InvalidRequest,
    Unauthenticated,
    VersionMismatch,
    rebuild,
)
from forebay_wire.limits import MAX_COMMIT_BYTES, MAX_MESSAGE_BYTES, check_limit
from forebay_wire.protocol import (
    ERROR_METADATA,
    PROTOCOL_METADATA,
    TOKEN_METADATA,
    DataEndpoint,
    protocol_range,
)
from forebay_wire.v1 import admin_pb2

# gRPC reads this once, while it is imported. Without it users get a line on standard error for
# every DataLoader worker that is forked ("skipping fork() handlers"); ours never use gRPC.
_VERBOSITY: Final = "GRPC_VERBOSITY"
_is_chosen: Final = _VERBOSITY in os.environ
os.environ.setdefault(_VERBOSITY, "ERROR")
import grpc  # noqa: E402 - after the variable

if not _is_chosen:
    del os.environ[_VERBOSITY]

Result = TypeVar("Result")

CALL_SECONDS: Final = 60.0
"""Deadline of a call that names none."""

CONNECT_SECONDS: Final = 30.0
HANDSHAKE_SECONDS: Final = 10.0

ATTACH_SECONDS: Final = 600.0
"""An Attach stream is opened anew so often: every network wait has an end."""

RESTART_GRACE_SECONDS: Final = 5.0
"""A folder's daemon that went away may be being restarted by whoever runs it: let them first."""

_FORK_WARNING: Final = (
    "this process was forked from one that is connected to a Forebay daemon, and makes control "
    "calls of its own: they go by way of another process. Reading data is not "
    "concerned; make control calls in the main process, or start this one by forkserver or spawn"
)

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_COMMIT_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # in truth the time that connecting may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_retries", 0),  # ours know what may be repeated and for how long
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
)


@dataclass(frozen=True)
class _Target:
    """Where to call, and what to show there."""

    grpc_target: str
    is_tls: bool
    token: str
    descriptor_socket: str | None


class _Live:
    """One open gRPC channel to one start of a daemon."""

    is_lost = False

    def __init__(self, target: _Target) -> None:
        self.target = target
        self.metadata = (
            (PROTOCOL_METADATA, protocol_range()),
            *(((TOKEN_METADATA, f"Bearer {target.token}"),) if target.token else ()),
        )
        self.channel = _open_grpc(target)
        self.calls: dict[str, Callable[..., Any]] = {}
        self.endpoint: DataEndpoint | None = None

    def invoke(
        self, method: Method[Request, Response], request: Request, seconds: float
    ) -> Response:
        found = self.calls.get(method.path)
        if found is None:
            found = self.channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            self.calls[method.path] = found
        response: Response = found(request, timeout=seconds, metadata=self.metadata)
        return response

    def close(self) -> None:
        self.channel.close()

    def stream(self, method: Method[Request, Response], request: Request, seconds: float) -> Any:
        call = self.channel.unary_stream(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        return call(request, timeout=seconds, metadata=self.metadata)


@dataclass
class _Held:
    """What has to be closed at the end; apart from the channel, so that the channel may die."""

    live: _Live | Relay | None = None
    attached: Any = None
    stop: threading.Event | None = None


class RpcChannel:
    """The control connection to one address. Thread-safe; fork-safe: a child connects anew.

    Calls that fail because the daemon is away are repeated with back-off until their deadline, at
    most 60 s of absence: all calls of the wire may be repeated.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._held = _Held()
        self._opening: Deadline | None = None
        self._is_closed = False
        self._is_reconnect = False
        self._endpoint: DataEndpoint | None = None
        self._attacher: threading.Thread | None = None
        watch(self)
        weakref.finalize(self, _release, self._held)

    @property
    def endpoint(self) -> DataEndpoint | None:
        """Where the daemon's bytes are, as of the last handshake; None before the first."""
        live = self._held.live
        return self._endpoint if live is None else live.endpoint

    def connect(self, timeout: float = CONNECT_SECONDS, *, may_start: bool = True) -> DataEndpoint:
        """Connect and shake hands unless done; the endpoint of the daemon's bytes. With *may_start*
        the daemon of a folder is started if need be.

        Raises DaemonUnavailable within *timeout* seconds, VersionMismatch, Unauthenticated.
        """
        deadline = Deadline(timeout)
        backoff = Backoff(limit=0.5)
        while True:
            try:
                live = self._connected(deadline, may_start=may_start)
                assert live.endpoint is not None
                return live.endpoint
            except DaemonUnavailable:
                if isinstance(self.address, FolderAddress) or not backoff.pause(deadline):
                    raise

    def call(
        self,
        method: Method[Request, Response],
        request: Request,
        *,
        timeout: float = CALL_SECONDS,
        wait_for_daemon: bool = True,
    ) -> Response:
        """The daemon's answer within *timeout* seconds.

        With *wait_for_daemon* a daemon that is away is waited for, up to 60 s of the timeout;
        without, DaemonUnavailable comes at once. Raises what the daemon raised.
        """
        size = request.ByteSize()
        limit = method.max_request_bytes
        check_limit(f"bytes of {method.name}", size, limit, "send it in several calls")
        return self._persist(
            method, timeout, wait_for_daemon, lambda live, left: live.invoke(method, request, left)
        )

    def collect(
        self,
        method: Method[Request, Response],
        request: Request,
        *,
        timeout: float = CALL_SECONDS,
        wait_for_daemon: bool = True,
    ) -> list[Response]:
        """All answers of a streaming call, which is repeated from its start like :meth:`call`."""
        return self._persist(
            method,
            timeout,
            wait_for_daemon,
            lambda live, left: list(live.stream(method, request, left)),
        )

    def attach(self) -> None:
        """Keep the daemon of a folder alive while this object lives, by a stream in a thread."""
        with self._lock:
            if self._attacher is not None or self._is_closed or _is_forked():
                return  # a relay does so by itself
            self._held.stop = threading.Event()
            self._attacher = threading.Thread(
                target=_stay_attached,
                args=(weakref.ref(self), self._held.stop),
                name="forebay-attach",
                daemon=True,
            )
            self._attacher.start()

    def close(self) -> None:
        """Close the connection. Idempotent; calls in flight fail."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
        with self._lock:
            attacher, self._attacher = self._attacher, None
            _release(self._held)
        if attacher is not None and attacher is not threading.current_thread():
            attacher.join(timeout=2.0)

    def forget_parent(self) -> None:
        """In a child of fork: gRPC's objects are kept from ever being touched, even by the end."""
        self._lock = threading.Lock()
        if isinstance(self._held.live, Relay):
            self._held.live.forget_parent()
        for inherited in (self._held.live, self._held.attached):
            if inherited is not None:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
        self._held.live = self._held.attached = self._held.stop = None
        self._attacher = None

    def _persist(
        self,
        method: Method[Request, Response],
        timeout: float,
        wait_for_daemon: bool,
        action: Callable[[_Live | Relay, float], Result],
    ) -> Result:
        """*action* until it succeeds, fails for good, or time is up."""
        deadline = Deadline(timeout)
        patience: Deadline | None = None
        backoff = Backoff()
        while True:
            live: _Live | Relay | None = None
            started = time.monotonic()
            try:
                live = self._connected(patience or deadline)
                return action(live, max(0.001, deadline.remaining))
            except grpc.RpcError as error:
                failure = _rebuild(error, method, self.address, timeout)
                if _is_connection_lost(error):
                    self._drop(live)
            except DaemonUnavailable as error:
                failure = error
            except ValueError as error:
                if isinstance(error, InvalidRequest) or live is None:
                    raise
                failure = self._lost(error)  # gRPC: another thread has closed this channel
            try:
                if not isinstance(failure, DaemonUnavailable) or not wait_for_daemon:
                    raise failure
                if patience is None or time.monotonic() - started > RECONNECT_SECONDS:
                    patience = Deadline(min(RECONNECT_SECONDS, deadline.remaining))
                if self._is_closed or not backoff.pause(patience):
                    raise failure
            finally:
                del failure  # its traceback has this frame: a cycle would keep what callers hold

    def _lost(self, error: Exception) -> DaemonUnavailable:
        return DaemonUnavailable(f"the connection to {self.address} was closed ({error})")

    def _connected(self, deadline: Deadline, *, may_start: bool = True) -> _Live | Relay:
        live = self._held.live
        if live is not None and not live.is_lost:
            return live
        if not self._lock.acquire(timeout=max(0.001, deadline.remaining)):
            raise DaemonUnavailable(f"{self.address} has not answered for {deadline.seconds:.0f} s")
        try:
            if self._is_closed:
                raise InvalidRequest(f"the client of {self.address} is closed: connect again")
            live = self._held.live
            if live is not None and live.is_lost:
                live.close()
            if live is None or live.is_lost:
                self._opening = deadline.at_most(deadline.remaining)
                live = self._held.live = self._open(self._opening, may_start)
                self._is_reconnect = True
                last, self._endpoint = self._endpoint, live.endpoint
                if last is not None and live.endpoint is not None:
                    succeed_endpoint(last, live.endpoint)
            return live
        finally:
            self._lock.release()

    def _open(self, deadline: Deadline, may_start: bool) -> _Live | Relay:
        if _is_forked():
            warnings.warn(_FORK_WARNING, RuntimeWarning, stacklevel=2)
            return Relay(self.address, max(0.1, deadline.remaining), may_start=may_start)
        backoff = Backoff()
        while True:
            target = _locate(
                self.address, deadline, is_reconnect=self._is_reconnect, may_start=may_start
            )
            live = _Live(target)
            try:
                live.endpoint = _shake_hands(live, self.address, deadline)
                return live
            except DaemonUnavailable:  # it answered elsewhere a moment ago: it is just stopping
                live.close()
                if not backoff.pause(deadline):
                    raise
            except BaseException:
                live.close()
                raise

    def _drop(self, live: _Live | Relay | None) -> None:
        """Close a channel whose daemon has gone, unless another thread has replaced it already."""
        with self._lock:
            if live is None or self._held.live is not live:
                return
            self._held.live = None
        live.close()


_user: int | None = None
"""The process whose gRPC this is, once it has been used."""


def _is_forked() -> bool:
    return _user not in (None, os.getpid())


def _open_grpc(target: _Target) -> grpc.Channel:
    global _user
    _user = os.getpid()
    if not target.is_tls:
        return grpc.insecure_channel(target.grpc_target, _OPTIONS)
    certificates = os.environ.get("FOREBAY_TLS_CA")
    roots = None
    if certificates:
        with open(certificates, "rb") as file:
            roots = file.read()
    return grpc.secure_channel(target.grpc_target, grpc.ssl_channel_credentials(roots), _OPTIONS)


def _locate(
    address: Address, deadline: Deadline, *, is_reconnect: bool, may_start: bool
) -> _Target:
    """What to call for *address*: finds or starts a folder's daemon, asks for a token."""
    if isinstance(address, TcpAddress):
        return _Target(address.netloc, address.is_tls, address.token, None)
    if isinstance(address, SocketAddress):
        socket = str(address.descriptor_socket)
        try:
            connection, hello = DescriptorConnection.connect(
                socket, max(0.1, min(HANDSHAKE_SECONDS, deadline.remaining))
            )
        except DaemonUnavailable as error:
            raise _absent(address, str(error)) from error
        connection.close()
        return _Target(f"unix:{address.path}", False, hello.token, socket)
    found = None
    if is_reconnect and may_start:
        with suppress(DaemonUnavailable):
            found = wait(address.folder, deadline.at_most(RESTART_GRACE_SECONDS))
    if found is None:
        look = find_or_start if may_start and address.may_start else find_running
        found = look(address.folder, deadline)
    return _Target(found.rpc, False, found.hello.token, found.descriptor_socket)


def _shake_hands(live: _Live, address: Address, deadline: Deadline) -> DataEndpoint:
    request = admin_pb2.HandshakeRequest(
        protocols=protocol_range(), client_version=client_version()
    )
    seconds = max(0.1, min(HANDSHAKE_SECONDS, deadline.remaining))
    try:
        answer = live.invoke(Admin.Handshake, request, seconds)
    except grpc.RpcError as error:
        raise _rebuild(error, Admin.Handshake, address, seconds) from error
    if not answer.token:
        raise Unauthenticated(
            f"{address} wants a token: pass connect(token=…), or set $FOREBAY_TOKEN or "
            "$FOREBAY_TOKEN_FILE; it lies in the file token of the daemon's data folder"
        )
    return DataEndpoint(
        live.target.descriptor_socket,
        _reachable(answer.http_url, address),
        answer.token,
        answer.incarnation,
    )


def _reachable(http_url: str, address: Address) -> str:
    """A daemon that serves bytes on all its addresses does so on the one that we called, too."""
    parts = urlsplit(http_url)
    if isinstance(address, TcpAddress) and parts.hostname in ("0.0.0.0", "::"):  # noqa: S104
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{parts.scheme}://{host}:{parts.port}"
    return http_url


def client_version() -> str:
    """The installed version of this package."""
    try:
        return version("forebay")
    except PackageNotFoundError:
        return "0+unknown"


def _stay_attached(channel_ref: weakref.ref[RpcChannel], stop: threading.Event) -> None:
    """Hold an Attach stream until *stop*, or until nobody holds the channel any more."""
    backoff = Backoff(first=0.2, limit=2.0)
    while not stop.is_set():
        channel = channel_ref()
        if channel is None:
            return
        live: _Live | Relay | None = None
        with suppress(ForebayError, ValueError):
            # A daemon that was stopped is left alone until somebody calls.
            live = channel._connected(Deadline(CONNECT_SECONDS), may_start=False)
            request = admin_pb2.AttachRequest(name=f"pid {os.getpid()}")
            stream = live.stream(Admin.Attach, request, ATTACH_SECONDS)
            channel._held.attached = stream
            del channel
            met_daemon, is_same = _follow(stream, live)
            if met_daemon:
                backoff = Backoff(first=0.2, limit=2.0)
            if is_same:
                live = None
        channel = channel_ref()
        if channel is None or stop.is_set():
            return
        channel._held.attached = None
        channel._drop(live)
        del channel
        stop.wait(backoff.next_seconds())


def _follow(stream: Any, live: _Live | Relay) -> tuple[bool, bool]:
    """Wait until an Attach stream ends; whether it began, and whether *live* may still be used.

    gRPC connects anew by itself, also to a daemon that was started since: with that one nobody has
    shaken hands, and its endpoint is another.
    """
    known = live.endpoint.incarnation if live.endpoint is not None else ""
    met_daemon = False
    try:
        for event in stream:
            met_daemon = True
            if event.incarnation not in ("", known):
                stream.cancel()
                return True, False
    except grpc.RpcError as error:
        return met_daemon, not _is_connection_lost(error)
    return met_daemon, True


def _release(held: _Held) -> None:
    """Close what a channel held; also run when it is collected and at the interpreter's end."""
    if held.stop is not None:
        held.stop.set()
    live, stream = held.live, held.attached
    held.live = held.attached = None
    if stream is not None:
        stream.cancel()
    if live is not None:
        live.close()


def _is_connection_lost(error: grpc.RpcError) -> bool:
    """Whether nobody answered: an error of the daemon itself carries its name."""
    return error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
    ) and not _error_name(error)


def _error_name(error: grpc.RpcError) -> str | None:
    metadata: Any = error.trailing_metadata() or ()
    return next((str(value) for key, value in metadata if key == ERROR_METADATA), None)


def _rebuild(
    error: grpc.RpcError, method: Method[Any, Any], address: Address, seconds: float
) -> ForebayError:
    """The exception that *error* stands for."""
    code, details, name = error.code(), error.details() or "", _error_name(error)
    if name is None:
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            return _absent(address, details)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(
                f"{method.name} at {address} was not answered within {seconds:.0f} s: the daemon "
                "may still do it; look at forebay status and its log, or allow more time"
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return VersionMismatch(
                f"the daemon at {address} does not know {method.name}: upgrade the daemon "
                "(pip install -U forebay) and restart it"
            )
        details = f"{method.name} at {address} failed: {details}"
    return rebuild(name, code.name, details)


def _absent(address: Address, details: str) -> DaemonUnavailable:
    advice = "check host and port and that a daemon listens there (forebay serve --listen …)"
    if isinstance(address, SocketAddress):
        advice = "start it (forebay serve --data DIR), or connect by its data folder"
        if not address.path.exists():
            details = f"there is no {address.path}"
    elif isinstance(address, FolderAddress):
        advice = f"start it (forebay serve --data {address.folder}), or look into its log"
    return DaemonUnavailable(f"no daemon answers at {address} ({details}): {advice}")
