"""Reads over plain sockets: whole, bounded in time, and by connections that are kept."""

from __future__ import annotations

import fcntl
import http.server
import re
import socket
import socketserver
import ssl
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from botocore.credentials import ReadOnlyCredentials

from forebay_server.testing.tier_contract import MIB, random_bytes
from forebay_server.tier import s3_reads
from forebay_server.tier.s3 import S3Client
from forebay_server.tier.s3_options import S3Options
from forebay_server.tier.s3_reads import (
    Denied,
    Elsewhere,
    Signer,
    SocketReads,
    goes_by_proxy,
    got_of,
)
from forebay_server.tier.store_client import StoreFault

DATA = random_bytes(MIB + 12345, 3)


@dataclass
class Server:
    """Answers ranged reads of DATA; what else it does is up to a test."""

    behave: Callable[[http.server.BaseHTTPRequestHandler], bool] = lambda handler: False
    """True: it has answered."""
    num_connections: int = 0
    num_open: int = 0
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(None) as told:
        yield told


@contextmanager
def serving(tls: ssl.SSLContext | None) -> Iterator[Server]:
    told = Server()
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            with lock:
                told.num_connections += 1
                told.num_open += 1

        def finish(self) -> None:
            with lock:
                told.num_open -= 1
            super().finish()

        def do_GET(self) -> None:
            told.requests.append({name.lower(): value for name, value in self.headers.items()})
            if told.behave(self):
                return
            send_range(self)

        def log_message(self, *arguments: object) -> None:
            pass

    class Threads(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True

    with Threads(("localhost", 0), Handler) as listener:
        scheme = "http"
        if tls is not None:
            scheme, listener.socket = "https", tls.wrap_socket(listener.socket, server_side=True)
        told.url = f"{scheme}://localhost:{listener.server_address[1]}/bucket/key?signed=yes"
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield told
        finally:
            listener.shutdown()
            thread.join()


def send_range(handler: http.server.BaseHTTPRequestHandler, *, keep: bool = True) -> None:
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", handler.headers["Range"])
    assert found is not None
    first = int(found[1]) if found[1] else max(0, len(DATA) - int(found[2]))
    last = min(len(DATA) - 1, int(found[2])) if found[1] else len(DATA) - 1
    handler.send_response(206)
    handler.send_header("Content-Length", str(last - first + 1))
    handler.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
    handler.send_header("ETag", '"tag"')
    if not keep:
        handler.send_header("Connection", "close")
        handler.close_connection = True
    handler.end_headers()
    handler.wfile.write(DATA[first : last + 1])


@pytest.fixture
def reads() -> Iterator[SocketReads]:
    found = SocketReads(is_tls=False, ca_file=None)
    yield found
    found.close()


def read(reads: SocketReads, url: str, first: int, last: int, seconds: float = 20.0) -> bytes:
    view = memoryview(bytearray(last - first + 1))
    got = reads.read(url, {"Range": f"bytes={first}-{last}"}, first, view, seconds)
    assert got.size_bytes == len(DATA)
    return bytes(view[: got.num_bytes])


def test_a_range_lands_in_the_callers_buffer_and_the_connection_is_kept(
    reads: SocketReads, server: Server
) -> None:
    assert read(reads, server.url, 0, len(DATA) - 1) == DATA
    assert read(reads, server.url, 7, 70_000) == DATA[7:70_001]
    assert read(reads, server.url, len(DATA) - 10, len(DATA) + 10) == DATA[-10:]
    tail = memoryview(bytearray(100))
    got = reads.read(server.url, {"Range": "bytes=-100", "If-Match": '"tag"'}, None, tail, 20)
    assert bytes(tail) == DATA[-100:]
    assert got.headers["etag"] == '"tag"'
    assert server.requests[-1]["if-match"] == '"tag"'
    assert server.num_connections == 1


def test_readers_at_a_time_have_a_connection_each(reads: SocketReads, server: Server) -> None:
    gathered = threading.Barrier(4)

    def gather(handler: http.server.BaseHTTPRequestHandler) -> bool:
        gathered.wait(20)
        return False

    server.behave = gather
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(read(reads, server.url, 0, MIB)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [DATA[: MIB + 1]] * 4
    assert server.num_connections == 4


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "silent"])
def test_a_connection_that_the_server_closes_is_replaced(
    reads: SocketReads, server: Server, is_told: bool
) -> None:
    def close(handler: http.server.BaseHTTPRequestHandler) -> bool:
        send_range(handler, keep=not is_told)
        handler.close_connection = True
        return True

    server.behave = close
    for _ in range(3):
        assert read(reads, server.url, 0, 1000) == DATA[:1001]
    assert server.num_connections == 3


def test_one_that_was_idle_for_long_is_not_used_again(
    reads: SocketReads, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(reads, server.url, 0, 10)
    monkeypatch.setattr(s3_reads, "IDLE_SECONDS", 0.0)
    read(reads, server.url, 0, 10)
    assert server.num_connections == 2


def test_a_connection_that_breaks_tells_what_has_come(reads: SocketReads, server: Server) -> None:
    def cut(handler: http.server.BaseHTTPRequestHandler) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Length", "1000")
        handler.send_header("Content-Range", f"bytes 0-999/{len(DATA)}")
        handler.end_headers()
        handler.wfile.write(DATA[:400])
        handler.close_connection = True
        return True

    server.behave = cut
    with pytest.raises(StoreFault) as failed:
        read(reads, server.url, 0, 999)
    assert (failed.value.kind, failed.value.num_bytes) == ("busy", 400)
    server.behave = lambda handler: False
    assert read(reads, server.url, 0, 999) == DATA[:1000]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_unsent(sock: socket.socket) -> int:
    """Bytes that the other side has not acknowledged."""
    (found,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return int(found)


@pytest.mark.parametrize("end", ["closed", "reset", "stalled"])
def test_what_came_before_a_large_answer_broke_is_told(
    reads: SocketReads, server: Server, end: str
) -> None:
    piece, stop = random_bytes(3 * MIB, 4), threading.Event()

    def cut(handler: http.server.BaseHTTPRequestHandler) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Length", str(4 * MIB))
        handler.send_header("Content-Range", f"bytes 0-{4 * MIB - 1}/{4 * MIB}")
        handler.end_headers()
        handler.wfile.write(piece)
        handler.close_connection = True
        if end == "reset":  # which throws away what is unsent
            wait_until(lambda: num_unsent(handler.connection) == 0)
            handler.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            handler.rfile.close()
            handler.connection.close()
        elif end == "stalled":
            stop.wait(20)
        return True

    server.behave = cut
    view = memoryview(bytearray(4 * MIB))
    with pytest.raises(StoreFault) as failed:
        reads.read(server.url, {"Range": "bytes=0-"}, 0, view, 2 if end == "stalled" else 20)
    stop.set()
    assert failed.value.kind == "busy"
    assert failed.value.num_bytes >= (3 * MIB if end == "closed" else 3 * MIB - 256 * 1024)
    assert failed.value.num_bytes <= 3 * MIB
    assert view[: failed.value.num_bytes] == piece[: failed.value.num_bytes]


def test_a_trickle_ends_at_the_deadline(reads: SocketReads, server: Server) -> None:
    stop = threading.Event()

    def trickle(handler: http.server.BaseHTTPRequestHandler) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Length", "100000")
        handler.send_header("Content-Range", f"bytes 0-99999/{len(DATA)}")
        handler.end_headers()
        for number in range(1000):
            if stop.wait(0.01):
                break
            try:
                handler.wfile.write(DATA[number : number + 1])
            except OSError:
                break
        handler.close_connection = True
        return True

    server.behave = trickle
    began = time.monotonic()
    with pytest.raises(StoreFault) as failed:
        read(reads, server.url, 0, 99_999, seconds=0.5)
    stop.set()
    assert failed.value.kind == "busy"
    assert failed.value.num_bytes < 1000
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "SlowDown", "busy"),
        (500, "InternalError", "busy"),
        (400, "RequestTimeout", "busy"),
        (404, "NoSuchKey", "missing"),
        (404, "NoSuchBucket", "no place"),
        (412, "PreconditionFailed", "taken"),
        (416, "InvalidRange", "refused"),
    ],
)
def test_refusals_are_those_of_the_client(
    reads: SocketReads, server: Server, status: int, code: str, kind: str
) -> None:
    server.behave = lambda handler: answer(handler, status, code)
    with pytest.raises(StoreFault, match=f"{status} {code}: told so") as failed:
        read(reads, server.url, 0, 10)
    assert failed.value.kind == kind
    server.behave = lambda handler: False
    read(reads, server.url, 0, 10)
    assert server.num_connections == 2


@pytest.mark.parametrize(
    ("status", "code"),
    [(200, ""), (301, "PermanentRedirect"), (400, "Malformed"), (501, "NotImplemented")],
)
def test_what_only_the_client_understands_is_left_to_it(
    reads: SocketReads, server: Server, status: int, code: str
) -> None:
    server.behave = lambda handler: answer(handler, status, code)
    with pytest.raises(Elsewhere, match=str(status)):
        read(reads, server.url, 0, 10)


@pytest.mark.parametrize(
    ("status", "code"), [(401, ""), (403, "AccessDenied"), (400, "ExpiredToken")]
)
def test_what_other_credentials_may_change_is_told_apart(
    reads: SocketReads, server: Server, status: int, code: str
) -> None:
    server.behave = lambda handler: answer(handler, status, code)
    with pytest.raises(Denied, match=str(status)):
        read(reads, server.url, 0, 10)


def answer(handler: http.server.BaseHTTPRequestHandler, status: int, code: str) -> bool:
    body = f"<Error><Code>{code}</Code><Message>told so</Message></Error>".encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (0, "bytes 0-19/100"),
        (0, "bytes 0-99999/200000"),
        (0, ""),
        (0, "bytes */100"),
        (0, "bytes 5-14/100"),
        (5, "bytes 0-9/100"),
        (90, "bytes 90-99/95"),
        (None, "bytes 0-9/100"),
        (None, "bytes 80-89/100"),
        (None, "bytes 100-109/100"),
    ],
)
def test_another_range_than_was_asked_for_is_refused(
    reads: SocketReads, server: Server, first: int | None, told: str
) -> None:
    def lie(handler: http.server.BaseHTTPRequestHandler) -> bool:
        send_ten(handler, told)
        return True

    server.behave = lie
    view = memoryview(bytearray(10))
    with pytest.raises(Elsewhere, match="was answered"):
        reads.read(server.url, {"Range": "bytes=some"}, first, view, 20)
    assert bytes(view) == bytes(10)
    with pytest.raises(StoreFault, match="was answered") as failed:
        got_of(206, {"content-range": told, "content-length": "10"}, first, 10)
    assert failed.value.kind == "misconfigured"


def send_ten(handler: http.server.BaseHTTPRequestHandler, told: str) -> None:
    handler.send_response(206)
    handler.send_header("Content-Length", "10")
    handler.send_header("Last-Modified", "Sat, 01 Jan 2022 00:00:00 GMT")
    if told:
        handler.send_header("Content-Range", told)
    handler.end_headers()
    handler.wfile.write(b"0123456789")


def test_the_end_of_an_object_is_the_whole_of_what_was_asked_for() -> None:
    def got(told: str, num_bytes: int) -> int:
        headers = {"content-range": told, "content-length": str(num_bytes)}
        return got_of(206, headers, None, 10).num_bytes

    assert got("bytes 90-99/100", 10) == 10
    assert got("bytes 0-5/6", 6) == 6
    with pytest.raises(StoreFault):
        got("bytes 95-99/100", 5)


@contextmanager
def client_of(server: Server) -> Iterator[S3Client]:
    """Of a bucket that lists nothing."""
    endpoint = server.url.partition("/bucket")[0]
    options = S3Options(endpoint_url=endpoint, region="us-east-1", key="key", secret="secret")
    client = S3Client("bucket", "", options)
    behave = server.behave

    def listing(handler: http.server.BaseHTTPRequestHandler) -> bool:
        if "list-type" not in handler.path:
            return behave(handler)
        body = b"<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    server.behave = listing
    with closing(client):
        client.open()
        server.requests.clear()
        yield client


def test_a_store_that_takes_ranges_for_others_is_not_believed(server: Server) -> None:
    def lie(handler: http.server.BaseHTTPRequestHandler) -> bool:
        send_ten(handler, "bytes 0-9/100")
        return True

    server.behave = lie
    with client_of(server) as client:
        view = memoryview(bytearray(10))
        assert client.tail_into("key", view) is None
        with pytest.raises(StoreFault, match="10 bytes from 50 was answered") as failed:
            client.read_into("key", "", 50, view)
        assert failed.value.kind == "misconfigured"
        assert client.read_into("key", "", 0, view) == 10
        assert bytes(view) == b"0123456789"


def test_no_connection_stays_open_in_a_pause(reads: SocketReads, server: Server) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(handler: http.server.BaseHTTPRequestHandler) -> bool:
        begun.set()
        go_on.wait(20)
        return False

    read(reads, server.url, 0, 10)
    server.behave = wait
    thread = threading.Thread(target=read, args=(reads, server.url, 0, 10))
    thread.start()
    begun.wait(20)
    server.behave = lambda handler: False
    read(reads, server.url, 0, 10)
    assert server.num_open == 2
    assert not reads.is_paused
    assert reads.pause(100)
    assert not reads.pause(0)
    assert reads.is_paused
    wait_until(lambda: server.num_open == 1)  # the idle one is gone
    go_on.set()
    thread.join(20)
    wait_until(lambda: server.num_open == 0)  # and the one that was in use


def test_a_pause_ends(reads: SocketReads, server: Server) -> None:
    reads.pause(0.05)
    wait_until(lambda: not reads.is_paused)
    for _ in range(2):
        read(reads, server.url, 0, 10)
    assert server.num_connections == 1


def test_a_connection_that_nobody_needs_any_more_is_closed(
    reads: SocketReads, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = threading.Barrier(2)

    def gather(handler: http.server.BaseHTTPRequestHandler) -> bool:
        gathered.wait(20)
        return False

    server.behave = gather
    thread = threading.Thread(target=read, args=(reads, server.url, 0, 10))
    thread.start()
    read(reads, server.url, 0, 10)
    thread.join(20)
    assert server.num_open == 2
    server.behave = lambda handler: False
    monkeypatch.setattr(s3_reads, "IDLE_SECONDS", 0.3)

    def is_one() -> bool:
        read(reads, server.url, 0, 10)
        return server.num_open == 1

    wait_until(is_one)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of localhost, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    chain, key = folder / "chain.pem", folder / "key.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        *("-keyout", str(key), "-out", str(chain)),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    chain.write_bytes(chain.read_bytes() + key.read_bytes())
    return chain


@pytest.mark.needs("openssl")
def test_tls_trusts_the_authorities_of_the_file_or_of_botocore(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))  # to which the S3 client gives nothing
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(chain)
    with serving(tls) as server:
        trusting, careful = SocketReads(True, str(chain)), SocketReads(True, None)
        for _ in range(2):
            assert read(trusting, server.url, 0, MIB) == DATA[: MIB + 1]
        with pytest.raises(Elsewhere, match="CERTIFICATE_VERIFY_FAILED"):
            read(careful, server.url, 0, MIB)
        trusting.close()
        careful.close()
    assert server.num_connections == 1


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_the_authorities_of_the_environment_are_those_of_the_client(
    chain: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for other in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, str(chain))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(chain)
    with serving(tls) as server, client_of(server) as client:
        view = memoryview(bytearray(10))
        assert client.read_into("key", "", 5, view) == 10
        assert bytes(view) == DATA[5:15]
        assert [told["user-agent"] for told in server.requests] == ["forebay"]


def test_nobody_there_is_busy(reads: SocketReads, server: Server) -> None:
    with pytest.raises(StoreFault, match="refused") as failed:
        read(reads, "http://127.0.0.1:1/bucket/key?x", 0, 10)
    assert failed.value.kind == "busy"


def test_credentials_are_asked_for_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find() -> ReadOnlyCredentials:
        asked.append(f"key{len(asked)}")
        return ReadOnlyCredentials(asked[-1], "secret", "token")

    signer = Signer("http://host/bucket/", "eu-west-1", find)
    for _ in range(3):
        url, headers = signer.sign("a b", {"Range": "bytes=0-1"})
    assert url == "http://host/bucket/a%20b"
    assert "Credential=key0/" in headers["Authorization"]
    assert "/eu-west-1/s3/aws4_request" in headers["Authorization"]
    assert "range" in headers["Authorization"]
    assert headers["X-Amz-Security-Token"] == "token"
    monkeypatch.setattr(s3_reads, "CREDENTIALS_SECONDS", -1.0)
    assert "Credential=key1/" in signer.sign("a", {})[1]["Authorization"]


def test_credentials_that_the_store_does_not_take_are_asked_for_again() -> None:
    found = [ReadOnlyCredentials(name, "secret", None) for name in ("new", "old")]
    signer = Signer("http://host/bucket/", "eu-west-1", found.pop)
    for _ in range(2):
        assert "Credential=old/" in signer.sign("a", {})[1]["Authorization"]
    signer.forget()
    assert "Credential=new/" in signer.sign("a", {})[1]["Authorization"]


def test_proxies_of_the_environment_are_left_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "https_proxy", "no_proxy", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not goes_by_proxy("http://10.0.0.7:9000/x")
    monkeypatch.setenv("http_proxy", "http://10.0.0.1:3128")
    assert goes_by_proxy("http://10.0.0.7:9000/x")
    assert not goes_by_proxy("https://10.0.0.7:9000/x")
    monkeypatch.setenv("no_proxy", "10.0.0.7")
    assert not goes_by_proxy("http://10.0.0.7:9000/x")
