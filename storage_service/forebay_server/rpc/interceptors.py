"""What every gRPC call passes: who calls, in which protocol, and how its errors cross the wire."""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
import grpc.aio
from google.protobuf.message import Message

from forebay_server.observe.metrics import Metrics
from forebay_wire.errors import DaemonUnavailable, ForebayError, Unauthenticated
from forebay_wire.limits import MAX_COMMIT_BYTES, MAX_MESSAGE_BYTES, check_limit
from forebay_wire.protocol import (
    ERROR_METADATA,
    PROTOCOL_METADATA,
    TOKEN_METADATA,
    agree,
    protocol_range,
)

logger = logging.getLogger(__name__)

HANDSHAKE: Final = "/forebay.v1.Admin/Handshake"
COMMITS: Final = (
    "/forebay.v1.Datasets/CommitVersion",
    "/forebay.v1.Datasets/DefineSelections",
)
HEALTH_PREFIX: Final = "/grpc.health.v1.Health/"
REFLECTION_PREFIX: Final = "/grpc.reflection."

REFUSED_WHILE_DRAINING: Final = frozenset(
    {
        "/forebay.v1.Admin/Attach",
        "/forebay.v1.Blobs/BeginUpload",
        "/forebay.v1.Checkpoints/BeginAttempt",
        "/forebay.v1.Checkpoints/BeginPack",
        "/forebay.v1.Checkpoints/PreparePack",
        "/forebay.v1.Datasets/DeleteDataset",
        "/forebay.v1.Checkpoints/DeleteGeneration",
    }
)
"""Calls that start something new; what was started before may still be finished."""

MAX_MESSAGE_CHARACTERS: Final = 1500
"""A status message travels in a header, and clients refuse headers above 8 KiB."""


class TokenChecker(Protocol):
    """What the interceptor needs of :class:`forebay_server.bulk.tickets.Auth`."""

    def check_token(self, text: str) -> int:
        """The uid that *text* was given to; raises :class:`Unauthenticated`."""
        ...


@dataclass(frozen=True)
class Caller:
    """Who makes the current call."""

    uid: int | None
    """None: nobody we know; only the handshake and health answer such a caller."""
    peer: str
    """gRPC's name of the connection: ``unix:`` or ``ipv4:HOST:PORT``."""


_caller: ContextVar[Caller | None] = ContextVar("forebay_caller", default=None)


def current_caller() -> Caller:
    """The caller of the gRPC call that is being answered."""
    caller = _caller.get()
    assert caller is not None, "only answers of gRPC calls have a caller"
    return caller


def caller_uid() -> int:
    """The uid that the current call's token is bound to; :class:`Unauthenticated` without one."""
    uid = current_caller().uid
    if uid is None:
        raise Unauthenticated("this call needs a token (metadata authorization: Bearer TOKEN)")
    return uid


class Gate(grpc.aio.ServerInterceptor):
    """Admits calls with a token and a protocol in common; maps every error in one place."""

    def __init__(
        self, tokens: TokenChecker, metrics: Metrics, is_draining: Callable[[], bool]
    ) -> None:
        self._tokens = tokens
        self._metrics = metrics
        self._is_draining = is_draining

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC answers UNIMPLEMENTED
            return None
        method = handler_call_details.method
        metadata = {
            key: value
            for key, value in handler_call_details.invocation_metadata or ()
            if isinstance(value, str)
        }
        return self._wrap(handler, method, metadata)

    def _wrap(self, handler: Any, method: str, metadata: Mapping[str, str]) -> Any:
        """*handler* with admission, metrics and error mapping around its behaviour."""
        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behaviour = getattr(handler, kind)
            if behaviour is not None:
                make = getattr(grpc, f"{kind}_rpc_method_handler")
                wrap = (
                    self._wrap_generator
                    if inspect.isasyncgenfunction(behaviour)
                    else self._wrap_coroutine
                )
                return make(wrap(behaviour, method, metadata), **codecs)
        raise AssertionError(f"{method} has no behaviour")

    def _wrap_coroutine(self, behaviour: Any, method: str, metadata: Mapping[str, str]) -> Any:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._call(method, metadata, context):
                _check_size(method, request)
                return await behaviour(request, context)

        return answer

    def _wrap_generator(self, behaviour: Any, method: str, metadata: Mapping[str, str]) -> Any:
        async def answer(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            async with self._call(method, metadata, context):
                if isinstance(request, Message):
                    _check_size(method, request)
                async for response in behaviour(request, context):
                    yield response

        return answer

    @asynccontextmanager
    async def _call(
        self,
        method: str,
        metadata: Mapping[str, str],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[None]:
        """One call from admission to its status."""
        started = time.perf_counter()
        status = "OK"
        try:
            _caller.set(self._admit(method, metadata, context.peer()))
            yield
        except ForebayError as error:
            status = error.status
            await _abort(context, status, error.message, type(error).__name__)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            status = "ABORTED"
            raise
        except Exception:  # the edge: nothing may leave as a traceback
            status = "INTERNAL"
            error_id = secrets.token_hex(4)
            logger.exception("call %s failed, error id %s", method, error_id)
            self._metrics.rpc_internal_errors.labels(method).inc()
            message = (
                f"the daemon failed in {method.rpartition('/')[2]} (error id {error_id}): "
                "its log has the cause under this id"
            )
            await _abort(context, status, message, ForebayError.__name__)
        finally:
            self._metrics.rpc_calls.labels(method, status).inc()
            self._metrics.rpc_seconds.labels(method).observe(time.perf_counter() - started)

    def _admit(self, method: str, metadata: Mapping[str, str], peer: str) -> Caller:
        """The caller, if it may make this call at all."""
        if method.startswith(HEALTH_PREFIX):
            return Caller(None, peer)
        if method == HANDSHAKE:
            return Caller(self._uid_if_any(metadata), peer)
        caller = Caller(self._uid(metadata), peer)
        if not method.startswith(REFLECTION_PREFIX):  # other people's tools speak no protocol
            agree(
                metadata.get(PROTOCOL_METADATA, ""),
                protocol_range(),
                caller="client",
                here="daemon",
            )
        if method in REFUSED_WHILE_DRAINING and self._is_draining():
            raise DaemonUnavailable(
                "the daemon is draining and starts nothing new: try again once it runs again"
            )
        return caller

    def _uid(self, metadata: Mapping[str, str]) -> int:
        scheme, _, token = metadata.get(TOKEN_METADATA, "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated(
                "this call carries no token: local clients get one from the descriptor socket, "
                "others find it in the file token of the daemon's data folder"
            )
        return self._tokens.check_token(token)

    def _uid_if_any(self, metadata: Mapping[str, str]) -> int | None:
        return self._uid(metadata) if TOKEN_METADATA in metadata else None


def _check_size(method: str, request: Message) -> None:
    limit = MAX_COMMIT_BYTES if method in COMMITS else MAX_MESSAGE_BYTES
    name = method.rpartition("/")[2]
    check_limit(f"bytes of {name}", request.ByteSize(), limit, "send it in several calls")


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], status: str, message: str, error_name: str
) -> None:
    """End the call with *status*; the client rebuilds the same exception from the trailer."""
    await context.abort(
        grpc.StatusCode[status],
        message[:MAX_MESSAGE_CHARACTERS],
        trailing_metadata=((ERROR_METADATA, error_name),),
    )
