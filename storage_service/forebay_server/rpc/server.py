"""The gRPC server: which services it has, where it listens, and what its health says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from forebay_server.addresses import Address
from forebay_server.rpc.interceptors import Gate
from forebay_wire.errors import StorageError
from forebay_wire.limits import KIB, MAX_COMMIT_BYTES, MAX_MESSAGE_BYTES
from forebay_wire.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    blobs_pb2,
    blobs_pb2_grpc,
    checkpoints_pb2,
    checkpoints_pb2_grpc,
    datasets_pb2,
    datasets_pb2_grpc,
    integrity_pb2,
    integrity_pb2_grpc,
    movement_pb2,
    movement_pb2_grpc,
    plans_pb2,
    plans_pb2_grpc,
)

MAX_CONCURRENT_CALLS: Final = 8192
"""Two open streams or waits for each of the most ranks a run may have."""

SERVICE_NAMES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (admin_pb2, "Admin"),
        (blobs_pb2, "Blobs"),
        (checkpoints_pb2, "Checkpoints"),
        (datasets_pb2, "Datasets"),
        (integrity_pb2, "Integrity"),
        (movement_pb2, "Movement"),
        (plans_pb2, "Plans"),
    )
)
"""What the server offers, as health and reflection name it."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_COMMIT_BYTES),  # the gate has a limit for each call
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * KIB),
    ("grpc.so_reuseport", 0),  # a second daemon on a port must fail, not share it
)


@dataclass(frozen=True)
class Services:
    """The servicers."""

    admin: admin_pb2_grpc.AdminServicer
    blobs: blobs_pb2_grpc.BlobsServicer
    checkpoints: checkpoints_pb2_grpc.CheckpointsServicer
    datasets: datasets_pb2_grpc.DatasetsServicer
    integrity: integrity_pb2_grpc.IntegrityServicer
    movement: movement_pb2_grpc.MovementServicer
    plans: plans_pb2_grpc.PlansServicer


class RpcServer:
    """The control edge; used from the daemon's loop only, which also stops it."""

    def __init__(self, gate: Gate, services: Services, *, reflection_enabled: bool) -> None:
        self._gate = gate
        self._services = services
        self._reflection_enabled = reflection_enabled
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(
        self,
        socket: Path,
        addresses: Sequence[Address],
        certificate: tuple[Path, Path] | None,
    ) -> list[int]:
        """Listen on the Unix *socket* (mode 0600) and on TCP; returns the ports that were bound.

        *certificate* is the chain's and the key's file, for those addresses that use TLS.
        """
        server = self._build()
        with _private_umask():
            _bind(server, f"unix:{socket}", None)
            ports = [
                _bind(server, address.target, certificate if address.tls else None)
                for address in addresses
            ]
            await server.start()
        self._server = server
        return ports

    async def set_serving(self) -> None:
        """Tell health checks that everything works."""
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def set_draining(self) -> None:
        """Tell health checks, for good, that callers should go elsewhere."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_seconds: float) -> None:
        """Take no calls any more; those running end within *grace_seconds* or are cancelled."""
        if self._server is not None:
            await self._server.stop(grace_seconds)
            self._server = None

    def _build(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[self._gate],
            options=_OPTIONS,
            maximum_concurrent_rpcs=MAX_CONCURRENT_CALLS,
        )
        admin_pb2_grpc.add_AdminServicer_to_server(self._services.admin, server)
        blobs_pb2_grpc.add_BlobsServicer_to_server(self._services.blobs, server)
        checkpoints_pb2_grpc.add_CheckpointsServicer_to_server(self._services.checkpoints, server)
        datasets_pb2_grpc.add_DatasetsServicer_to_server(self._services.datasets, server)
        integrity_pb2_grpc.add_IntegrityServicer_to_server(self._services.integrity, server)
        movement_pb2_grpc.add_MovementServicer_to_server(self._services.movement, server)
        plans_pb2_grpc.add_PlansServicer_to_server(self._services.plans, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._reflection_enabled:
            names = (*SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server


@contextmanager
def _private_umask() -> Iterator[None]:
    """Sockets made inside are for this user only; nothing else makes files at start-up."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _bind(server: grpc.aio.Server, target: str, certificate: tuple[Path, Path] | None) -> int:
    """Bind *target* and return its port; :class:`StorageError` if it is taken."""
    try:
        if certificate is None:
            return server.add_insecure_port(target)
        chain, key = (path.read_bytes() for path in certificate)
        return server.add_secure_port(target, grpc.ssl_server_credentials([(key, chain)]))
    except (RuntimeError, OSError) as error:
        raise StorageError(
            f"cannot listen on {target}: is the port taken, or the address not of this machine? "
            f"({error})"
        ) from error
