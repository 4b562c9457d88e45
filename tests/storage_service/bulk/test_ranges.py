"""Bytes over HTTP, asked for as a client does: over a real socket."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from forebay_server.bulk.held import HeldOpens
from forebay_server.bulk.ranges import make_app, parse_range
from forebay_server.bulk.sending import NUM_THREADS
from forebay_server.bulk.tickets import Auth
from forebay_server.serve.open import OpenedBlob
from forebay_server.serve.promote import KeepWhatFits
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.memory import Slot
from forebay_server.tier.registry import Tiers
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.wrap import ThrottledTier
from forebay_wire.errors import InvalidRequest, NotFound

PIECES = [random_bytes(300_000, 1), random_bytes(200_000, 2)]
DATA = b"".join(PIECES)
LENGTH = len(DATA)
SESSION = "5" * 32


class OneSlot:
    """Uploads with one session."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def slot(self, session: str, uid: int) -> Slot:
        if session != SESSION:
            raise NotFound(f"no session {session}")
        return self._slot


class Served:
    """A storage node behind the byte endpoint."""

    def __init__(self, node: StorageNode) -> None:
        self.node = node
        self.auth = Auth(b"k" * 32, "node")
        self.slot = node.slots.acquire("0:test", 1 << 20, 1 << 20)
        self.is_serving = True

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        app = make_app(
            opener=self.node.opener,
            uploads=OneSlot(self.slot),
            auth=self.auth,
            render_metrics=self.render,
            is_serving=lambda: self.is_serving,
        )
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self.runner.setup()
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        await web.SockSite(self.runner, sock, ssl_context=tls).start()

    async def render(self) -> bytes:
        return b"forebay_up 1\n"

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    async def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        return await asyncio.to_thread(self.ask, method, path, body, headers)

    async def post(self, path: str, body: Any, token: str | None = None) -> tuple[int, Any]:
        bearer = f"Bearer {self.auth.token(0) if token is None else token}"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        response, content = await self.request("POST", path, data, Authorization=bearer)
        return response.status, json.loads(content)

    async def open(self, *blobs: str, client: str = "me") -> list[dict[str, Any]]:
        status, answer = await self.post("/v1/open", {"blobs": blobs, "client": client})
        assert status == 200, answer
        entries: list[dict[str, Any]] = answer["blobs"]
        return entries


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with StorageNode(tmp_path) as node:
        served = Served(node)
        await served.start()
        yield served
        await served.runner.cleanup()
        assert node.opener.open_bytes() == {}


@pytest.fixture
async def path(served: Served) -> str:
    """Where the data of a blob is got, ticket and all."""
    table = await served.node.add_blob(PIECES, "ssd")
    [entry] = await served.open(table.blob_id)
    return f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"


# --------------------------------------------------------------------------------------- reading


async def test_opening_gives_length_tier_and_a_ticket(served: Served) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    found, missing = await served.open(table.blob_id, "0" * 64)
    assert (found["length"], found["tier"]) == (LENGTH, "ssd")
    assert found["table_bytes"] == len(table.encoded)
    assert missing["error"] == "NotFound"
    path = f"/v1/tables/{table.blob_id}?ticket={found['ticket']}"
    assert (await served.request("GET", path))[1] == table.encoded


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-299999", 100, 300_000),
        ("bytes=400000-", 400_000, LENGTH),
        ("bytes=-5", LENGTH - 5, LENGTH),
        ("bytes=499999-600000", 499_999, LENGTH),
    ],
)
async def test_a_range_is_sent(
    served: Served, path: str, header: str, start: int, stop: int
) -> None:
    response, body = await served.request("GET", path, Range=header)
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{LENGTH}"
    assert body == DATA[start:stop]


async def test_without_a_range_all_is_sent(served: Served, path: str) -> None:
    response, body = await served.request("GET", path)
    assert response.status == 200
    assert body == DATA


async def test_head_sends_no_bytes(served: Served, path: str) -> None:
    response, body = await served.request("HEAD", path, Range="bytes=5-9")
    assert (response.status, response.headers["Content-Length"], body) == (206, "5", b"")


@pytest.mark.parametrize("header", ["bytes=500000-", "bytes=5-4", "bytes=0-1,3-4", "rows=1-2"])
async def test_a_range_that_cannot_be_is_416(served: Served, path: str, header: str) -> None:
    response, body = await served.request("GET", path, Range=header)
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{LENGTH}"
    assert json.loads(body)["error"] == "InvalidRequest"


async def test_one_connection_serves_many_ranges(served: Served, path: str) -> None:
    def read_all() -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
        content = b""
        for start in range(0, LENGTH, 100_000):
            connection.request("GET", path, headers={"Range": f"bytes={start}-{start + 99_999}"})
            content += connection.getresponse().read()
        connection.close()
        return content

    assert await asyncio.to_thread(read_all) == DATA


async def test_the_empty_blob_is_empty(served: Served) -> None:
    table = await served.node.add_blob([], "ssd")
    [entry] = await served.open(table.blob_id)
    path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"
    assert (await served.request("GET", path))[1] == b""
    assert (await served.request("GET", path, Range="bytes=0-0"))[0].status == 416


async def test_a_client_that_leaves_midway_disturbs_nobody(served: Served) -> None:
    table = await served.node.add_blob([random_bytes(4 << 20, n) for n in range(8)], "ssd")
    [entry] = await served.open(table.blob_id)
    path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"

    def read_a_little() -> None:
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            sock.recv(1000)

    await asyncio.to_thread(read_a_little)
    assert len((await served.request("GET", path))[1]) == 32 << 20


def read_all(sock: socket.socket, num_bytes: int) -> bytes:
    """The body of the answer."""
    with sock, sock.makefile("rb") as file:
        while file.readline() != b"\r\n":
            pass
        return file.read(num_bytes)


async def test_a_slow_reader_gets_everything_and_holds_no_thread(served: Served) -> None:
    table = await served.node.add_blob([random_bytes(4 << 20, n) for n in range(8)], "ssd")
    [entry] = await served.open(table.blob_id)
    path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(2 * NUM_THREADS)]
    for sock in slow:
        await asyncio.to_thread(sock.sendall, request)
    for _ in range(3):  # while they do not read
        assert len((await served.request("GET", path))[1]) == 32 << 20

    expected = b"".join(random_bytes(4 << 20, n) for n in range(8))
    assert await asyncio.to_thread(read_all, slow.pop(), 32 << 20) == expected
    for sock in slow:
        sock.close()


async def test_slow_readers_of_a_stream_get_everything_and_hold_no_segment(tmp_path: Path) -> None:
    """More of them than there are buffers and threads, each at another segment."""
    pieces = [random_bytes(1 << 20, n) for n in range(48)]
    small = DirectoryTier("ssd", "ssd", tmp_path / "ssd", limit_bytes=1 << 20, reserve_bytes=0)
    slow_tier = RemoteTier("object", f"file://{tmp_path}/object")
    async with StorageNode(tmp_path, (small, slow_tier)) as node:
        served = Served(node)
        await served.start()
        table = await node.add_blob(pieces, "object")
        [entry] = await served.open(table.blob_id)
        path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"
        slow = []
        for start in range(40):
            sock = socket.socket()
            slow.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            await asyncio.to_thread(sock.connect, ("127.0.0.1", served.port))
            request = f"GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes={start << 20}-\r\n\r\n"
            await asyncio.to_thread(sock.sendall, request.encode())
        for _ in range(3):  # while they do not read
            assert (await served.request("GET", path))[1] == b"".join(pieces)
        expected = b"".join(pieces[39:])
        assert await asyncio.to_thread(read_all, slow.pop(), len(expected)) == expected
        for sock in slow:
            sock.close()
        await served.runner.cleanup()


class Told(KeepWhatFits):
    """What readers by a plan waited for."""

    def __init__(self, tiers: Tiers) -> None:
        super().__init__(tiers)
        self.waits: list[tuple[str, Mapping[str, float]]] = []

    def waited(self, plan: str, seconds: Mapping[str, float]) -> None:
        self.waits.append((plan, dict(seconds)))


async def test_waits_for_bytes_of_a_stream_are_told_to_the_plan(tmp_path: Path) -> None:
    pieces = [random_bytes(1 << 20, n) for n in range(12)]
    small = DirectoryTier("ssd", "ssd", tmp_path / "ssd", limit_bytes=1 << 20, reserve_bytes=0)
    store = RemoteTier("object", f"file://{tmp_path}/object")
    async with StorageNode(tmp_path, (small, ThrottledTier(store, 0.02, 1e15))) as node:
        served = Served(node)
        await served.start()
        node.opener.follow(told := Told(node.tiers))
        blob = (await node.add_blob(pieces, "object")).blob_id
        _, answer = await served.post("/v1/open", {"blobs": [blob], "client": "me", "plan": "p"})
        [opening] = told.waits
        assert answer["waits"] == opening[1]
        path = f"/v1/blobs/{blob}?ticket={answer['blobs'][0]['ticket']}"
        response, content = await served.request("GET", path)
        assert content == b"".join(pieces)
        question = {"answer": response.getheader("Forebay-Waits")}
        _, once = await served.post("/v1/waits", question)
        _, again = await served.post("/v1/waits", question)
        assert (once["waits"]["origin"] >= 0.02, again) == (True, {"waits": {}})
        assert (await served.post("/v1/waits", question, token="none"))[0] == 401
        await served.runner.cleanup()
        assert told.waits[0] == opening
        [(plan, reading)] = told.waits[1:]
        assert (opening[0], plan) == ("p", "p")
        assert opening[1]["origin"] >= 0.02
        assert reading == once["waits"]


async def test_of_a_damaged_stream_comes_what_is_good_before_that(tmp_path: Path) -> None:
    pieces = [random_bytes(1 << 20, n) for n in range(12)]
    small = DirectoryTier("ssd", "ssd", tmp_path / "ssd", limit_bytes=1 << 20, reserve_bytes=0)
    slow_tier = RemoteTier("object", f"file://{tmp_path}/object")
    async with StorageNode(tmp_path, (small, slow_tier)) as node:
        served = Served(node)
        await served.start()
        table = await node.add_blob(pieces, "object")
        [entry] = await served.open(table.blob_id)
        path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"
        with (await node.path_of(table.blob_id, "object")).open("r+b") as file:
            file.seek((6 << 20) + 5)
            file.write(bytes([pieces[6][5] ^ 1]))
        sock = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", served.port))
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=7-\r\n\r\n"
        await asyncio.to_thread(sock.sendall, request.encode())
        found = await asyncio.to_thread(read_all, sock, 12 << 20)
        assert found == b"".join(pieces[:6])[7:]
        for start, stop in ((0, 6), (7, 12)):
            wanted = f"bytes={start << 20}-{(stop << 20) - 1}"
            response, data = await served.request("GET", path, Range=wanted)
            assert response.status == 206
            assert data == b"".join(pieces[start:stop])
        await served.runner.cleanup()


async def test_a_file_that_shrank_ends_the_connection(served: Served) -> None:
    table = await served.node.add_blob([random_bytes(4 << 20, n) for n in range(2)], "ssd")
    [entry] = await served.open(table.blob_id)
    os.truncate(await served.node.path_of(table.blob_id, "ssd"), 1000)
    path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        await served.request("GET", path)


async def test_damage_is_reported_and_another_replica_serves(served: Served) -> None:
    table = await served.node.add_blob(PIECES, "ssd", "hdd")
    await served.open(table.blob_id)
    file = await served.node.path_of(table.blob_id, "ssd")
    file.write_bytes(b"x" + file.read_bytes()[1:])
    report = {"blob": table.blob_id, "tier": "ssd", "segment": 0, "message": "xxh3"}
    assert (await served.post("/v1/report", report))[1]["healthy"] is False
    [entry] = await served.open(table.blob_id)
    assert entry["tier"] == "hdd"
    path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"
    assert (await served.request("GET", path))[1] == DATA


@pytest.mark.needs("openssl", package="openssl")
async def test_ranges_travel_through_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    paths = ["-out", str(certificate), "-keyout", str(key)]
    made = await asyncio.create_subprocess_exec(
        *command.split(), "subjectAltName=IP:127.0.0.1", *paths, stderr=asyncio.subprocess.DEVNULL
    )
    assert await made.wait() == 0
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=certificate)
    (tmp_path / "node").mkdir()
    async with StorageNode(tmp_path / "node") as node:
        served = Served(node)
        await served.start(tls)
        table = await node.add_blob(PIECES, "ssd")
        ticket = served.auth.ticket("GET", uid=0, blob=table.blob_id, stop=LENGTH)

        def get() -> bytes:
            connection = http.client.HTTPSConnection("127.0.0.1", served.port, context=trusting)
            headers = {"Range": f"bytes=5-{LENGTH - 1}"}
            connection.request("GET", f"/v1/blobs/{table.blob_id}?ticket={ticket}", headers=headers)
            content = connection.getresponse().read()
            connection.close()
            return content

        assert await asyncio.to_thread(get) == DATA[5:]
        await served.runner.cleanup()


# ------------------------------------------------------------------------------------ open counts


async def test_opens_count_once_a_client_until_the_last_release(served: Served) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    for client in ("one", "one", "two"):
        await served.open(table.blob_id, client=client)
    assert served.node.opener.open_bytes() == {"ssd": 2 * LENGTH}
    for left in (2, 1):
        body = {"blobs": [table.blob_id], "client": "one"}
        assert await served.post("/v1/release", body) == (200, {})
        assert served.node.opener.open_bytes() == {"ssd": left * LENGTH}


async def test_a_ticket_opens_again_what_was_released(served: Served) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    [entry] = await served.open(table.blob_id)
    await served.post("/v1/release", {"blobs": [table.blob_id], "client": "me"})
    assert served.node.opener.open_bytes() == {}
    path = f"/v1/blobs/{table.blob_id}?ticket={entry['ticket']}"
    assert (await served.request("GET", path))[1] == DATA


async def test_unused_opens_are_released_in_time(tmp_path: Path) -> None:
    now = [0.0]
    async with StorageNode(tmp_path) as node:
        table = await node.add_blob(PIECES, "ssd")
        held = HeldOpens(node.opener, unused_seconds=120, clock=lambda: now[0])
        [opened] = await held.open("me", [table.blob_id])
        assert isinstance(opened, OpenedBlob)
        async with held.use("me", table.blob_id) as used:
            now[0] = 1000
            held.release_unused()  # in use
            assert os.pread(used.fd, LENGTH, 0) == DATA
        now[0] = 1119
        held.release_unused()
        assert node.opener.open_bytes() == {"ssd": LENGTH}
        now[0] = 1121
        held.release_unused()
        assert node.opener.open_bytes() == {}
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(used.fd)


async def test_a_descriptor_in_use_outlives_its_release(tmp_path: Path) -> None:
    async with StorageNode(tmp_path) as node:
        table = await node.add_blob(PIECES, "ssd")
        held = HeldOpens(node.opener)
        async with held.use("me", table.blob_id) as used:
            held.close()
            assert node.opener.open_bytes() == {}
            assert os.pread(used.fd, LENGTH, 0) == DATA
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(used.fd)


# --------------------------------------------------------------------------------------- writing


async def test_a_body_lands_in_the_slot(served: Served) -> None:
    ticket = served.auth.ticket("PUT", uid=0, session=SESSION, stop=1 << 20)
    data = random_bytes(600_000, 3)
    path = f"/v1/uploads/{SESSION}?ticket={ticket}&offset=1000"
    response, body = await served.request("PUT", path, data)
    assert (response.status, json.loads(body)) == (200, {"num_bytes": 600_000})
    buffer = bytearray(600_000)
    served.slot.read_into(1000, buffer)
    assert buffer == data


@pytest.mark.parametrize(
    ("stop", "offset", "status"), [(1 << 20, 1 << 20, 400), (1000, 600, 400), (1000, "-1", 400)]
)
async def test_a_body_beyond_slot_or_ticket_is_refused(
    served: Served, stop: int, offset: int | str, status: int
) -> None:
    ticket = served.auth.ticket("PUT", uid=0, session=SESSION, stop=stop)
    path = f"/v1/uploads/{SESSION}?ticket={ticket}&offset={offset}"
    response, _ = await served.request("PUT", path, b"x" * 500)
    assert response.status == status


# ------------------------------------------------------------------------------------- strangers


@pytest.mark.parametrize("token", ["", "v1.0.00", Auth(b"o" * 32, "node").token(0)])
async def test_without_a_token_nothing_opens(served: Served, token: str) -> None:
    for path in ("/v1/open", "/v1/release", "/v1/report"):
        status, answer = await served.post(path, {"blobs": []}, token)
        assert (status, answer["error"]) == (401, "Unauthenticated")


async def test_a_ticket_opens_its_own_blob_range_and_session_only(
    served: Served, path: str
) -> None:
    other = await served.node.add_blob([b"other"], "ssd")
    ticket = path.partition("ticket=")[2]
    blob = path.partition("/v1/blobs/")[2][:64]
    narrow = served.auth.ticket("GET", uid=0, blob=blob, start=5, stop=10)
    put = served.auth.ticket("PUT", uid=0, session=SESSION, stop=10)
    for method, url, status in [
        ("GET", f"/v1/blobs/{other.blob_id}?ticket={ticket}", 403),
        ("GET", f"/v1/tables/{other.blob_id}?ticket={ticket}", 403),
        ("GET", f"/v1/blobs/{blob}?ticket={narrow}", 403),
        ("GET", f"/v1/blobs/{blob}?ticket={put}", 403),
        ("GET", f"/v1/blobs/{blob}?ticket=x.y", 401),
        ("GET", f"/v1/blobs/{blob}", 401),
        ("PUT", f"/v1/uploads/{'6' * 32}?ticket={put}", 403),
        ("PUT", f"/v1/uploads/{SESSION}?ticket={ticket}", 403),
    ]:
        assert (await served.request(method, url, b"" if method == "PUT" else None))[0].status == (
            status
        ), url
    response, body = await served.request(
        "GET", f"/v1/blobs/{blob}?ticket={narrow}", Range="bytes=5-9"
    )
    assert (response.status, body) == (206, DATA[5:10])


@pytest.mark.parametrize("body", [b"", b"[]", b"{", {"blobs": 1}, {"blobs": ["x"]}, {"blobs": [1]}])
async def test_a_wrong_request_is_explained(served: Served, body: Any) -> None:
    status, answer = await served.post("/v1/open", body)
    assert (status, answer["error"]) == (400, "InvalidRequest")


async def test_an_unknown_path_is_404_in_json(served: Served) -> None:
    response, body = await served.request("GET", "/v1/nothing")
    assert (response.status, json.loads(body)["error"]) == (404, "NotFound")


async def test_health_and_metrics_are_open_to_all(served: Served) -> None:
    assert (await served.request("GET", "/healthz"))[0].status == 200
    served.is_serving = False
    assert (await served.request("GET", "/healthz"))[0].status == 503
    response, body = await served.request("GET", "/metrics")
    assert (body, response.headers["Content-Type"].split(";")[0]) == (
        b"forebay_up 1\n",
        "text/plain",
    )


def test_no_header_is_no_range() -> None:
    assert parse_range(None, 5) is None
    with pytest.raises(InvalidRequest):
        parse_range("bytes=-0", 5)
