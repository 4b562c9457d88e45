"""Plain gRPC calls to a daemon, for tests that look at the wire itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from forebay_server.testing.daemon import DaemonProcess
from forebay_wire.errors import ForebayError, rebuild
from forebay_wire.protocol import (
    ERROR_METADATA,
    PROTOCOL_METADATA,
    TOKEN_METADATA,
    protocol_range,
)
from forebay_wire.v1 import (
    admin_pb2_grpc,
    blobs_pb2_grpc,
    checkpoints_pb2_grpc,
    datasets_pb2_grpc,
    plans_pb2_grpc,
)

Metadata = tuple[tuple[str, str], ...]

CALL_SECONDS = 30.0


def call_metadata(token: str | None, protocols: str | None = None) -> Metadata:
    """What a call carries; None leaves the token out."""
    protocol = ((PROTOCOL_METADATA, protocols or protocol_range()),)
    return ((TOKEN_METADATA, f"Bearer {token}"), *protocol) if token else protocol


class RpcClient:
    """The services over one channel; a refused call raises the daemon's own exception."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata) -> None:
        self.channel = channel
        self.metadata = metadata
        self.admin = admin_pb2_grpc.AdminStub(channel)
        self.blobs = blobs_pb2_grpc.BlobsStub(channel)
        self.checkpoints = checkpoints_pb2_grpc.CheckpointsStub(channel)
        self.datasets = datasets_pb2_grpc.DatasetsStub(channel)
        self.plans = plans_pb2_grpc.PlansStub(channel)

    def call(self, method: Any, request: Any, *, seconds: float = CALL_SECONDS) -> Any:
        """The answer of a unary method, as in ``client.call(client.admin.Status, request)``."""
        try:
            return method(request, timeout=seconds, metadata=self.metadata)
        except grpc.RpcError as error:
            raise rebuild_error(error) from error


def rebuild_error(error: grpc.RpcError) -> ForebayError:
    """The exception that the daemon raised, from a failed call."""
    assert isinstance(error, grpc.Call), error
    trailer = {key: value for key, value in error.trailing_metadata() or () if key}
    name = trailer.get(ERROR_METADATA)
    return rebuild(
        name if isinstance(name, str) else None, error.code().name, error.details() or ""
    )


@contextmanager
def rpc_client(
    daemon: DaemonProcess, *, token: str | None = None, address: str | None = None
) -> Iterator[RpcClient]:
    """A client of *daemon* with its token (or another one), over its Unix socket or *address*."""
    target = address or daemon.address()["rpc"]
    with grpc.insecure_channel(target) as channel:
        yield RpcClient(channel, call_metadata(daemon.token() if token is None else token))
