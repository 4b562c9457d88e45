"""The gate of gRPC calls: who is let in, and how errors cross the wire."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from forebay_server.bulk.tickets import Auth
from forebay_server.observe.metrics import METRICS, Metrics
from forebay_server.rpc.interceptors import Gate, caller_uid, current_caller
from forebay_server.rpc.server import RpcServer, Services
from forebay_wire.errors import ERROR_NAMES, ForebayError, rebuild
from forebay_wire.protocol import ERROR_METADATA, PROTOCOL_METADATA, TOKEN_METADATA, protocol_range
from forebay_wire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    blobs_pb2,
    blobs_pb2_grpc,
    checkpoints_pb2_grpc,
    datasets_pb2_grpc,
    integrity_pb2_grpc,
    movement_pb2_grpc,
    plans_pb2_grpc,
)

AUTH = Auth(bytes(32), "node")


class Raising(admin_pb2_grpc.AdminServicer):
    """Status and Attach raise what the test put here."""

    error: Exception | None = None

    async def Status(self, request: Any, context: Any) -> admin_pb2.StatusResponse:
        if self.error is not None:
            raise self.error
        return admin_pb2.StatusResponse(node=f"{caller_uid()} {current_caller().peer}")

    async def Attach(self, request: Any, context: Any) -> AsyncIterator[admin_pb2.AttachEvent]:
        yield admin_pb2.AttachEvent(state="first")
        if self.error is not None:
            raise self.error


class Edge:
    """A served gate, with a channel to it."""

    def __init__(self, socket: Path) -> None:
        self.metrics = Metrics()
        self.admin = Raising()
        self.draining = False
        gate = Gate(AUTH, self.metrics, lambda: self.draining)
        services = Services(
            admin=self.admin,
            blobs=blobs_pb2_grpc.BlobsServicer(),
            checkpoints=checkpoints_pb2_grpc.CheckpointsServicer(),
            datasets=datasets_pb2_grpc.DatasetsServicer(),
            integrity=integrity_pb2_grpc.IntegrityServicer(),
            movement=movement_pb2_grpc.MovementServicer(),
            plans=plans_pb2_grpc.PlansServicer(),
        )
        self.server = RpcServer(gate, services, reflection_enabled=False)
        self.channel = grpc.aio.insecure_channel(f"unix:{socket}")
        self.stub = admin_pb2_grpc.AdminStub(self.channel)

    def metadata(self, token: str = "", protocols: str = "") -> tuple[tuple[str, str], ...]:
        return (
            (TOKEN_METADATA, f"Bearer {token or AUTH.token(7)}"),
            (PROTOCOL_METADATA, protocols or protocol_range()),
        )


@pytest_asyncio.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    found = Edge(tmp_path / "rpc.sock")
    await found.server.start(tmp_path / "rpc.sock", (), None)
    yield found
    await found.channel.close()
    await found.server.stop(0)


def raised(error: grpc.aio.AioRpcError) -> ForebayError:
    """What a client rebuilds from a status."""
    trailer = dict(error.trailing_metadata())
    return rebuild(trailer.get(ERROR_METADATA), error.code().name, error.details() or "")


async def test_call_with_token_and_protocol_knows_its_caller(edge: Edge) -> None:
    answer = await edge.stub.Status(admin_pb2.StatusRequest(), metadata=edge.metadata())
    assert answer.node.startswith("7 unix:")


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ((), "carries no token"),
        (((TOKEN_METADATA, "Basic x"),), "carries no token"),
        (((TOKEN_METADATA, "Bearer v1.0.forged"),), "no token of this daemon"),
    ],
)
async def test_call_without_valid_token_is_denied(edge: Edge, metadata: Any, sentence: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=sentence) as caught:
        await edge.stub.Status(admin_pb2.StatusRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("protocols", "sentence"),
    [
        ("90-99", "client speaks protocol 90-99, the daemon .*: upgrade the daemon"),
        ("0-0", "upgrade the client"),
        ("?", "no protocol version"),
    ],
)
async def test_other_protocol_is_refused_with_what_to_upgrade(
    edge: Edge, protocols: str, sentence: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=sentence) as caught:
        await edge.stub.Status(
            admin_pb2.StatusRequest(), metadata=edge.metadata(protocols=protocols)
        )
    assert type(raised(caught.value)).__name__ == "VersionMismatch"


@pytest.mark.parametrize("name", sorted(ERROR_NAMES))
async def test_every_error_crosses_the_wire_as_itself(edge: Edge, name: str) -> None:
    edge.admin.error = ERROR_NAMES[name]("what, where and what to do — in any letters")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.stub.Status(admin_pb2.StatusRequest(), metadata=edge.metadata())
    assert caught.value.code().name == ERROR_NAMES[name].status
    assert type(raised(caught.value)) is ERROR_NAMES[name]
    assert raised(caught.value).message == "what, where and what to do — in any letters"


async def test_unexpected_error_gives_an_id_and_no_traceback(
    edge: Edge, caplog: pytest.LogCaptureFixture
) -> None:
    edge.admin.error = RuntimeError("secret detail")
    with pytest.raises(grpc.aio.AioRpcError, match=r"error id [0-9a-f]{8}") as caught:
        await edge.stub.Status(admin_pb2.StatusRequest(), metadata=edge.metadata())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (caught.value.details() or "")
    assert "secret detail" in caplog.text


async def test_errors_in_the_middle_of_a_stream_are_mapped_too(edge: Edge) -> None:
    edge.admin.error = ERROR_NAMES["Fenced"]("a newer attempt writes")
    events = edge.stub.Attach(admin_pb2.AttachRequest(), metadata=edge.metadata())
    assert (await anext(aiter(events))).state == "first"
    with pytest.raises(grpc.aio.AioRpcError, match="newer attempt") as caught:
        async for _ in events:
            pass
    assert type(raised(caught.value)).__name__ == "Fenced"


async def test_draining_daemon_refuses_what_starts_something_new(edge: Edge) -> None:
    edge.draining = True
    await edge.stub.Status(admin_pb2.StatusRequest(), metadata=edge.metadata())
    blobs = blobs_pb2_grpc.BlobsStub(edge.channel)
    with pytest.raises(grpc.aio.AioRpcError, match="draining") as caught:
        await blobs.BeginUpload(blobs_pb2.BeginUploadRequest(), metadata=edge.metadata())
    assert raised(caught.value).retryable


async def test_overlong_message_still_arrives(edge: Edge) -> None:
    edge.admin.error = ERROR_NAMES["InvalidRequest"]("—" * 20_000)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await edge.stub.Status(admin_pb2.StatusRequest(), metadata=edge.metadata())
    assert type(raised(caught.value)).__name__ == "InvalidRequest"


async def test_calls_are_counted_by_method_and_status(edge: Edge) -> None:
    await edge.stub.Status(admin_pb2.StatusRequest(), metadata=edge.metadata())
    with pytest.raises(grpc.aio.AioRpcError):
        await edge.stub.Status(admin_pb2.StatusRequest())
    name = 'forebay_rpc_calls_total{method="/forebay.v1.Admin/Status"'
    async with asyncio.timeout(10):  # a call is counted once its answer has been sent
        bad = f'{name},status="UNAUTHENTICATED"}} 1.0'
        while bad not in edge.metrics.render(()).decode():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    assert f'{name},status="OK"}} 1.0' in edge.metrics.render(()).decode()


def test_every_metric_of_the_table_is_exposed() -> None:
    text = Metrics().render(()).decode()
    for name, spec in METRICS.items():
        assert f"# HELP {name} {spec.meaning}" in text
