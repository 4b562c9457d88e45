"""The descriptor socket, spoken to as a client does: over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forebay_server.bulk.descriptors import DescriptorServer
from forebay_server.bulk.tickets import Auth
from forebay_server.testing.node import StorageNode
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.memory import Slot
from forebay_wire.errors import (
    DaemonUnavailable,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    VersionMismatch,
)
from forebay_wire.handover import (
    HEADER,
    MAGIC,
    VERSION,
    encode_frame,
    raise_if_error,
    receive_frame,
    send_frame,
)
from forebay_wire.protocol import protocol_range

PIECES = [random_bytes(300_000, 1), random_bytes(200_000, 2)]
DATA = b"".join(PIECES)
SESSION = "5" * 32


class OneSlot:
    """Uploads with one session, of this user."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def slot(self, session: str, uid: int) -> Slot:
        if session != SESSION:
            raise NotFound(f"no session {session}")
        if uid != os.geteuid():
            raise PermissionDenied("another user's")
        return self._slot


class Served:
    """A storage node behind a descriptor socket."""

    def __init__(self, node: StorageNode, path: Path) -> None:
        self.node = node
        self.path = path
        self.auth = Auth(b"k" * 32, "node")
        self.slot = node.slots.acquire("0:test", 1 << 20, 1 << 20)
        self.server = DescriptorServer(
            path,
            opener=node.opener,
            uploads=OneSlot(self.slot),
            auth=self.auth,
            node="node",
            incarnation="this one",
            http_url="http://127.0.0.1:1",
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - another thread's state, which tells nobody
                await asyncio.sleep(0.005)


class Client:
    """One connection; requests run in a thread, as the server's slow path needs the loop."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(str(path))

    def ask(self, **request: Any) -> tuple[dict[str, Any], list[int]]:
        send_frame(self.socket, request, [])
        body, descriptors = receive_frame(self.socket)
        return raise_if_error(body), descriptors

    async def request(self, **request: Any) -> tuple[dict[str, Any], list[int]]:
        return await asyncio.to_thread(self.ask, **request)


def open_below(folder: Path) -> list[Path]:
    """The files below *folder* that this process has open."""
    found = [Path(link_of(fd)) for fd in os.listdir("/proc/self/fd")]
    return [path for path in found if path.is_relative_to(folder)]


def link_of(descriptor: int | str) -> str:
    """What a descriptor of this process stands for; empty: it is closed by now."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with StorageNode(tmp_path) as node:
        served = Served(node, tmp_path / "data.sock")
        await served.server.start()
        yield served
        await served.server.close()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    client = Client(served.path)
    yield client
    client.socket.close()


async def test_the_socket_is_the_users_own_and_goes_at_the_end(tmp_path: Path) -> None:
    async with StorageNode(tmp_path) as node:
        served = Served(node, tmp_path / "data.sock")
        await served.server.start()
        assert stat.S_IMODE(served.path.stat().st_mode) == 0o600
        await served.server.close()
        await served.server.close()
        assert not served.path.exists()


async def test_hello_tells_who_and_where(served: Served, client: Client) -> None:
    answer, _ = await client.request(op="hello", protocol=protocol_range(), pid=1, name="test")
    assert served.auth.check_token(answer.pop("token")) == os.geteuid()
    assert answer == {
        "protocol": 1,
        "node": "node",
        "incarnation": "this one",
        "http_url": "http://127.0.0.1:1",
    }


async def test_a_client_of_another_version_learns_whom_to_upgrade(client: Client) -> None:
    with pytest.raises(VersionMismatch, match="upgrade the daemon"):
        await client.request(op="hello", protocol="7-9", pid=1, name="test")


async def test_many_blobs_come_with_a_descriptor_each(served: Served, client: Client) -> None:
    tables = [await served.node.add_blob([random_bytes(1000, n)], "ssd") for n in range(64)]
    for _ in range(2):  # first by the catalog, then by the cache
        blobs = [table.blob_id for table in tables]
        answer, descriptors = await client.request(op="open", blobs=blobs)
        assert len(descriptors) == 64
        for number, entry in enumerate(answer["blobs"]):
            [[blob_offset, index, file_offset, length]] = entry["extents"]
            assert (entry["blob"], blob_offset) == (blobs[number], 0)
            assert os.pread(descriptors[index], length, file_offset) == random_bytes(1000, number)
            index, offset, length = entry["table"]
            assert os.pread(descriptors[index], length, offset) == tables[number].encoded
        for descriptor in descriptors:
            os.close(descriptor)


async def test_one_missing_blob_does_not_spoil_the_others(served: Served, client: Client) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    answer, descriptors = await client.request(op="open", blobs=["0" * 64, table.blob_id])
    missing, found = answer["blobs"]
    assert (missing["blob"], missing["error"]) == ("0" * 64, "NotFound")
    assert os.pread(descriptors[found["table"][0]], len(DATA), 0) == DATA
    os.close(descriptors[0])


async def test_opens_count_until_released(served: Served, client: Client) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    for _ in range(2):
        _, descriptors = await client.request(op="open", blobs=[table.blob_id])
        os.close(descriptors[0])
    assert served.node.opener.open_bytes() == {"ssd": 2 * len(DATA)}
    await client.request(op="release", blobs=[table.blob_id])
    assert served.node.opener.open_bytes() == {"ssd": len(DATA)}


async def test_a_closed_connection_releases_everything(served: Served, client: Client) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    _, descriptors = await client.request(op="open", blobs=[table.blob_id])
    assert len(served.server.clients) == 1
    client.socket.close()
    await served.until(lambda: not served.server.clients)
    await served.until(lambda: served.node.opener.open_bytes() == {})
    assert os.pread(descriptors[0], len(DATA), 0) == DATA  # what was handed over stays usable
    os.close(descriptors[0])


async def test_a_client_that_leaves_before_the_answer_holds_nothing(
    served: Served, client: Client
) -> None:
    table = await served.node.add_blob(PIECES, "object")
    send_frame(client.socket, {"op": "open", "blobs": [table.blob_id]}, [])
    client.socket.close()
    await served.until(lambda: served.node.tiers.get("ssd").space().num_files == 1)
    await served.until(lambda: not served.server.clients)
    await served.until(lambda: served.node.opener.open_bytes() == {})


async def test_requests_sent_at_once_are_answered_in_order(served: Served, client: Client) -> None:
    slow = await served.node.add_blob(PIECES, "object")
    fast = await served.node.add_blob([b"fast"], "ssd")
    _, descriptors = await client.request(op="open", blobs=[fast.blob_id])
    os.close(descriptors[0])
    blobs = [slow.blob_id, fast.blob_id, slow.blob_id, fast.blob_id]

    def ask_all() -> Iterator[str]:
        client.socket.sendall(
            b"".join(encode_frame({"op": "open", "blobs": [blob]}) for blob in blobs)
        )
        for _ in blobs:
            body, descriptors = receive_frame(client.socket)
            os.close(descriptors[0])
            yield body["blobs"][0]["blob"]

    assert await asyncio.to_thread(lambda: list(ask_all())) == blobs


async def test_damage_is_reported_and_another_replica_serves(
    served: Served, client: Client
) -> None:
    table = await served.node.add_blob(PIECES, "ssd", "hdd")
    path = await served.node.path_of(table.blob_id, "ssd")
    path.write_bytes(b"x" + path.read_bytes()[1:])
    report = {"op": "report", "blob": table.blob_id, "segment": 0, "message": "xxh3"}
    assert not (await client.request(tier="ssd", **report))[0]["healthy"]
    assert (await client.request(tier="hdd", **report))[0]["healthy"]
    answer, descriptors = await client.request(op="open", blobs=[table.blob_id])
    os.close(descriptors[0])
    assert answer["blobs"][0]["tier"] == "hdd"


async def test_a_slot_is_shared_memory(served: Served, client: Client) -> None:
    answer, [descriptor] = await client.request(op="slot", session=SESSION)
    assert answer == {"capacity": 1 << 20}
    with mmap.mmap(descriptor, answer["capacity"]) as memory:
        memory[:5] = b"hello"
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
    buffer = bytearray(5)
    served.slot.read_into(0, buffer)
    assert buffer == b"hello"
    with pytest.raises(NotFound):
        await client.request(op="slot", session="6" * 32)


# ---------------------------------------------------------------------------------- bad clients


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"op": "dance"}, InvalidRequest),
        ({}, InvalidRequest),
        ({"op": "open"}, InvalidRequest),
        ({"op": "open", "blobs": "x"}, InvalidRequest),
        ({"op": "open", "blobs": ["../../etc/passwd"]}, InvalidRequest),
        ({"op": "open", "blobs": [1]}, InvalidRequest),
        ({"op": "open", "blobs": ["0" * 64] * 65}, LimitExceeded),
        ({"op": "slot", "session": "../x"}, InvalidRequest),
        ({"op": "report", "blob": "0" * 64, "message": ""}, InvalidRequest),
    ],
)
async def test_a_wrong_request_is_answered_and_the_connection_lives(
    client: Client, request_: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await client.request(**request_)
    with pytest.raises(NotFound):
        raise_if_error((await client.request(op="open", blobs=["0" * 64]))[0]["blobs"][0])


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        HEADER.pack(MAGIC, VERSION, 0, 1 << 30),
        HEADER.pack(MAGIC, VERSION + 1, 0, 2) + b"{}",
        HEADER.pack(MAGIC, VERSION, 3, 2) + b"{}",
        HEADER.pack(MAGIC, VERSION, 0, 2) + b"[]",
        HEADER.pack(MAGIC, VERSION, 0, 4) + b"\xff{{{",
    ],
)
async def test_garbage_ends_that_connection_only(
    served: Served, client: Client, garbage: bytes
) -> None:
    other = Client(served.path)
    client.socket.sendall(garbage)
    with pytest.raises((DaemonUnavailable, ConnectionResetError)):
        await asyncio.to_thread(receive_frame, client.socket)
    await other.request(op="release", blobs=[])
    other.socket.close()


async def test_descriptors_sent_to_the_daemon_are_not_kept(client: Client) -> None:
    def links() -> list[str]:
        return [found for fd in os.listdir("/proc/self/fd") if (found := link_of(fd)) == own]

    own = link_of(client.socket.fileno())
    frame = encode_frame({"op": "release", "blobs": []})
    socket.send_fds(client.socket, [frame], [client.socket.fileno()] * 5)
    await asyncio.to_thread(receive_frame, client.socket)
    assert links() == [own]


async def test_a_client_that_does_not_read_blocks_nobody(served: Served, client: Client) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    client.socket.setblocking(False)
    frame = encode_frame({"op": "open", "blobs": [table.blob_id] * 4})
    with contextlib.suppress(BlockingIOError):
        for _ in range(100_000):
            client.socket.send(frame)
    other = Client(served.path)
    _, descriptors = await other.request(op="open", blobs=[table.blob_id])
    os.close(descriptors[0])
    other.socket.close()


async def test_no_descriptor_leaks(served: Served, client: Client) -> None:
    table = await served.node.add_blob(PIECES, "ssd")
    for _ in range(3):
        _, descriptors = await client.request(op="open", blobs=[table.blob_id, "0" * 64])
        os.close(descriptors[0])
        _, descriptors = await client.request(op="open", blobs=[table.blob_id] * 10)
        for descriptor in descriptors:
            os.close(descriptor)
    (await served.node.path_of(table.blob_id, "ssd")).unlink()
    answer, _ = await client.request(op="open", blobs=[table.blob_id])
    assert answer["blobs"][0]["error"] == "IntegrityError"
    folder = served.node.folder / "ssd"
    assert open_below(folder) == [folder / "lock"]  # held while the tier is open


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused(served: Served) -> None:
    served.path.parent.chmod(0o711)
    served.path.chmod(0o666)
    code = """
import os, socket, sys
from forebay_wire.handover import receive_frame
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect(f"/proc/self/fd/{sys.argv[1]}/data.sock")
print(receive_frame(sock)[0]["error"])
"""
    folder = os.open(served.path.parent, os.O_PATH)  # its parents are closed to others
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(folder), stdout=asyncio.subprocess.PIPE, pass_fds=[folder]
    )
    output, _ = await process.communicate()
    os.close(folder)
    assert output.decode().strip() == "PermissionDenied"
