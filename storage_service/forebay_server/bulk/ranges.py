"""Bytes over HTTP/1.1: ranges of blobs by sendfile, uploads into slots, all by ticket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from forebay_server.bulk.descriptors import UploadSlots
from forebay_server.bulk.follow_requests import answer_decision, asked_text
from forebay_server.bulk.held import HeldOpens
from forebay_server.bulk.plan_requests import PLAN_OPERATIONS, answer_plan
from forebay_server.bulk.sending import FilePiece, Sender
from forebay_server.bulk.tickets import Auth, Method, Ticket
from forebay_server.publish.following import Following
from forebay_server.serve.open import Opener
from forebay_server.serve.opened import OpenedBlob
from forebay_server.serve.plans import Plans
from forebay_server.serve.stream import Stream, Streams
from forebay_server.tier.course import Course, add_seconds, begin_course
from forebay_wire.errors import (
    HTTP_STATUS,
    DeadlineExceeded,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from forebay_wire.ids import check_id, check_random_name, new_random_name
from forebay_wire.limits import MAX_NAME_BYTES, MAX_OPEN_BLOBS_PER_CLIENT, check_limit
from forebay_wire.protocol import WAITS_HEADER

logger = logging.getLogger(__name__)

RECEIVE_SECONDS: Final = 60.0
"""Longest wait for the next bytes of a body."""

MAX_MESSAGE_CHARACTERS: Final = 2000
"""Of a report: the rest is cut off."""

MAX_BLOBS_PER_REQUEST: Final = 8 * MAX_OPEN_BLOBS_PER_CLIENT
"""Releases come in batches, for more opens than a client may have at a time."""

MAX_STREAM_WAITS: Final = 4096
"""Answers whose readers may still ask what they waited for."""

BYTES_TYPE: Final = "application/octet-stream"

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_RANGE: Final = re.compile(r"bytes=(\d*)-(\d*)\Z")


def parse_range(header: str | None, length: int) -> tuple[int, int] | None:
    """``(start, stop)`` that the Range *header* asks for of *length* bytes; None: no header.

    One range only. :class:`InvalidRequest` if it cannot be satisfied.
    """
    if header is None:
        return None
    found = _RANGE.match(header.strip())
    first, last = found.groups() if found else ("", "")
    if first:
        start, stop = int(first), min(int(last) + 1 if last else length, length)
    elif last:
        start, stop = max(0, length - int(last)), length
    else:
        raise InvalidRequest(f"range {header!r} is not understood: send one range of bytes")
    if start >= stop:
        raise InvalidRequest(f"range {header!r} is outside {length} bytes")
    return start, stop


def make_app(
    *,
    opener: Opener,
    uploads: UploadSlots,
    auth: Auth,
    render_metrics: Callable[[], Awaitable[bytes]],
    is_serving: Callable[[], bool],
    plans: Plans | None = None,
    following: Following | None = None,
) -> web.Application:
    """The application; whoever runs it cleans it up, which releases what clients hold open."""
    handlers = _Handlers(
        HeldOpens(opener), opener, uploads, auth, render_metrics, is_serving, plans, following
    )
    app = web.Application(middlewares=[_answer_errors])
    app.add_routes(
        [
            web.post("/v1/open", handlers.open),
            web.post("/v1/release", handlers.release),
            web.post("/v1/waits", handlers.waits),
            web.post("/v1/report", handlers.report),
            web.post("/v1/plans/{operation}", handlers.plan),
            web.post("/v1/decisions", handlers.decide),
            web.post("/v1/manifests", handlers.manifest),
            web.get("/v1/blobs/{blob}", handlers.get_data),
            web.get("/v1/tables/{blob}", handlers.get_table),
            web.put("/v1/uploads/{session}", handlers.put),
            web.get("/healthz", handlers.health),
            web.get("/metrics", handlers.metrics),
        ]
    )
    app.cleanup_ctx.append(handlers.run)
    return app


class _Handlers:
    """The routes. Belongs to the event loop."""

    def __init__(
        self,
        held: HeldOpens,
        opener: Opener,
        uploads: UploadSlots,
        auth: Auth,
        render_metrics: Callable[[], Awaitable[bytes]],
        is_serving: Callable[[], bool],
        plans: Plans | None,
        following: Following | None,
    ) -> None:
        self._following = following
        self._held = held
        self._plans = plans
        self._sender = Sender()
        self._opener = opener
        self._uploads = uploads
        self._auth = auth
        self._render_metrics = render_metrics
        self._is_serving = is_serving
        self._stream_waits: OrderedDict[object, dict[str, float]] = OrderedDict()
        """Answers of streams, and what they waited for until now, until somebody asks."""

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """The application's life: unused opens are released meanwhile, all of them at the end."""
        cleaning = asyncio.create_task(self._held.release_unused_for_ever(), name="http-opens")
        yield
        cleaning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cleaning
        self._held.close()
        self._sender.close()

    # --------------------------------------------------------------------- JSON, with the token

    async def open(self, request: web.Request) -> web.Response:
        """{blobs, client} -> {blobs: [{blob, length, tier, table_bytes, ticket} | error], waits}:
        what was waited for."""
        uid, body = await self._admit(request)
        client = _client(uid, body)
        blobs = [check_id("blob", blob) for blob in _blobs(body)]
        plan = body.get("plan")
        waits: dict[str, float] = {}
        plan = plan if isinstance(plan, str) else ""
        results = await self._held.open(client, blobs, plan, waits)
        entries = [
            {"blob": blob, **_error_body(one)}
            if isinstance(one, ForebayError)
            else self._entry(uid, client, one)
            for blob, one in zip(blobs, results, strict=True)
        ]
        answer = {"blobs": entries, "waits": waits}
        return web.json_response(answer | self._wanted_back(client))

    async def waits(self, request: web.Request) -> web.Response:
        """{answer} -> {waits}: what a stream's answer has waited for, told once."""
        _, body = await self._admit(request)
        return web.json_response({"waits": self._stream_waits.pop(body.get("answer"), {})})

    async def plan(self, request: web.Request) -> web.Response:
        """``plan``, ``position`` and ``end_plan``, as on the descriptor socket."""
        uid, body = await self._admit(request)
        operation = request.match_info["operation"]
        if self._plans is None or operation not in PLAN_OPERATIONS:
            raise NotFound(f"there is no {request.path}: upgrade the daemon")
        answer = await answer_plan(self._plans, operation, body, uid=uid, owner="")
        return web.json_response(answer | self._wanted_back(_client(uid, body)))

    async def decide(self, request: web.Request) -> web.Response:
        """``decide_version``, as on the descriptor socket."""
        _, body = await self._admit(request)
        return web.json_response(await answer_decision(self._followed(request), body))

    async def manifest(self, request: web.Request) -> web.Response:
        """{manifest} -> its bytes."""
        _, body = await self._admit(request)
        data = await self._followed(request).manifest(asked_text(body, "manifest"))
        return web.Response(body=data)

    def _followed(self, request: web.Request) -> Following:
        if self._following is None:
            raise NotFound(f"there is no {request.path}: upgrade the daemon")
        return self._following

    def _wanted_back(self, client: str) -> dict[str, Any]:
        """What goes into an answer where the daemon needs the room of what *client* has open."""
        asked = self._opener.asked_back(client)
        return {"wanted_back": asked} if asked else {}

    async def release(self, request: web.Request) -> web.Response:
        """{blobs, client} -> {}: one open less for each."""
        uid, body = await self._admit(request)
        self._held.release(_client(uid, body), _blobs(body))
        return web.json_response({})

    async def report(self, request: web.Request) -> web.Response:
        """{blob, tier, segment, message} -> {blob, healthy}."""
        _, body = await self._admit(request)
        blob = check_id("blob", str(body.get("blob", "")))
        tier, message = str(body.get("tier", "")), str(body.get("message", ""))
        segment = body.get("segment")
        number = segment if isinstance(segment, int) else -1
        healthy = await self._opener.report(blob, tier, number, message[:MAX_MESSAGE_CHARACTERS])
        return web.json_response({"blob": blob, "healthy": healthy})

    # ------------------------------------------------------------------------ bytes, by ticket

    async def get_data(self, request: web.Request) -> web.StreamResponse:
        """Bytes of the blob's data: a range of it (206), or all (200)."""
        blob, ticket = self._ticket_for_blob(request)
        async with self._held.use(ticket.client, blob) as opened:
            try:
                wanted = parse_range(request.headers.get("Range"), opened.length)
            except InvalidRequest as error:
                headers = {"Content-Range": f"bytes */{opened.length}"}
                return web.json_response(_error_body(error), status=416, headers=headers)
            start, stop = wanted or (0, opened.length)
            if start < ticket.start or stop > ticket.stop:
                raise PermissionDenied(
                    f"the ticket opens bytes [{ticket.start}, {ticket.stop}) of blob {blob}, "
                    f"not [{start}, {stop})"
                )
            response = web.StreamResponse(status=206 if wanted else 200)
            if wanted:
                response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{opened.length}"
            if opened.stream is not None:
                return await self._send_stream(
                    request, response, opened.stream, start, stop, opened.plan
                )
            pieces = [FilePiece(*one) for one in opened.stretches(start, stop)]
            return await self._send(request, response, *pieces)

    async def get_table(self, request: web.Request) -> web.StreamResponse:
        """The blob's segment table."""
        blob, ticket = self._ticket_for_blob(request)
        async with self._held.use(ticket.client, blob) as opened:
            if opened.stream is not None:
                return web.Response(body=opened.stream.table.encoded, content_type=BYTES_TYPE)
            file = opened.descriptors[-1]
            piece = FilePiece(file, opened.table_offset, opened.table_length)
            return await self._send(request, web.StreamResponse(), piece)

    async def put(self, request: web.Request) -> web.Response:
        """Write the body at *offset* of the session's slot; on return the slot holds it."""
        session = check_random_name("session", request.match_info["session"])
        ticket = self._ticket(request, "PUT")
        if ticket.session != session:
            raise PermissionDenied(f"the ticket is not for upload session {session}")
        offset = request.query.get("offset", "0")
        if not (offset.isascii() and offset.isdigit()):
            raise InvalidRequest(f"offset {offset!r} is no number of bytes")
        slot = self._uploads.slot(session, ticket.uid)
        stop = min(ticket.stop, slot.capacity_bytes)
        descriptor = slot.duplicate()
        try:
            num_bytes = await _receive_body(request, descriptor, int(offset), stop)
        finally:
            os.close(descriptor)
        return web.json_response({"num_bytes": num_bytes})

    # --------------------------------------------------------------------------------- anybody

    async def health(self, request: web.Request) -> web.Response:
        """200 while the daemon serves, 503 while it starts or drains."""
        if self._is_serving():
            return web.json_response({"status": "serving"})
        return web.json_response({"status": "not serving"}, status=503)

    async def metrics(self, request: web.Request) -> web.Response:
        """The daemon's metrics, for Prometheus."""
        return web.Response(
            body=await self._render_metrics(), headers={"Content-Type": METRICS_TYPE}
        )

    # --------------------------------------------------------------------------------- helpers

    async def _send(
        self, request: web.Request, response: web.StreamResponse, *pieces: FilePiece
    ) -> web.StreamResponse:
        """Send pieces of the blob's files, one after the other; the kernel moves them.

        An error in the middle can only be told by closing the connection.
        """
        response.content_type = BYTES_TYPE
        response.content_length = sum(piece.count for piece in pieces)
        response.headers["Accept-Ranges"] = "bytes"
        await response.prepare(request)
        transport = request.transport
        if request.method != "HEAD" and response.content_length:
            if transport is None:
                raise ConnectionResetError("the client went away")
            try:
                for piece in pieces:
                    await self._sender.send(response, transport, piece)
            except BaseException:
                transport.abort()
                raise
        await response.write_eof()
        return response

    async def _send_stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        stream: Stream,
        start: int,
        stop: int,
        plan: str,
    ) -> web.StreamResponse:
        """Send bytes [start, stop) of a blob as its segments arrive, to a reader of *plan*."""
        response.content_type = BYTES_TYPE
        response.content_length = stop - start
        response.headers["Accept-Ranges"] = "bytes"
        sending = _Sending(self._opener.streams, self._sender, response, stream)
        name = response.headers[WAITS_HEADER] = new_random_name()
        self._stream_waits[name] = sending.waits
        if len(self._stream_waits) > MAX_STREAM_WAITS:
            self._stream_waits.popitem(last=False)
        await response.prepare(request)
        transport = request.transport
        try:
            if transport is None:
                raise ConnectionResetError("the client went away")
            if request.method != "HEAD":
                await sending.send(transport, start, stop)
        except BaseException:
            if transport is not None:
                transport.abort()
            raise
        finally:
            self._opener.waited(plan, sending.waits)
        await response.write_eof()
        return response

    async def _admit(self, request: web.Request) -> tuple[int, dict[str, Any]]:
        """The caller's uid by its token, and the JSON object that it sent."""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise Unauthenticated("send the token as 'Authorization: Bearer TOKEN'")
        uid = self._auth.check_token(token)
        try:
            body = json.loads(await request.read())
        except ValueError:
            raise InvalidRequest("the request's body is no JSON") from None
        if not isinstance(body, dict):
            raise InvalidRequest("the request's body is no JSON object")
        return uid, body

    def _ticket(self, request: web.Request, method: Method) -> Ticket:
        return self._auth.check_ticket(request.query.get("ticket", ""), method)

    def _ticket_for_blob(self, request: web.Request) -> tuple[str, Ticket]:
        blob = check_id("blob", request.match_info["blob"])
        ticket = self._ticket(request, "GET")
        if ticket.blob != blob:
            raise PermissionDenied(f"the ticket is not for blob {blob}")
        return blob, ticket

    def _entry(self, uid: int, client: str, opened: OpenedBlob) -> dict[str, Any]:
        return {
            "blob": opened.blob,
            "length": opened.length,
            "tier": opened.tier,
            "table_bytes": opened.table_length,
            "ticket": self._auth.ticket(
                "GET", uid=uid, client=client, blob=opened.blob, stop=opened.length
            ),
        }


async def _receive_body(request: web.Request, descriptor: int, offset: int, stop: int) -> int:
    """Write the body into a slot, from *offset*, not beyond *stop*; how many bytes it had."""
    start = offset
    if offset + (request.content_length or 0) > stop:
        raise _outside(offset, request.content_length or 0, stop)
    try:
        while True:
            async with asyncio.timeout(RECEIVE_SECONDS):
                chunk = await request.content.readany()
            if not chunk:
                return offset - start
            if offset + len(chunk) > stop:
                raise _outside(offset, len(chunk), stop)
            view = memoryview(chunk)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
    except TimeoutError:
        raise DeadlineExceeded(f"no byte of the body for {RECEIVE_SECONDS:.0f} s") from None


@dataclass
class _Sending:
    """One answer with bytes of a stream."""

    streams: Streams
    sender: Sender
    response: web.StreamResponse
    stream: Stream
    waits: dict[str, float] = field(default_factory=dict)
    """Reason to seconds, in which it waited for bytes to send."""

    async def send(self, transport: asyncio.Transport, start: int, stop: int) -> None:
        """Send bytes [start, stop) as they arrive, up to the first damaged segment."""
        for part in self.stream.parts(start, stop):
            try:
                await self._send_part(transport, part, stop)
            except IntegrityError:
                for segment in self.stream.table.covering(part.start, len(part)):
                    here = self.stream.bytes_of(range(segment, segment + 1))
                    first, last = max(here.start, part.start), min(here.stop, part.stop)
                    await self._send_part(transport, range(first, last), stop)

    async def _send_part(self, transport: asyncio.Transport, part: range, stop: int) -> None:
        course = begin_course(Course())
        async with self.streams.part(self.stream, part, stop) as view:
            add_seconds(self.waits, course.so_far())
            sent = await self.sender.send_memory(transport, view)
            left = bytes(view[sent:])  # who is slow holds no buffer
        if left:
            await self.sender.send_rest(self.response, transport, left)


def _outside(offset: int, num_bytes: int, stop: int) -> InvalidRequest:
    return InvalidRequest(
        f"bytes [{offset}, {offset + num_bytes}) are outside the {stop} bytes of the session's slot"
    )


def _client(uid: int, body: dict[str, Any]) -> str:
    """Under which name a caller's opens are counted: never another user's."""
    name = body.get("client", "")
    if not isinstance(name, str) or len(name) > MAX_NAME_BYTES:
        raise InvalidRequest(f"'client' is a text of at most {MAX_NAME_BYTES} characters")
    return f"http {uid} {name}"


def _blobs(body: dict[str, Any]) -> list[str]:
    blobs = body.get("blobs")
    if not isinstance(blobs, list) or not all(isinstance(blob, str) for blob in blobs):
        raise InvalidRequest("'blobs' is a list of ids")
    check_limit("blobs in one request", len(blobs), MAX_BLOBS_PER_REQUEST, "send fewer at once")
    return blobs


def _error_body(error: ForebayError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": error.message}


@web.middleware
async def _answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors as JSON with the status of the one table; what nobody expected is logged."""
    try:
        return await handler(request)
    except ForebayError as error:
        found = error
    except web.HTTPException as error:
        kind = NotFound if error.status == 404 else InvalidRequest
        problem = kind(f"{request.method} {request.path}: {error.reason}")
        return web.json_response(_error_body(problem), status=error.status)
    except (ConnectionError, TimeoutError):
        raise  # the client is gone, or was cut off
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        found = ForebayError(f"the daemon failed ({type(error).__name__}): see its log")
    return web.json_response(_error_body(found), status=HTTP_STATUS[found.status])
