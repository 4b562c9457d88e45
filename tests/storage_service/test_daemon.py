"""The life of a real daemon: start, refuse, serve, drain, die, start again."""

import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forebay_server.catalog import row_digests
from forebay_server.exit_codes import ExitCode
from forebay_server.observe.metrics import METRICS
from forebay_server.testing.daemon import DaemonProcess, run_server
from forebay_server.testing.rpc import RpcClient, call_metadata, rebuild_error, rpc_client
from forebay_wire.errors import Unauthenticated, VersionMismatch
from forebay_wire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    blobs_pb2,
    checkpoints_pb2,
    datasets_pb2,
    integrity_pb2,
    movement_pb2,
    plans_pb2,
)

SERVING: Any = health_pb2.HealthCheckResponse.SERVING


def wait_until(condition: Any, seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def serve(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """To its end: it refuses, or only shows something."""
    return run_server("serve", "--data", data, *arguments)


def all_methods() -> list[Any]:
    """Descriptors of every method of every service."""
    modules = (
        admin_pb2,
        blobs_pb2,
        checkpoints_pb2,
        datasets_pb2,
        integrity_pb2,
        movement_pb2,
        plans_pb2,
    )
    return [
        method
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One daemon for the tests that change nothing."""
    with DaemonProcess(tmp_path_factory.mktemp("shared") / "data") as found:
        yield found


# ------------------------------------------------------------------------------------- serving


def test_daemon_tells_where_it_listens(daemon: DaemonProcess) -> None:
    address = daemon.address()
    assert address["pid"] == daemon.pid
    assert address["tcp"] is None
    for line in (address["rpc"], address["http_url"]):  # said after the address is written
        wait_until(lambda line=line: line in daemon.log())


def test_sockets_and_secrets_are_for_this_user_only(daemon: DaemonProcess) -> None:
    address = daemon.address()
    rpc = Path(address["rpc"].removeprefix("unix:"))
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for path in (
            rpc,
            Path(address["descriptor_socket"]),
            daemon.data / "secret.key",
            daemon.data / "token",
            daemon.data / "daemon.json",
            daemon.data / "lock",
            daemon.data / "catalog.sqlite",
        )
    }
    assert set(modes.values()) == {0o600}, modes
    assert stat.S_IMODE(rpc.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(daemon.data.stat().st_mode) == 0o700


def test_status_shows_tiers_and_state(client: RpcClient, daemon: DaemonProcess) -> None:
    status = client.call(client.admin.Status, admin_pb2.StatusRequest())
    assert status.state == "serving"
    assert status.data_folder == str(daemon.data.resolve())
    assert [tier.name for tier in status.tiers] == ["ram", "ssd", "hdd", "object"]
    assert all(tier.health == "ok" and tier.free_bytes > 0 for tier in status.tiers)
    assert (status.num_datasets, status.num_runs, status.num_uploads) == (0, 0, 0)
    assert list(status.addresses) == [daemon.address()["rpc"], daemon.address()["http_url"]]


def test_health_answers_without_token(daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(daemon.address()["rpc"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "forebay.v1.Datasets"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=10).status == SERVING


def test_metrics_and_health_over_http(daemon: DaemonProcess) -> None:
    url = daemon.address()["http_url"]
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'forebay_tier_bytes{kind="free",tier="ssd"}' in text
    assert all(f"# HELP {name} " in text for name in METRICS)
    assert 'forebay_tier_seconds_count{operation="open",tier="ssd"} 1.0' in text


# ---------------------------------------------------------------------------------------- entry


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.full_name)
def test_only_the_handshake_answers_without_token(
    shared_daemon: DaemonProcess, method: Any
) -> None:
    name = f"/{method.containing_service.full_name}/{method.name}"
    expected = VersionMismatch if name == "/forebay.v1.Admin/Handshake" else Unauthenticated
    with grpc.insecure_channel(shared_daemon.address()["rpc"]) as channel:
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = make(name, request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"", timeout=10, metadata=call_metadata(None)))
    assert isinstance(rebuild_error(caught.value), expected)


def test_handshake_without_token_tells_versions_only(shared_daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(shared_daemon.address()["rpc"]) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        answer = stub.Handshake(admin_pb2.HandshakeRequest(protocols="1-1"), timeout=10)
    assert answer.protocol == 1
    assert answer.server_version
    assert (answer.token, answer.node, answer.http_url, answer.data_folder) == ("", "", "", "")


def test_handshake_with_token_tells_where_the_bytes_are(shared_daemon: DaemonProcess) -> None:
    with rpc_client(shared_daemon) as client:
        answer = client.call(client.admin.Handshake, admin_pb2.HandshakeRequest(protocols="1-1"))
    address = shared_daemon.address()
    assert answer.token == shared_daemon.token()
    assert answer.descriptor_socket == address["descriptor_socket"]
    assert answer.http_url == address["http_url"]
    assert answer.incarnation == address["incarnation"]


def test_client_of_another_protocol_gets_a_sentence(shared_daemon: DaemonProcess) -> None:
    with rpc_client(shared_daemon) as client:
        with pytest.raises(VersionMismatch, match="upgrade the daemon"):
            client.call(client.admin.Handshake, admin_pb2.HandshakeRequest(protocols="7-9"))
        client.metadata = call_metadata(shared_daemon.token(), "7-9")
        with pytest.raises(VersionMismatch, match="upgrade the daemon"):
            client.call(client.admin.Status, admin_pb2.StatusRequest())


def test_forged_token_is_denied(shared_daemon: DaemonProcess) -> None:
    with (
        rpc_client(shared_daemon, token="v1.0." + "0" * 64) as client,
        pytest.raises(Unauthenticated),
    ):
        client.call(client.admin.Status, admin_pb2.StatusRequest())


def test_tcp_needs_the_token_and_tells_no_descriptor_socket(start_daemon: Any) -> None:
    daemon = start_daemon("--listen", "grpc://127.0.0.1:0")
    url = daemon.address()["tcp"]
    assert url.startswith("grpc://127.0.0.1:")
    with rpc_client(daemon, address=url.removeprefix("grpc://")) as client:
        answer = client.call(client.admin.Handshake, admin_pb2.HandshakeRequest(protocols="1-1"))
        assert answer.descriptor_socket == ""
        client.metadata = call_metadata(None)
        with pytest.raises(Unauthenticated):
            client.call(client.admin.Status, admin_pb2.StatusRequest())


def test_tcp_port_in_use_is_an_error_with_the_address(start_daemon: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve(tmp_path / "data", "--listen", f"grpc://127.0.0.1:{port}")
    assert done.returncode == ExitCode.FAILURE
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data" / "daemon.json").exists()


@pytest.mark.needs("openssl")
def test_tls_address_serves_with_its_certificate(start_daemon: Any, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    daemon = start_daemon(
        *("--listen", "grpcs://localhost:0", "--tls-cert", str(certificate)),
        *("--tls-key", str(key)),
    )
    url = daemon.address()["tcp"]
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(url.removeprefix("grpcs://"), credentials) as channel:
        client = RpcClient(channel, call_metadata(daemon.token()))
        assert client.call(client.admin.Status, admin_pb2.StatusRequest()).state == "serving"


def test_reflection_is_off_unless_asked_for(start_daemon: Any) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    request = b"\x3a\x00"  # list_services = ""
    for flags, served in (((), False), (("--reflection",), True)):
        daemon = start_daemon(*flags)
        with grpc.insecure_channel(daemon.address()["rpc"]) as channel:
            call = channel.stream_stream(
                method, request_serializer=bytes, response_deserializer=bytes
            )
            answers = call(iter([request]), timeout=10, metadata=call_metadata(daemon.token()))
            if served:
                assert b"forebay.v1.Admin" in next(answers)
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    next(answers)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        daemon.terminate()


# ------------------------------------------------------------------------------- start and stop


def test_second_daemon_of_a_folder_is_refused_by_name(daemon: DaemonProcess) -> None:
    done = serve(daemon.data)
    assert done.returncode == ExitCode.ALREADY_RUNNING
    assert f"pid {daemon.pid}" in done.stderr
    assert str(daemon.data.resolve()) in done.stderr
    assert daemon.address()["pid"] == daemon.pid


def test_sigterm_drains_and_leaves_no_address(daemon: DaemonProcess) -> None:
    rpc = Path(daemon.address()["rpc"].removeprefix("unix:"))
    assert daemon.terminate() == ExitCode.OK
    assert not rpc.exists()
    assert not (daemon.data / "daemon.json").exists()
    assert "Traceback" not in daemon.log()


def test_daemon_starts_over_what_sigkill_left(daemon: DaemonProcess) -> None:
    first, token = daemon.address(), daemon.token()
    daemon.kill()
    assert Path(first["descriptor_socket"]).exists()
    assert (daemon.data / "daemon.json").exists()
    daemon.start().wait_ready()
    second = daemon.address()
    assert second["incarnation"] != first["incarnation"]
    assert (second["node"], second["rpc"]) == (first["node"], first["rpc"])
    assert daemon.token() == token
    with rpc_client(daemon) as client:
        assert client.call(client.admin.Status, admin_pb2.StatusRequest()).state == "serving"


def test_attached_clients_are_counted_and_let_go(daemon: DaemonProcess, client: RpcClient) -> None:
    def num_clients() -> int:
        return int(client.call(client.admin.Status, admin_pb2.StatusRequest()).num_clients)

    stream = client.admin.Attach(admin_pb2.AttachRequest(name="test"), metadata=client.metadata)
    assert next(stream).state == "serving"
    assert num_clients() == 1
    stream.cancel()
    wait_until(lambda: num_clients() == 0)


def test_drain_ends_attached_streams_in_good_order(
    daemon: DaemonProcess, client: RpcClient
) -> None:
    stream = client.admin.Attach(admin_pb2.AttachRequest(name="test"), metadata=client.metadata)
    assert next(stream).state == "serving"
    os.kill(daemon.pid, signal.SIGTERM)
    assert [event.state for event in stream] == ["draining"]
    assert daemon.wait_exit() == ExitCode.OK


def test_idle_daemon_ends_by_itself(start_daemon: Any) -> None:
    daemon = start_daemon("--idle-exit", "0.5")
    assert daemon.wait_exit() == ExitCode.OK
    assert "idle" in daemon.log()


def test_attached_client_keeps_an_idle_daemon(start_daemon: Any) -> None:
    daemon = start_daemon("--idle-exit", "0.5")
    ended = threading.Event()
    with rpc_client(daemon) as client:
        stream = client.admin.Attach(admin_pb2.AttachRequest(name="t"), metadata=client.metadata)
        assert next(stream).state == "serving"
        assert not ended.wait(2.0)  # four times the idle time: it must not have ended
        assert client.call(client.admin.Status, admin_pb2.StatusRequest()).state == "serving"
        stream.cancel()
    assert daemon.wait_exit() == ExitCode.OK


def test_second_signal_ends_at_once(start_daemon: Any) -> None:
    daemon = start_daemon("--drain-seconds", "30")
    daemon.process.send_signal(signal.SIGSTOP)  # both signals arrive before it can drain
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.send_signal(signal.SIGINT)
    daemon.process.send_signal(signal.SIGCONT)
    assert daemon.wait_exit() in (ExitCode.OK, ExitCode.FAILURE)
    assert daemon.start().wait_ready().terminate() == ExitCode.OK


# --------------------------------------------------------------------------------- command line


def test_show_config_names_every_origin(tmp_path: Path) -> None:
    (tmp_path / "forebay.toml").write_text('ram-bytes = "64MiB"\n')
    done = serve(tmp_path, "--show-config", "--json", "--idle-exit", "5")
    assert done.returncode == ExitCode.OK, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["idle-exit"]["origin"] == "argument"
    assert rows["ram-bytes"]["value"] == 64 << 20
    assert rows["ram-bytes"]["origin"] == str(tmp_path / "forebay.toml")
    assert rows["listen"]["origin"] == "default"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--listen", "grpc://0.0.0.0:7070"), "reached from other machines"),
        (("--ram-bytes", "much"), "not a size"),
        (("--ram-byte", "1"), "--ram-bytes"),
        (("--config", "/no/such/file.toml"), "cannot read the configuration"),
        (("--ssd-bytes", "1024PiB"), "its disk has"),
        (("--ssd-path", "/tmp/one", "--hdd-path", "/tmp/one"), "is the folder of"),
        (("--ssd-path", "/tmp/one", "--object-url", "file:///tmp/one/two"), "overlaps with"),
        (("--object-url", "/"), "holds the data folder"),
        (("--object-url", "memory://x"), "gone with it"),
        (("--replaced", "ram"), "tiers are ssd, hdd and object"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = serve(tmp_path / "data", *arguments)
    assert done.returncode == ExitCode.USAGE
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_certificate_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("chain.pem", "key.pem"):
        (tmp_path / name).write_text("no certificate")
    arguments = ("--tls-cert", str(tmp_path / "chain.pem"), "--tls-key", str(tmp_path / "key.pem"))
    done = serve(tmp_path / "data", *arguments)
    assert done.returncode == ExitCode.USAGE
    assert "chain.pem" in done.stderr
    assert "Traceback" not in done.stderr


def test_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("x")
    done = serve(tmp_path / "data")
    assert done.returncode == ExitCode.USAGE
    assert "is no folder" in done.stderr


@pytest.mark.parametrize("url", ["nosuchscheme://x/y", "ftp://127.0.0.1:1/x"])
def test_unreadable_object_url_is_one_clear_error(tmp_path: Path, url: str) -> None:
    done = serve(tmp_path / "data", "--object-url", url)
    assert done.returncode in (ExitCode.USAGE, ExitCode.FAILURE)
    assert url in done.stderr
    assert "Traceback" not in done.stderr


def test_catalog_of_a_newer_forebay_exits_with_4(daemon: DaemonProcess) -> None:
    daemon.terminate()
    with sqlite3.connect(daemon.data / "catalog.sqlite") as connection:
        row_digests.register(connection)
        connection.execute("UPDATE settings SET value = '99' WHERE key = 'schema_version'")
    connection.close()
    done = serve(daemon.data)
    assert done.returncode == ExitCode.NEWER_SCHEMA
    assert "upgrade" in done.stderr
