"""A daemon's life, start, serve, drain, stop; and the only place where its parts are wired."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from forebay_server.addresses import Address
from forebay_server.ahead import Ahead
from forebay_server.background import Background
from forebay_server.bulk.descriptors import DescriptorServer
from forebay_server.bulk.ranges import make_app
from forebay_server.bulk.tickets import Auth
from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.queries_damage import enqueue_return
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_jobs import (
    ENDLESS_KINDS,
    FINGERPRINT,
    FLUSH,
    NOTES,
    QUIET_KINDS,
    RETAIN,
    SLOW_KINDS,
)
from forebay_server.catalog.queries_managing import queue_all_retention
from forebay_server.catalog.queries_objects import enqueue_missing
from forebay_server.catalog.queries_status import count_below_local
from forebay_server.config import Config
from forebay_server.exit_codes import ExitCode
from forebay_server.folder import (
    TOKEN_FILE_NAME,
    DaemonAddress,
    FolderLock,
    load_http_port,
    load_node,
    load_secret,
    make_sockets,
    remove_address,
    save_http_port,
    write_private,
)
from forebay_server.integrity import Integrity
from forebay_server.locks import NamedLocks
from forebay_server.move.budget import Budget
from forebay_server.move.fingerprints import Fingerprints
from forebay_server.move.flush import Flush
from forebay_server.move.jobs import Handler, Jobs, take_over_jobs
from forebay_server.movement import Movement
from forebay_server.node_tiers import open_tiers
from forebay_server.observe.metrics import Metrics, Sample
from forebay_server.origins import find_sources
from forebay_server.publish.checkpoint import Checkpoints, recover_catalog_state
from forebay_server.publish.dataset import Datasets
from forebay_server.publish.following import Following
from forebay_server.publish.lease import Uploads
from forebay_server.publish.manifests import ObjectPublisher
from forebay_server.publish.origins import OriginDatasets
from forebay_server.publish.parts import Parts
from forebay_server.publish.reconcile import claim_objects, reconcile
from forebay_server.publish.retention import Retention
from forebay_server.publish.run_notes import RunNotes
from forebay_server.publish.statistics import KeptStatistics
from forebay_server.rpc.admin import AdminService, Attached, Identity
from forebay_server.rpc.blobs import BlobsService
from forebay_server.rpc.checkpoints import CheckpointsService
from forebay_server.rpc.datasets import DatasetsService
from forebay_server.rpc.integrity import IntegrityService
from forebay_server.rpc.interceptors import Gate
from forebay_server.rpc.movement import MovementService
from forebay_server.rpc.plans import PlansService
from forebay_server.rpc.server import RpcServer, Services
from forebay_server.serve.open import Opener
from forebay_server.serve.standing import PlanReader
from forebay_server.serve.status import DaemonState, StatusReader
from forebay_server.tier.health import TierWatch
from forebay_server.tier.retry import CannotGiveRemote
from forebay_server.tier.store import HEALTHY
from forebay_server.version import forebay_version
from forebay_wire.errors import InvalidRequest, StorageError
from forebay_wire.protocol import protocol_range

logger = logging.getLogger(__name__)

CATALOG_FILE_NAME: Final = "catalog.sqlite"

STOP_GRACE_SECONDS: Final = 1.0
"""After the drain, calls that still run get this long to end by themselves."""

IDLE_LOOK_SECONDS: Final = 1.0


class Daemon:
    """One daemon on one data folder. :meth:`serve` is its whole life."""

    def __init__(self, config: Config, *, started: Callable[[Sequence[str]], None]) -> None:
        """*started* is called once everything listens, with lines that say where."""
        self._config = config
        self._started = started
        self._state = "starting"
        self._started_unix = time.time()
        self._incarnation = secrets.token_hex(8)
        self._addresses: tuple[str, ...] = ()
        self._stopping = asyncio.Event()
        self._has_crashed = False

    async def serve(self) -> ExitCode:
        """Start, serve until asked to stop, drain, stop.

        Raises :class:`AlreadyRunning` where another daemon has the folder, and what keeps a part
        from starting. After SIGTERM, SIGINT or the idle time it returns when everything is closed.
        """
        with FolderLock(self._config.data):
            self._catch_signals()
            async with AsyncExitStack() as stack:  # stops in reverse what was started
                await self._start(stack)
                await self._stopping.wait()
                await self._drain()
        logger.info("stopped")
        return ExitCode.FAILURE if self._has_crashed else ExitCode.OK

    # ---------------------------------------------------------------------------------- start

    async def _start(self, stack: AsyncExitStack) -> None:
        """Bring everything up, from the bytes to the edges, then tell where it listens."""
        _raise_open_files()
        data = self._config.data
        self._sockets = make_sockets(data, os.environ)
        remove_address(data)
        self._sockets.remove()
        stack.callback(self._sockets.remove)
        self._node = load_node(data)
        self._auth = Auth(load_secret(data), self._node)
        write_private(data / TOKEN_FILE_NAME, self._auth.token(os.geteuid()).encode() + b"\n")
        self._tls = _tls_context(self._config) if self._config.certificate else None
        self._background = Background(self._crash)
        await self._open_storage(stack)
        await self._open_use_cases(stack)
        await self._recover()
        await self._start_background(stack)
        await self._open_edges(stack)
        if self._config.idle_exit:
            self._background.start("idle", self._watch_idle())
        self._state = "serving"
        stack.callback(remove_address, data)
        self._tell(data)
        await self._rpc.set_serving()

    async def _open_storage(self, stack: AsyncExitStack) -> None:
        self._metrics = Metrics()
        await self._start_tiers()
        stack.push_async_callback(self._tiers.close)
        url = self._config.catalog or sqlite_url(self._config.data / CATALOG_FILE_NAME)
        self._catalog = await asyncio.to_thread(Catalog.open, url, owner=f"node {self._node}")
        self._catalog.listen_failure(_end_at_once)
        stack.push_async_callback(asyncio.to_thread, self._catalog.close)
        find_sources(self._tiers, self._catalog)
        await claim_objects(
            self._catalog,
            self._tiers,
            self._node,
            str(self._config.data.resolve()),
            is_replaced="object" in self._config.replaced,
        )

    async def _start_tiers(self) -> None:
        """Open all tiers; an object store that cannot give ``remote`` caches."""
        made = self._config, self._node, self._metrics.tier_call
        self._tiers = open_tiers(*made)
        try:
            await self._tiers.start()
        except CannotGiveRemote as problem:
            logger.warning("%s. It is used as a cache only", problem)
            self._tiers = open_tiers(*made, problem.message)
            await self._tiers.start()

    async def _open_use_cases(self, stack: AsyncExitStack) -> None:
        self._budget = Budget(self._config.move_rates)
        self._opener = Opener(self._tiers, self._catalog, foreground=self._budget.foreground)
        stack.push_async_callback(self._opener.close)
        self._uploads = Uploads(
            self._catalog,
            self._tiers,
            lease_seconds=self._config.lease_seconds,
            forget=self._opener.forget,
        )
        self._ahead = Ahead(
            self._tiers,
            self._catalog,
            self._opener,
            is_busy=self._budget.is_busy,
            marks=self._config.cache_marks,
        )
        locks = NamedLocks()
        self._movement = Movement(
            self._catalog,
            self._tiers,
            self._opener,
            locks,
            self._budget,
            self._config.all_policies,
            self._config.default_policy,
            make_room=self._ahead.evictor.make_room_or_leave,
            room_in=self._ahead.evictor.fill_room,
            seconds_until_use=self._ahead.foresight.seconds_until,
            wake=lambda: self._jobs.wake(),
            left=self._ahead.left,
        )
        self._ahead.evictor.claim = self._movement.book.claim
        self._uploads.prefer(self._movement.landing_order)
        self._jobs = Jobs(
            self._catalog,
            self._incarnation,
            self._make_handlers(locks),
            slow_kinds=SLOW_KINDS,
            endless_kinds=ENDLESS_KINDS,
            quiet_kinds=QUIET_KINDS,
            may_run=self._may_run,
        )
        self._opener.listen(self._jobs.wake)
        self._jobs.listen(lambda _: self._ahead.evictor.expect_more())
        rules: Any = {
            "trash_seconds": self._config.trash_seconds,
            "why_not_remote": self._tiers.why_not_remote,
        }
        self._checkpoints = Checkpoints(self._catalog, self._uploads, self._jobs, **rules)
        self._retention = Retention(
            self._catalog,
            self._checkpoints.readers,
            is_open=self._opener.is_open,
            wake=self._jobs.wake,
        )
        self._uploads.listen(self._checkpoints.session_ended)
        stack.push_async_callback(self._checkpoints.close)
        self._datasets = Datasets(self._catalog, self._uploads, self._jobs, **rules)
        self._following = Following(self._catalog)
        self._origins = OriginDatasets(
            self._catalog,
            self._tiers,
            self._jobs,
            self._opener.bringer,
            self._opener.origins.content_of,
        )
        stack.push_async_callback(self._uploads.close)

    def _make_handlers(self, locks: NamedLocks) -> dict[str, Handler]:
        """What does each kind of job; without an object tier flushes stay queued for one."""
        catalog, opener = self._catalog, self._opener
        publisher: ObjectPublisher | None = None
        self._delta_bytes: dict[str, int] = {}
        notes: Handler | None = None
        if self._tiers.object is not None:
            notes = RunNotes(catalog, self._tiers, self._tiers.object, locks)
            publisher = ObjectPublisher(
                catalog,
                self._tiers,
                self._tiers.object,
                locks,
                opener.forget,
                stores_deltas=self._config.object_deltas,
            )
            self._delta_bytes = publisher.delta_bytes
        self._integrity = Integrity(
            catalog,
            self._tiers,
            opener,
            publisher,
            locks,
            self._budget,
            is_planned=lambda blob: self._ahead.foresight.seconds_until(blob) is not None,
            scrub_bytes_per_second=self._config.scrub_bytes_per_second,
            scrub_interval_seconds=self._config.scrub_interval_seconds,
        )
        handlers: dict[str, Handler] = {**self._movement.handlers, **self._integrity.handlers}
        self._fingerprints = Fingerprints(
            catalog,
            opener.bringer,
            self._budget,
            bytes_per_second=self._config.fingerprint_bytes_per_second,
            is_landing=lambda: self._uploads.num_landing > 0,
            wake=lambda: self._jobs.wake(),
        )
        handlers[FINGERPRINT] = self._fingerprints
        handlers[RETAIN] = lambda progress: self._retention(progress)
        if notes is not None:
            handlers[NOTES] = notes
        if publisher is not None:
            handlers[FLUSH] = Flush(catalog, publisher, locks, self._budget)
        return handlers

    async def _recover(self) -> None:
        """Settle what an earlier daemon left, however it ended."""
        num_aborted = await recover_catalog_state(self._catalog)
        num_jobs = await take_over_jobs(self._catalog)
        num_queued = await self._catalog.write(enqueue_missing)
        await reconcile(self._catalog, self._tiers, replaced=self._config.replaced)
        await self._catalog.write(enqueue_return)
        await self._catalog.write(queue_all_retention)
        logger.info(
            "aborted %d generations, took over %d jobs, queued %d",
            num_aborted,
            num_jobs,
            num_queued,
        )

    async def _start_background(self, stack: AsyncExitStack) -> None:
        stack.push_async_callback(self._background.close)
        await self._uploads.start()
        await self._movement.start(self._jobs)
        await self._integrity.start(self._jobs)
        self._opener.quarantine.may_be_repaired = True
        self._jobs_task = self._background.start("jobs", self._jobs.run())
        self._background.start("ahead", self._ahead.run())
        self._background.start("tiers", TierWatch(self._tiers, self._note_tier).run())

    def _may_run(self, kind: str) -> bool:
        """Flushes wait while there is nowhere to bring anything."""
        store = self._tiers.object
        return kind != FLUSH or store is None or store.health == HEALTHY

    async def _note_tier(self, tier: str, event: str, detail: str) -> None:
        self._jobs.wake()
        subject = f"tier {tier}"
        await self._catalog.write(lambda connection: record(connection, subject, event, detail))

    async def _open_edges(self, stack: AsyncExitStack) -> None:
        """Descriptor socket, HTTP, gRPC: the handshake comes last, as it names the others."""
        self._attached = Attached()
        self._status = StatusReader(
            self._tiers, self._catalog, self._opener, self._read_daemon_state
        )
        http_socket = _listen_again(self._config.http_address, load_http_port(self._config.data))
        port = http_socket.getsockname()[1]
        save_http_port(self._config.data, port)
        self._http_url = self._config.http_address.url(port, self._advertised_host())
        await self._open_descriptors(stack)
        await self._open_http(stack, http_socket)
        await self._open_rpc(stack)

    async def _open_descriptors(self, stack: AsyncExitStack) -> None:
        self._descriptors = DescriptorServer(
            self._sockets.descriptors,
            opener=self._opener,
            uploads=self._uploads,
            auth=self._auth,
            node=self._node,
            incarnation=self._incarnation,
            http_url=self._http_url,
            plans=self._ahead.plans,
            following=self._following,
        )
        await self._descriptors.start()
        stack.push_async_callback(self._descriptors.close)

    async def _open_http(self, stack: AsyncExitStack, listening: socket.socket) -> None:
        app = make_app(
            opener=self._opener,
            uploads=self._uploads,
            auth=self._auth,
            render_metrics=self._render_metrics,
            is_serving=lambda: self._state == "serving",
            plans=self._ahead.plans,
            following=self._following,
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_GRACE_SECONDS)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        tls = self._tls if self._config.http_address.tls else None
        await web.SockSite(runner, listening, ssl_context=tls).start()

    async def _open_rpc(self, stack: AsyncExitStack) -> None:
        data_folder = str(self._config.data.resolve())
        identity = Identity(
            version=forebay_version(),
            node=self._node,
            incarnation=self._incarnation,
            data_folder=data_folder,
            descriptor_socket=str(self._sockets.descriptors),
            http_url=self._http_url,
        )
        plans = PlanReader(self._tiers, self._catalog, self._ahead.plans)
        services = Services(
            admin=AdminService(
                identity,
                self._auth,
                self._attached,
                self._status.read,
                lambda: self._state,
                plans,
            ),
            blobs=BlobsService(
                self._uploads,
                self._catalog,
                self._auth,
                self._checkpoints.generations.manifest_in_memory,
            ),
            checkpoints=CheckpointsService(
                self._checkpoints,
                self._retention,
                self._auth,
                self._fingerprints,
                self._incarnation,
            ),
            datasets=DatasetsService(
                self._datasets,
                self._origins,
                Parts(self._catalog),
                KeptStatistics(self._catalog, self._jobs),
            ),
            integrity=IntegrityService(self._integrity),
            movement=MovementService(self._movement),
            plans=PlansService(self._ahead.plans, plans),
        )
        gate = Gate(self._auth, self._metrics, lambda: self._state != "serving")
        reflection = self._config.reflection
        self._rpc = RpcServer(gate, services, reflection_enabled=reflection)
        addresses = self._config.rpc_addresses
        ports = await self._rpc.start(self._sockets.rpc, addresses, self._config.certificate)
        stack.push_async_callback(self._rpc.stop, STOP_GRACE_SECONDS)
        host = self._advertised_host()
        self._tcp_urls = [
            address.url(port, host) for address, port in zip(addresses, ports, strict=True)
        ]

    def _tell(self, data: Path) -> None:
        """Everything listens: say where."""
        rpc = f"unix:{self._sockets.rpc}"
        self._addresses = (rpc, *self._tcp_urls, self._http_url)
        DaemonAddress(
            pid=os.getpid(),
            incarnation=self._incarnation,
            node=self._node,
            version=forebay_version(),
            rpc=rpc,
            tcp=self._tcp_urls[0] if self._tcp_urls else None,
            descriptor_socket=str(self._sockets.descriptors),
            http_url=self._http_url,
            protocols=protocol_range(),
        ).write(data)
        self._started([f"serving {data.resolve()}", *(f"  {one}" for one in self._addresses)])

    def _advertised_host(self) -> str:
        return self._config.advertise_host or socket.gethostname()

    # ------------------------------------------------------------------------------- the run

    def _num_clients(self) -> int:
        return len(self._attached.clients | self._descriptors.clients)

    def _read_daemon_state(self) -> DaemonState:
        return DaemonState(
            started_unix=self._started_unix,
            state=self._state,
            num_clients=self._num_clients(),
            addresses=self._addresses,
        )

    async def _render_metrics(self) -> bytes:
        samples = [
            *await self._status.read_samples(),
            *self._ahead.samples(),
            *self._integrity.samples(),
            Sample("forebay_landed_bytes", (), self._uploads.recorder.landed_bytes),
            Sample("forebay_shared_bytes", (), self._uploads.recorder.shared_bytes),
            *(Sample("forebay_delta_bytes", (k,), n) for k, n in self._delta_bytes.items()),
        ]
        return self._metrics.render(samples)

    async def _watch_idle(self) -> None:
        """Ask for the end once nobody has been here, and nothing below local, for long enough."""
        limit = self._config.idle_exit
        busy_at = time.monotonic()
        while time.monotonic() - busy_at < limit:
            await asyncio.sleep(min(IDLE_LOOK_SECONDS, limit / 4))
            if self._num_clients() or await self._catalog.read(count_below_local):
                busy_at = time.monotonic()
        logger.info("idle for %.0f s without a client: stopping", limit)
        self._stopping.set()

    # ------------------------------------------------------------------------- drain and stop

    async def _drain(self) -> None:
        """Finish what was begun, start nothing new, and say what is left after the time for it."""
        self._state = "draining"
        logger.info("draining, for at most %.0f s", self._config.drain_seconds)
        deadline = asyncio.get_running_loop().time() + self._config.drain_seconds
        await self._rpc.set_draining()
        self._attached.end()
        self._jobs.finish()  # a running one is finished, the others go on at the next start
        await self._uploads.drain(self._config.drain_seconds)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await asyncio.wait([self._jobs_task])
        if self._jobs.num_running:
            logger.warning(
                "%d jobs did not end in time: they go on at the next start", self._jobs.num_running
            )
        self._jobs.stop()
        await self._drain_last_seals(deadline)

    async def _drain_last_seals(self, deadline: float) -> None:
        """Answer no calls any more, then land what was sealed up to here."""
        await self._rpc.stop(STOP_GRACE_SECONDS)
        left_seconds = max(deadline - asyncio.get_running_loop().time(), 0.0)
        if not await self._uploads.drain(left_seconds):
            logger.warning(
                "%d sealed uploads did not land in %.0f s and are lost with this process: save "
                "those generations again, or give drain-seconds more",
                self._uploads.num_landing,
                self._config.drain_seconds,
            )

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        """The first signal asks for a drain, the second one ends the process here and now.

        Nothing half-done is visible at any instant, so an end without goodbye is as safe as
        SIGKILL: the next start recovers.
        """
        if not self._stopping.is_set():
            self._stopping.set()
            return
        logger.warning("second signal: ending without waiting for running work")
        logging.shutdown()
        os._exit(ExitCode.FAILURE)

    def _crash(self) -> None:
        self._has_crashed = True
        self._stopping.set()


def _end_at_once(error: BaseException) -> None:
    """Nobody knows any more what the catalog holds: end before anybody is answered or acts on it.

    The next start reads what is durable, and recovers as after SIGKILL.
    """
    logger.critical("the catalog failed, the daemon ends at once: %s", error)
    logging.shutdown()
    os._exit(ExitCode.FAILURE)


def _raise_open_files() -> None:
    """Take as many descriptors as the hard limit allows: soft limits are often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen_again(address: Address, last_port: int) -> socket.socket:
    """:func:`_listen`; where any port will do, on that of the last start if it is free."""
    if address.port == 0 and last_port:
        with suppress(StorageError):
            return _listen(replace(address, port=last_port))
    return _listen(address)


def _listen(address: Address) -> socket.socket:
    """A listening TCP socket; :class:`StorageError` if the port is taken."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=512)
    except OSError as error:
        raise StorageError(
            f"cannot listen on {address.target}: {error.strerror}; choose another http-listen"
        ) from error


def _tls_context(config: Config) -> ssl.SSLContext:
    assert config.certificate is not None, "checked with the configuration"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    chain, key = config.certificate
    try:
        context.load_cert_chain(chain, key)
    except OSError as error:  # ssl.SSLError is one
        raise InvalidRequest(
            f"tls-cert {chain} and tls-key {key} are no certificate chain with its key: "
            f"{error.strerror or error}"
        ) from error
    return context
