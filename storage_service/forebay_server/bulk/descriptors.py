"""The descriptor socket: hands descriptors of blobs and slots to processes on this host."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from forebay_server.bulk.follow_requests import (
    DECIDE,
    FOLLOW_OPERATIONS,
    answer_decision,
    as_memory_file,
    asked_text,
)
from forebay_server.bulk.plan_requests import PLAN_OPERATIONS, answer_plan
from forebay_server.bulk.tickets import Auth
from forebay_server.publish.following import Following
from forebay_server.serve.open import Opener
from forebay_server.serve.opened import OpenedBlob
from forebay_server.serve.plans import Plans
from forebay_server.tier.memory import Slot
from forebay_wire.errors import (
    DaemonUnavailable,
    ForebayError,
    InvalidRequest,
    PermissionDenied,
    ResourceExhausted,
)
from forebay_wire.handover import HEADER, decode_body, decode_header, encode_frame
from forebay_wire.ids import check_id, check_random_name
from forebay_wire.limits import (
    MAX_DESCRIPTORS_PER_MESSAGE,
    MAX_EXTENTS_PER_MESSAGE,
    check_limit,
)
from forebay_wire.protocol import agree, protocol_range

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 4096
RECEIVE_BYTES: Final = 64 * 1024
MAX_MESSAGE_CHARACTERS: Final = 2000
"""Of an error: 64 of them have to fit one frame."""

_PEER: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class UploadSlots(Protocol):
    """What this server needs of :class:`forebay_server.publish.lease.Uploads`."""

    def slot(self, session: str, uid: int) -> Slot:
        """The slot of an open session of *uid*. Thread-safe."""
        ...


@dataclass(frozen=True)
class Answer:
    """One answer, with descriptors that are closed once they are sent."""

    body: dict[str, Any]
    descriptors: list[int] = field(default_factory=list)

    def close(self) -> None:
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.descriptors.clear()


@dataclass(eq=False)
class _Connection:
    """One client process. Belongs to the server's thread."""

    socket: socket.socket
    uid: int
    process: str
    client: str
    """The process and the number of this connection."""
    received: bytearray = field(default_factory=bytearray)
    unsent: bytes = b""
    answer: Answer | None = None
    """Whose descriptors are not sent yet."""
    is_waiting: bool = False
    """For a request that the event loop works on: the next one waits for it."""
    is_closed: bool = False

    @property
    def is_busy(self) -> bool:
        return self.is_waiting or bool(self.unsent)

    def take_frame(self) -> dict[str, Any] | None:
        """The next request, None if it has not arrived whole. InvalidRequest: not our protocol."""
        if len(self.received) < HEADER.size:
            return None
        num_descriptors, length = decode_header(bytes(self.received[: HEADER.size]))
        if num_descriptors:
            raise InvalidRequest("a request carries no descriptors")
        end = HEADER.size + length
        if len(self.received) < end:
            return None
        body = decode_body(bytes(self.received[HEADER.size : end]))
        del self.received[:end]
        return body


class DescriptorServer:
    """Serves all connections in one thread; what has to wait is handed to the event loop.

    Requests of one connection are answered in order, each before the next is read. A closed
    connection releases what it had open. ``start`` and ``close`` belong to the event loop.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        opener: Opener,
        uploads: UploadSlots,
        auth: Auth,
        node: str,
        incarnation: str,
        http_url: str,
        plans: Plans | None = None,
        following: Following | None = None,
    ) -> None:
        """*path*: the socket, in a folder that only this user may enter."""
        self._path = Path(path)
        self._opener = opener
        self._uploads = uploads
        self._auth = auth
        self._node = node
        self._incarnation = incarnation
        self._http_url = http_url
        self._plans = plans
        self._following = following
        self._connections: set[_Connection] = set()
        self._numbers = itertools.count()
        self._finished: deque[tuple[_Connection, Answer]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop's
        self._is_closing = False
        self._thread: threading.Thread | None = None

    @property
    def clients(self) -> set[str]:
        """The connected processes, as ``pid NUMBER``. Callable from any thread."""
        return {connection.process for connection in list(self._connections)}

    async def start(self) -> None:
        """Listen at the path. On return clients can connect."""
        self._loop = asyncio.get_running_loop()
        self._selector = selectors.DefaultSelector()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(self._path))
        self._path.chmod(0o600)
        self._listening.listen(512)
        self._listening.setblocking(False)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._listening, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._on_wake)
        self._thread = threading.Thread(target=self._run, name="descriptors", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Close all connections and remove the socket. Idempotent."""
        if self._thread is None:
            return
        self._is_closing = True
        self._wake()
        await asyncio.to_thread(self._thread.join)
        self._thread = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in list(self._connections):
            self._drop(connection)
        self._finish_all()
        self._selector.close()
        for sock in (self._listening, self._wake_receiver, self._wake_sender):
            sock.close()
        self._path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while not self._is_closing:
            for key, events in self._selector.select():
                if isinstance(key.data, _Connection):
                    self._guarded(key.data, events)
                else:
                    key.data()

    def _guarded(self, connection: _Connection, events: int) -> None:
        """One connection's trouble must not become the others'."""
        if connection.is_closed:
            return
        try:
            if events & selectors.EVENT_WRITE:
                self._send(connection)
            if events & selectors.EVENT_READ:
                self._receive(connection)
            self._process(connection)
        except (OSError, InvalidRequest) as error:
            logger.debug("descriptor socket: %s is closed: %s", connection.client, error)
            self._drop(connection)
        except Exception:
            logger.exception("descriptor socket: a request of %s failed", connection.client)
            self._drop(connection)

    def _accept(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except OSError as error:
            logger.warning("descriptor socket: a connection was lost: %s", error)
            return
        sock.setblocking(False)
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, _ = _PEER.unpack(peer)
        refusal = self._refusal(uid)
        if refusal is not None:
            with contextlib.suppress(OSError), sock:
                sock.send(encode_frame(_error_body(refusal)))
            return
        process = f"pid {pid}"
        connection = _Connection(sock, uid, process, f"{process} #{next(self._numbers)}")
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _refusal(self, uid: int) -> ForebayError | None:
        if uid not in (os.geteuid(), 0):
            return PermissionDenied(
                f"this daemon runs as user {os.geteuid()} and serves that user and root only, "
                f"not user {uid}: start a daemon of your own, or ask for a token"
            )
        if len(self._connections) >= MAX_CONNECTIONS:
            return ResourceExhausted(
                f"{MAX_CONNECTIONS} processes are connected already: stop some of them"
            )
        return None

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError("closed by the client")
        connection.received += data

    def _process(self, connection: _Connection) -> None:
        """Answer what has arrived whole, until something has to wait."""
        while not connection.is_busy:
            request = connection.take_frame()
            if request is None:
                break
            self._handle(connection, request)
        self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        """Select for what the connection can do next; one that waits for us is not read."""
        wanted = selectors.EVENT_WRITE if connection.unsent else 0
        if not connection.is_busy:
            wanted = selectors.EVENT_READ
        registered = self._selector.get_map().get(connection.socket)
        if registered is not None and registered.events == wanted:
            return
        if registered is not None:
            self._selector.unregister(connection.socket)
        if wanted:
            self._selector.register(connection.socket, wanted, connection)

    def _send(self, connection: _Connection) -> None:
        """Send what the socket takes; descriptors ride on the first byte."""
        sock, answer = connection.socket, connection.answer
        with contextlib.suppress(BlockingIOError):
            if answer is not None and answer.descriptors:
                sent = socket.send_fds(sock, [connection.unsent], answer.descriptors)
                answer.close()
            else:
                sent = sock.send(connection.unsent)
            connection.unsent = connection.unsent[sent:]
            connection.answer = None

    def _reply(self, connection: _Connection, answer: Answer) -> None:
        connection.answer = answer
        connection.unsent = encode_frame(answer.body, len(answer.descriptors))
        self._send(connection)

    def _drop(self, connection: _Connection) -> None:
        """Close a connection and release what it had open."""
        if connection.is_closed:
            return
        connection.is_closed = True
        self._connections.discard(connection)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.answer is not None:
            connection.answer.close()
        self._opener.close_client(connection.client)
        if self._plans is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._plans.end_owner, connection.client)

    # --------------------------------------------------------------------------------- requests

    def _handle(self, connection: _Connection, request: dict[str, Any]) -> None:
        try:
            answer = self._answer_fast(connection, request)
            if answer is None:
                self._begin_slow(connection, request)
                return
        except ForebayError as error:
            answer = Answer(_error_body(error))
        self._reply(connection, answer)

    def _answer_fast(self, connection: _Connection, request: dict[str, Any]) -> Answer | None:
        """The answer, None if it takes the event loop to get it."""
        operation = request.get("op")
        if operation == "open":
            opened = self._opener.open_cached(connection.client, _blobs(request))
            return None if opened is None else self._hand_over(connection.client, opened)
        if operation == "release":
            self._opener.release(connection.client, _texts(request, "blobs"))
            return Answer({})
        if operation == "report" or (operation in PLAN_OPERATIONS and self._plans is not None):
            return None
        if operation in FOLLOW_OPERATIONS and self._following is not None:
            return None
        if operation == "hello":
            return self._hello(connection, request)
        if operation == "slot":
            session = check_random_name("session", _text(request, "session"))
            slot = self._uploads.slot(session, connection.uid)
            return Answer({"capacity": slot.capacity_bytes}, [slot.duplicate()])
        raise InvalidRequest(
            f"the descriptor socket knows no operation {operation!r}: upgrade the daemon"
        )

    def _hello(self, connection: _Connection, request: dict[str, Any]) -> Answer:
        offered = _text(request, "protocol")
        return Answer(
            {
                "protocol": agree(offered, protocol_range(), caller="client", here="daemon"),
                "node": self._node,
                "incarnation": self._incarnation,
                "token": self._auth.token(connection.uid),
                "http_url": self._http_url,
            }
        )

    async def _answer_slowly(self, connection: _Connection, request: dict[str, Any]) -> Answer:
        client, operation = connection.client, request["op"]
        if operation in PLAN_OPERATIONS:
            assert self._plans is not None, "else it was refused"
            body = await answer_plan(
                self._plans, operation, request, uid=connection.uid, owner=client
            )
            return Answer(body | self._wanted_back(client))
        if operation in FOLLOW_OPERATIONS:
            assert self._following is not None, "else it was refused"
            if operation == DECIDE:
                return Answer(await answer_decision(self._following, request))
            data = await self._following.manifest(asked_text(request, "manifest"))
            handed = await asyncio.to_thread(as_memory_file, data)
            return Answer({"num_bytes": len(data)}, [handed])
        if operation == "report":
            blob = check_id("blob", _text(request, "blob"))
            healthy = await self._opener.report(
                blob,
                _text(request, "tier"),
                int(request.get("segment", -1)),
                _text(request, "message")[:MAX_MESSAGE_CHARACTERS],
            )
            return Answer({"blob": blob, "healthy": healthy})
        blobs = [check_id("blob", blob) for blob in _blobs(request)]
        plan = request.get("plan")
        plan = plan if isinstance(plan, str) else ""
        waits: dict[str, float] = {}
        results = await self._opener.open(client, blobs, plan, waits=waits)
        answer = self._hand_over(client, results, blobs)
        answer.body["waits"] = waits
        return answer

    def _hand_over(
        self, client: str, results: Sequence[OpenedBlob | ForebayError], blobs: Sequence[str] = ()
    ) -> Answer:
        """The answer to ``open``; what it has no room for is closed, to be asked for again."""
        fitting: list[OpenedBlob | ForebayError | str] = []
        descriptors = extents = 0
        for one in results:
            if isinstance(one, OpenedBlob):
                descriptors += len(one.descriptors)
                extents += len(one.extents)
                if descriptors > MAX_DESCRIPTORS_PER_MESSAGE or extents > MAX_EXTENTS_PER_MESSAGE:
                    one.close()
                    self._opener.release(client, [one.blob])
                    fitting.append(one.blob)
                    continue
            fitting.append(one)
        answer = _entries(fitting, blobs)
        answer.body.update(self._wanted_back(client))
        return answer

    def _wanted_back(self, client: str) -> dict[str, Any]:
        """What goes into an answer where the daemon needs the room of what *client* has open."""
        asked = self._opener.asked_back(client)
        return {"wanted_back": asked} if asked else {}

    # ------------------------------------------------------------------- what the loop works on

    def _begin_slow(self, connection: _Connection, request: dict[str, Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._start_work, connection, request)
        except RuntimeError:  # the loop is closed
            raise DaemonUnavailable("the daemon is stopping: connect again") from None
        connection.is_waiting = True

    def _start_work(self, connection: _Connection, request: dict[str, Any]) -> None:
        task = self._loop.create_task(self._work(connection, request), name="descriptor-request")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, connection: _Connection, request: dict[str, Any]) -> None:
        """On the loop: get an answer, whatever happens, and give it to the server's thread."""
        answer = Answer(_error_body(DaemonUnavailable("the daemon is stopping: connect again")))
        try:
            answer = await self._answer_slowly(connection, request)
        except ForebayError as error:
            answer = Answer(_error_body(error))
        except Exception as error:
            logger.exception("descriptor socket: a request of %s failed", connection.client)
            answer = Answer(_error_body(ForebayError(f"the daemon failed: {error!r}")))
        finally:
            self._finished.append((connection, answer))
            self._wake()

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        self._finish_all()

    def _finish_all(self) -> None:
        while self._finished:
            self._finish(*self._finished.popleft())

    def _finish(self, connection: _Connection, answer: Answer) -> None:
        connection.is_waiting = False
        if connection.is_closed:
            answer.close()
            self._opener.close_client(connection.client)  # it was opened after the end
            return
        try:
            self._reply(connection, answer)
        except (OSError, InvalidRequest):
            self._drop(connection)
            return
        self._guarded(connection, 0)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: a wake is on its way; closed: nobody sleeps
            self._wake_sender.send(b"w")


def _entries(
    opened: Sequence[OpenedBlob | ForebayError | str], blobs: Sequence[str] = ()
) -> Answer:
    """The answer to ``open``: an entry for each blob, and the descriptors they speak of. A name
    stands for a blob that there was no room for."""
    entries: list[dict[str, Any]] = []
    descriptors: list[int] = []
    for index, one in enumerate(opened):
        if isinstance(one, ForebayError):
            entries.append({"blob": blobs[index], **_error_body(one)})
            continue
        if isinstance(one, str):
            entries.append({"blob": one, "again": True})
            continue
        if one.fd < 0:
            entries.append({"blob": one.blob, "length": one.length, "by_http": True})
            continue
        number = len(descriptors)
        descriptors.extend(one.descriptors)
        entries.append(
            {
                "blob": one.blob,
                "length": one.length,
                "tier": one.tier,
                "table": [len(descriptors) - 1, one.table_offset, one.table_length],
                "extents": [
                    [blob_offset, number + which, file_offset, length]
                    for blob_offset, which, file_offset, length in one.extents
                ],
            }
        )
    return Answer({"blobs": entries}, descriptors)


def _error_body(error: ForebayError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": error.message[:MAX_MESSAGE_CHARACTERS]}


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{request.get('op')!r} needs a text {key!r}")
    return value


def _texts(request: dict[str, Any], key: str) -> list[str]:
    value = request.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"{request.get('op')!r} needs a list of texts {key!r}")
    return value


def _blobs(request: dict[str, Any]) -> list[str]:
    blobs = _texts(request, "blobs")
    check_limit("blobs in one open", len(blobs), MAX_DESCRIPTORS_PER_MESSAGE, "open fewer at once")
    return blobs
