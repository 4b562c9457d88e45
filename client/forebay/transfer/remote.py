"""Bytes from elsewhere: HTTP ranges straight into the reader's memory, checked as they arrive."""

from __future__ import annotations

import contextlib
import http.client
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote

from forebay.forking import watch
from forebay.stopwatch import timed
from forebay.transfer.blob import NO_SEGMENT, REOPENS, Blob, Checks, Damage, Piece, UploadSlot
from forebay.transfer.connection import DescriptorConnection
from forebay.transfer.http import (
    HttpPool,
    HttpRequest,
    Refused,
    json_request,
    read_exactly,
    read_json,
)
from forebay.transfer.wanted import WantedBack, current_plan
from forebay.transfer.window import POOL
from forebay.waiting import RECONNECT_SECONDS, Backoff, Deadline
from forebay_wire.errors import (
    DaemonUnavailable,
    ForebayError,
    IntegrityError,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    rebuild,
)
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MAX_DESCRIPTORS_PER_MESSAGE, MAX_SEGMENTS_PER_BLOB, MIB
from forebay_wire.protocol import WAITS_HEADER, DataEndpoint
from forebay_wire.segments import SegmentTable, table_bytes_for

REQUEST_BYTES: Final = 64 * MIB
"""One range request: long, to hide its round trip; if cut, it goes on after the last segment."""

PUT_BYTES: Final = 64 * MIB
"""One piece of an upload slot."""

MAX_CUTS: Final = 2
"""Answers that end early at the same segment, before that counts as damage of the replica."""

Result = TypeVar("Result")


class RemoteTransfer:
    """Bytes by HTTP; see :class:`forebay.transfer.Transfer`."""

    def __init__(self, endpoint: DataEndpoint, wanted_back: WantedBack | None = None) -> None:
        """*wanted_back*: shared with another transfer of the same process."""
        self.endpoint = endpoint
        self._pool = HttpPool(endpoint.http_url)
        self._token = endpoint.token
        self._releases: deque[str] = deque()
        self._client = new_random_name()
        self._num_opens = 0
        self.wanted_back = wanted_back or WantedBack()
        watch(self)

    def open(self, blobs: Sequence[str], context: str = "") -> list[Blob]:
        opened: list[Blob] = []
        try:
            for start in range(0, len(blobs), MAX_DESCRIPTORS_PER_MESSAGE):
                ids = blobs[start : start + MAX_DESCRIPTORS_PER_MESSAGE]
                self.flush_releases()  # what ended counts against the limit until it is sent
                entries = self.open_entries(ids, context)
                opened.extend(self._blob(entry, context) for entry in entries)
        except BaseException:
            for blob in opened:
                blob.close()
            raise
        return opened

    def upload_slot(
        self,
        session: str,
        slot_bytes: int,
        put_ticket: str = "",
        renew_ticket: Callable[[], str] | None = None,
    ) -> UploadSlot:
        return _RemoteSlot(self, session, slot_bytes, put_ticket, renew_ticket)

    def report(self, blob: str, tier: str, segment: int, message: str) -> bool:
        body = {"blob": blob, "tier": tier, "segment": segment, "message": message}
        return bool(self.post("/v1/report", body)["healthy"])

    def plan(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(f"/v1/plans/{operation}", {**body, "client": self._client}, wait=0.0)
        self.wanted_back.tell(answer)
        return answer

    def decide_version(self, question: dict[str, Any]) -> dict[str, Any]:
        return self.post("/v1/decisions", question)

    def manifest(self, manifest: str) -> bytes:
        body = {"manifest": manifest}
        return self.exchange(
            lambda: json_request("/v1/manifests", body, self._token), lambda found: found.read()
        )

    def close(self) -> None:
        self._flush_releases(1)
        self._pool.close()

    def forget_parent(self) -> None:
        """In a child of fork: what the parent opened is the parent's to release."""
        self._client = new_random_name()
        self._releases = deque()
        self._num_opens = 0

    # What blobs and slots call.

    def open_entries(self, blobs: Sequence[str], context: str) -> list[dict[str, Any]]:
        """The daemon's entries for *blobs*, or the first one's exception."""
        body = {"blobs": list(blobs), "client": self._client, **current_plan()}
        with timed("open") as opening:
            answer = self.post("/v1/open", body)
            opening.explain(answer.get("waits"))
        self.wanted_back.tell(answer)
        entries: list[dict[str, Any]] = answer["blobs"]
        self._num_opens += sum("error" not in entry for entry in entries)
        for entry in entries:
            if "error" in entry:
                self._releases.extend(other["blob"] for other in entries if "error" not in other)
                note = f" ({context})" if context else ""
                raise rebuild(str(entry["error"]), "UNKNOWN", f"{entry['message']}{note}")
        return entries

    def waits_of(self, answer: str) -> object:
        """What the daemon waited for in an *answer* that came as it arrived: cause to seconds."""
        try:
            return self.post("/v1/waits", {"answer": answer}, wait=0.0).get("waits")
        except ForebayError:  # one that was restarted: then it is the network's
            return None

    def release_later(self, blob: str) -> None:
        """Note that one open has ended; sent when there are enough. Never blocks."""
        self._releases.append(blob)

    def flush_releases(self) -> None:
        """Send what has been noted if it is a batch, or the last."""
        self._flush_releases(min(MAX_DESCRIPTORS_PER_MESSAGE, max(1, self._num_opens)))

    def post(
        self, path: str, body: dict[str, Any], wait: float = RECONNECT_SECONDS
    ) -> dict[str, Any]:
        """The answer to a JSON request with the token."""
        return self.exchange(lambda: json_request(path, body, self._token), read_json, wait)

    def exchange(
        self,
        make_request: Callable[[], HttpRequest],
        read: Callable[[http.client.HTTPResponse], Result],
        wait: float = RECONNECT_SECONDS,
    ) -> Result:
        """One exchange, repeated with back-off for *wait* seconds while the daemon is away."""
        deadline = Deadline(wait)
        backoff = Backoff()
        while True:
            try:
                return self._pool.exchange(make_request(), read)
            except Refused as refusal:
                if not isinstance(refusal.error, DaemonUnavailable) or not backoff.pause(deadline):
                    raise refusal.error from None
            except (OSError, http.client.HTTPException) as error:
                self._pool.close()  # what is idle there is most likely as dead
                if not backoff.pause(deadline):
                    raise self._unavailable(error, wait) from error
                self._look_again()

    def _flush_releases(self, at_least: int) -> None:
        if len(self._releases) < at_least:
            return
        blobs = []
        with contextlib.suppress(IndexError):  # another thread may take some of them
            while True:
                blobs.append(self._releases.popleft())
        self._num_opens -= len(blobs)
        with contextlib.suppress(ForebayError):  # the daemon releases in time what nobody uses
            self.post("/v1/release", {"blobs": blobs, "client": self._client}, wait=0.0)

    def _look_again(self) -> None:
        """A restarted daemon may serve bytes on another port: its socket's path stays the same.

        Without a socket the port most likely does, and else a control connection tells.
        """
        if not self.endpoint.descriptor_socket:
            return
        with contextlib.suppress(DaemonUnavailable):
            connection, hello = DescriptorConnection.connect(self.endpoint.descriptor_socket)
            connection.close()
            self._turn_to(hello.http_url, hello.token)

    def follow(self, endpoint: DataEndpoint) -> None:
        """The daemon has been found at *endpoint*: go on there. Thread-safe."""
        self.endpoint = endpoint
        self._turn_to(endpoint.http_url, endpoint.token)

    def _turn_to(self, http_url: str, token: str) -> None:
        self._token = token
        if http_url != self._pool.url:
            self._pool = HttpPool(http_url)

    def _unavailable(self, error: Exception, seconds: float) -> DaemonUnavailable:
        return DaemonUnavailable(
            f"the daemon's byte endpoint {self._pool.url} has not answered for {seconds:.0f} s "
            f"({type(error).__name__}: {error}): start the daemon, or check that this host may "
            "reach that address"
        )

    def _blob(self, entry: dict[str, Any], context: str) -> RemoteBlob:
        """The blob of an entry; a table that arrives damaged is reported and asked for again."""
        tries = 0
        while True:
            where = f"{context}, tier {entry['tier']}" if context else f"tier {entry['tier']}"
            try:
                return RemoteBlob(self, self._table(entry, where), entry, context)
            except IntegrityError as error:
                self.release_later(entry["blob"])
                tries += 1
                self.report(entry["blob"], str(entry["tier"]), NO_SEGMENT, error.message)
                if tries > REOPENS:
                    raise
                [entry] = self.open_entries([entry["blob"]], context)

    def _table(self, entry: dict[str, Any], where: str) -> SegmentTable:
        blob, ticket, num_bytes = entry["blob"], entry["ticket"], int(entry["table_bytes"])
        if num_bytes > table_bytes_for(MAX_SEGMENTS_PER_BLOB):
            raise IntegrityError(f"segment table of {num_bytes} bytes ({where})")
        data = memoryview(bytearray(num_bytes))
        with timed("network"):
            self.exchange(
                lambda: HttpRequest("GET", f"/v1/tables/{blob}?ticket={quote(ticket)}"),
                lambda response: read_exactly(response, data),
            )
        return SegmentTable.decode(data, where, blob)


class RemoteBlob(Blob):
    """A blob whose bytes come when asked for; nothing of it is kept here."""

    def __init__(
        self, transfer: RemoteTransfer, table: SegmentTable, entry: dict[str, Any], context: str
    ) -> None:
        super().__init__(entry["blob"], table, context)
        self.tier = str(entry["tier"])
        self._transfer = transfer
        self._ticket = str(entry["ticket"])
        self._nothing = Checks(table.num_segments)  # what came over a network is always checked
        self._release = weakref.finalize(self, transfer.release_later, self.id)
        self._release.atexit = False

    def close(self) -> None:
        self._release()
        self._transfer.flush_releases()

    def _map(self, offset: int, length: int) -> memoryview:
        covering = self._covering(offset, length)
        start = self._borders[covering.start]
        window = POOL.lend(self._borders[covering.stop] - start)
        self._read_into(start, window)
        return window[offset - start : offset - start + length].toreadonly()

    def _read_into(self, offset: int, target: memoryview) -> None:
        if not self._release.alive:
            raise self._closed()
        position, pieces = self._pieces(offset, target, self._nothing)
        renewals = 0
        while pieces:
            try:
                done = self._fetch(position, pieces)
            except (Unauthenticated, PermissionDenied, NotFound):
                renewals += 1
                if renewals > REOPENS:
                    raise
                self._renew()  # tickets are short-lived, and so are opens that nobody used
                continue
            position += sum(len(piece.view) for piece in pieces[:done])
            del pieces[:done]

    def _fetch(self, position: int, pieces: list[Piece]) -> int:
        """Get and check the first of *pieces* in one range request; how many are done."""
        count, num_bytes = 0, 0
        while count < len(pieces) and (
            count == 0 or num_bytes + len(pieces[count].view) <= REQUEST_BYTES
        ):
            num_bytes += len(pieces[count].view)
            count += 1
        done = num_cuts = 0
        waits = ""

        def request() -> HttpRequest:
            start = position + sum(len(piece.view) for piece in pieces[:done])
            return HttpRequest(
                "GET",
                f"/v1/blobs/{self.id}?ticket={quote(self._ticket)}",
                {"Range": f"bytes={start}-{position + num_bytes - 1}"},
            )

        def read(response: http.client.HTTPResponse) -> None:
            nonlocal done, num_cuts, waits
            waits = response.getheader(WAITS_HEADER) or ""
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                raise http.client.HTTPException(f"a range was asked for, not {response.status}")
            while done < count:
                try:
                    read_exactly(response, pieces[done].view)
                except (http.client.IncompleteRead, ConnectionError):
                    # The daemon went away, or its file ends early: it can only hang up then.
                    num_cuts += 1
                    if num_cuts > MAX_CUTS:
                        raise Damage(pieces[done].segment or 0, "is cut short") from None
                    raise
                self._arrived(pieces[done])
                done, num_cuts = done + 1, 0

        with timed("network") as fetching:
            self._transfer.exchange(request, read)
            if waits and fetching.counts:
                fetching.explain(self._transfer.waits_of(waits))
        return done

    def _renew(self) -> None:
        [entry] = self._transfer.open_entries([self.id], self.context)
        self._transfer.release_later(self.id)  # the open before this one
        self._ticket, self.tier = str(entry["ticket"]), str(entry["tier"])

    def _reopen(self) -> None:
        self._renew()

    def _report(self, damage: Damage) -> None:
        self._transfer.report(self.id, self.tier, damage.segment, damage.reason)


class _RemoteSlot(UploadSlot):
    """Own warm memory, sent to the daemon's slot by PUT."""

    def __init__(
        self,
        transfer: RemoteTransfer,
        session: str,
        slot_bytes: int,
        ticket: str,
        renew_ticket: Callable[[], str] | None,
    ) -> None:
        self.buffer = POOL.lend(slot_bytes)
        self._transfer = transfer
        self._session = session
        self._ticket = ticket
        self._renew_ticket = renew_ticket

    def flush(self, num_bytes: int, start: int = 0) -> None:
        for offset in range(start, num_bytes, PUT_BYTES):
            part = self.buffer[offset : min(offset + PUT_BYTES, num_bytes)]
            try:
                self._put(offset, part)
            except Unauthenticated:
                if self._renew_ticket is None:
                    raise
                self._ticket = self._renew_ticket()
                self._put(offset, part)

    def _put(self, start: int, part: memoryview) -> None:
        self._transfer.exchange(
            lambda: HttpRequest(
                "PUT",
                f"/v1/uploads/{self._session}?ticket={quote(self._ticket)}&offset={start}",
                {"Content-Type": "application/octet-stream"},
                part,
            ),
            lambda response: response.read(),
        )

    def close(self) -> None:
        self.buffer = memoryview(bytearray())
