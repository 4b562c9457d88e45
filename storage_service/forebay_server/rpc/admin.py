"""The Admin service: the handshake, the status page, and who is attached."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc.aio

from forebay_server.catalog.queries_jobs import Job
from forebay_server.rpc.interceptors import current_caller
from forebay_server.rpc.plans import convert_standing
from forebay_server.serve.standing import PlanReader, Standing
from forebay_server.serve.status import Status
from forebay_wire.errors import DaemonUnavailable
from forebay_wire.protocol import agree, protocol_range
from forebay_wire.v1 import admin_pb2, admin_pb2_grpc

ATTACH_INTERVAL_SECONDS: Final = 60.0
MAX_ATTACHED: Final = 4096


@dataclass(frozen=True)
class Identity:
    """What the handshake tells a caller with a token."""

    version: str
    node: str
    incarnation: str
    data_folder: str
    descriptor_socket: str
    http_url: str


class TokenGiver(Protocol):
    """What the handshake needs of :class:`forebay_server.bulk.tickets.Auth`."""

    def token(self, uid: int) -> str:
        """The token bound to *uid*."""
        ...


class Attached:
    """The clients that hold an Attach stream; used from the loop only."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._ended = asyncio.Event()

    @property
    def clients(self) -> set[str]:
        """Each client once: ``pid NUMBER`` for local processes, as the descriptor socket has it."""
        return set(self._streams)

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """*client* is attached inside the ``with`` block."""
        if self._streams.total() >= MAX_ATTACHED:
            raise DaemonUnavailable(
                f"{MAX_ATTACHED} clients are attached already: close some, one a process is enough"
            )
        self._streams[client] += 1
        try:
            yield
        finally:
            self._streams[client] -= 1
            self._streams += Counter()  # drops the zeros

    def end(self) -> None:
        """End all streams: the daemon stops."""
        self._ended.set()

    async def wait_end(self, timeout_seconds: float) -> bool:
        """Whether the daemon ends, asked for at most *timeout_seconds*."""
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self._ended.wait()
        except TimeoutError:
            return False


class AdminService(admin_pb2_grpc.AdminServicer):
    """Converts between messages and the daemon's state."""

    def __init__(
        self,
        identity: Identity,
        tokens: TokenGiver,
        attached: Attached,
        read_status: Callable[[], Any],
        read_state: Callable[[], str],
        plans: PlanReader,
    ) -> None:
        self._identity = identity
        self._tokens = tokens
        self._attached = attached
        self._read_status = read_status
        self._read_state = read_state
        self._plans = plans

    async def Handshake(
        self,
        request: admin_pb2.HandshakeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> admin_pb2.HandshakeResponse:
        protocol = agree(request.protocols, protocol_range(), caller="client", here="daemon")
        ours = self._identity
        caller = current_caller()
        if caller.uid is None:
            return admin_pb2.HandshakeResponse(protocol=protocol, server_version=ours.version)
        is_local = caller.peer.startswith("unix:")
        return admin_pb2.HandshakeResponse(
            protocol=protocol,
            server_version=ours.version,
            node=ours.node,
            incarnation=ours.incarnation,
            data_folder=ours.data_folder,
            descriptor_socket=ours.descriptor_socket if is_local else "",
            http_url=ours.http_url,
            token=self._tokens.token(caller.uid),
        )

    async def Status(
        self,
        request: admin_pb2.StatusRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> admin_pb2.StatusResponse:
        plans = await self._plans.read()
        return convert_status(await self._read_status(), self._identity, plans)

    async def Attach(
        self,
        request: admin_pb2.AttachRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[admin_pb2.AttachEvent]:
        peer = current_caller().peer
        with self._attached.hold(
            request.name if peer.startswith("unix:") else f"{peer} {request.name}"
        ):
            yield self._event()
            while not await self._attached.wait_end(ATTACH_INTERVAL_SECONDS):
                yield self._event()
            yield self._event()

    def _event(self) -> admin_pb2.AttachEvent:
        return admin_pb2.AttachEvent(
            state=self._read_state(), incarnation=self._identity.incarnation
        )


def convert_status(
    status: Status, identity: Identity, plans: Sequence[Standing]
) -> admin_pb2.StatusResponse:
    """The message of a status page."""
    return admin_pb2.StatusResponse(
        server_version=identity.version,
        node=identity.node,
        incarnation=identity.incarnation,
        data_folder=identity.data_folder,
        started_unix=status.started_unix,
        tiers=[admin_pb2.TierStatus(**vars(tier)) for tier in status.tiers],
        num_datasets=status.counts.num_datasets,
        num_runs=status.counts.num_runs,
        num_clients=status.num_clients,
        num_uploads=status.counts.num_uploads,
        jobs=[convert_job(job) for job in status.counts.jobs],
        state=status.state,
        addresses=status.addresses,
        plans=[convert_standing(plan) for plan in plans],
    )


def convert_job(job: Job) -> admin_pb2.JobStatus:
    """The message of a job."""
    return admin_pb2.JobStatus(
        job=job.job,
        kind=job.kind,
        target=job.target,
        state=job.state,
        done_bytes=job.done_bytes,
        total_bytes=job.total_bytes,
        tries=job.tries,
        error=job.error,
        priority=job.priority,
        created_unix=job.created_unix,
        due_unix=job.due_unix,
    )
