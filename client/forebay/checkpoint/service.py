"""The daemon's checkpoint calls, in the words of this package."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forebay.methods import Blobs, Checkpoints, Method, Request, Response
from forebay.transfer import Transfer, UploadSlot
from forebay_wire.errors import (
    Conflict,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
)
from forebay_wire.ids import GenerationId, check_name, new_random_name
from forebay_wire.manifest import GenerationManifest, parse
from forebay_wire.protocol import DataEndpoint
from forebay_wire.v1 import blobs_pb2, checkpoints_pb2

_log = logging.getLogger(__name__)

RPC_SECONDS = 60.0
"""For calls that only touch the catalog."""


ANSWER_SECONDS = 5.0
"""Left of a call's time for the daemon to say that it ran out."""


class Channel(Protocol):
    """The control connection, as far as checkpoints need it."""

    def call(
        self, method: Method[Request, Response], request: Request, *, timeout: float = ...
    ) -> Response: ...


class Client(Protocol):
    """The connection that a Checkpointer works over: `forebay.connect()` makes one."""

    @property
    def channel(self) -> Channel: ...

    @property
    def endpoint(self) -> DataEndpoint: ...

    @property
    def transfer(self) -> Transfer: ...

    def read_manifest(self, manifest: str) -> bytes: ...

    def reconnect(self) -> Callable[[], Client]: ...


@dataclass(frozen=True)
class PackTerms:
    """Which pack of which generation a rank saves, and what goes with it at the seal."""

    generation: GenerationId
    rank: int
    num_ranks: int
    metrics_json: str = ""
    dataset_json: str = ""
    tags: tuple[str, ...] = ()
    note_json: str = ""


@dataclass(frozen=True)
class PlanAsk:
    """What a rank says when it asks whether all may save by the plan they hold."""

    number: int
    """Of the save within the attempt, from 1; the same on all ranks."""
    structure: str
    """Digest of what its state looks like; empty: it cannot save."""
    plan: int = 0
    """The plan that it holds; 0: none."""
    may_skip: bool = False


class CheckpointService:
    """The calls that save and restore one run. Thread-safe, holds nothing open."""

    def __init__(self, client: Client, run: str, fork: tuple[str, str] | None = None) -> None:
        """*fork*: run and selector of the generation that *run* begins from when it is new."""
        self._client = client
        self.run = run
        self.fork = fork

    @property
    def transfer(self) -> Transfer:
        return self._client.transfer

    @property
    def incarnation(self) -> str:
        """Of the daemon that this process is connected to."""
        return self._client.endpoint.incarnation

    def begin_attempt(
        self, parent: GenerationId | None, num_ranks: int, keep_json: str | None = None
    ) -> int:
        """Open the run's next attempt; older attempts can no longer write from here on.

        *parent* may be of another run. With *keep_json* that is kept of the run from here on.
        """
        request = checkpoints_pb2.BeginAttemptRequest(
            run=self.run,
            has_parent=parent is not None,
            parent_attempt=parent.attempt if parent else 0,
            parent_step=parent.step if parent else 0,
            num_ranks=num_ranks,
            request=new_random_name(),
            parent_run=parent.run if parent and parent.run != self.run else "",
            has_keep=keep_json is not None,
            keep_json=keep_json or "",
        )
        return self._client.channel.call(
            Checkpoints.BeginAttempt, request, timeout=RPC_SECONDS
        ).attempt

    def begin_pack(
        self,
        terms: PackTerms,
        total_bytes: int,
        slot_bytes: int,
        timeout: float,
        ask: PlanAsk | None = None,
    ) -> checkpoints_pb2.PackSession:
        """A session; with *ask* only if all ranks may reuse their plan (``.verdict``)."""
        asked: dict[str, Any] = {}
        if ask is not None:
            asked["save_number"] = ask.number
            asked["structure"] = ask.structure
            asked["plan"] = ask.plan
            asked["may_skip"] = ask.may_skip
        request = checkpoints_pb2.BeginPackRequest(
            run=self.run,
            attempt=terms.generation.attempt,
            step=terms.generation.step,
            rank=terms.rank,
            num_ranks=terms.num_ranks,
            total_bytes=total_bytes,
            slot_bytes=slot_bytes,
            wait_seconds=max(0.001, timeout - ANSWER_SECONDS),
            **asked,
        )
        return self._client.channel.call(Checkpoints.BeginPack, request, timeout=timeout)

    def prepare_pack(
        self, attempt: int, rank: int, num_bytes: int, timeout: float = RPC_SECONDS
    ) -> checkpoints_pb2.PackSession:
        """A session for the rank's next pack, whatever that holds; without one: not now.

        With no bytes the one that there is ends, unless a pack has it.
        """
        request = checkpoints_pb2.PreparePackRequest(
            run=self.run, attempt=attempt, rank=rank, total_bytes=num_bytes, slot_bytes=num_bytes
        )
        return self._client.channel.call(Checkpoints.PreparePack, request, timeout=timeout)

    def slot(self, session: checkpoints_pb2.PackSession) -> UploadSlot:
        return self.transfer.upload_slot(
            session.session,
            session.slot_bytes,
            session.put_ticket,
            lambda: self.renew(session.session),
        )

    def renew(self, session: str) -> str:
        """Extend the lease; a fresh ticket for HTTP PUT."""
        request = blobs_pb2.RenewRequest(session=session)
        return self._client.channel.call(Blobs.Renew, request, timeout=RPC_SECONDS).put_ticket

    def append(
        self, session: str, sequence: int, num_bytes: int, cuts: Sequence[int], timeout: float
    ) -> None:
        request = blobs_pb2.AppendRequest(
            session=session, sequence=sequence, num_bytes=num_bytes, cuts=cuts
        )
        self._client.channel.call(Blobs.Append, request, timeout=timeout)

    def seal_pack(self, request: checkpoints_pb2.SealPackRequest) -> bool:
        """Whether all ranks have sealed now."""
        return self._client.channel.call(
            Checkpoints.SealPack, request, timeout=RPC_SECONDS
        ).all_sealed

    def abort(self, session: str) -> None:
        """End an upload session unless it is sealed, or out of reach: its lease ends it then."""
        try:
            request = blobs_pb2.AbortRequest(session=session)
            self._client.channel.call(Blobs.Abort, request, timeout=5.0)
        except Conflict:
            return
        except ForebayError as error:
            _log.warning("could not abort upload session %s: %s", session, error)

    def wait(
        self, generation: GenerationId, durability: str, timeout: float
    ) -> checkpoints_pb2.Generation:
        """Wait up to *timeout* seconds for a generation to become as durable as named."""
        request = checkpoints_pb2.WaitGenerationRequest(
            run=self.run,
            attempt=generation.attempt,
            step=generation.step,
            durability=durability,
            timeout_seconds=timeout,
        )
        return self._client.channel.call(
            Checkpoints.WaitGeneration, request, timeout=timeout + 10.0
        )

    def resolve(
        self, selector: str, durability: str, skip: Sequence[str], timeout: float
    ) -> checkpoints_pb2.Generation:
        """The generation that is meant. It is one of another run for ``latest`` of a run that was
        forked, or is going to be, and has none of its own."""
        if self.fork is not None and selector == "latest" and not self.is_begun():
            return self.resolve_fork(durability, skip, timeout)
        return self._resolve(self.run, selector, durability, skip, timeout)

    def is_begun(self) -> bool:
        """Whether the run has an attempt; Conflict if that did not fork what it is to."""
        assert self.fork is not None
        request = checkpoints_pb2.GetRunRequest(run=self.run)
        try:
            found = self._client.channel.call(Checkpoints.GetRun, request, timeout=RPC_SECONDS)
        except NotFound:
            return False
        if found.parent_run != self.fork[0]:
            origin = f"from run {found.parent_run}" if found.parent_run else "from no other run"
            raise Conflict(
                f"fork_from names run {self.fork[0]}, and run {self.run} exists already and was "
                f"forked {origin}: give the new run a name of its own, or leave fork_from out"
            )
        return True

    def resolve_fork(
        self, durability: str, skip: Sequence[str], timeout: float
    ) -> checkpoints_pb2.Generation:
        """The generation that a new run begins from; InvalidRequest if there is none."""
        assert self.fork is not None
        run, selector = self.fork
        try:
            return self._resolve(run, selector, durability, skip, timeout)
        except NotFound as error:
            if skip:
                raise
            raise InvalidRequest(f"fork_from={run}@{selector}: {error.message}") from error

    def _resolve(
        self, run: str, selector: str, durability: str, skip: Sequence[str], timeout: float
    ) -> checkpoints_pb2.Generation:
        request = checkpoints_pb2.ResolveGenerationRequest(
            run=run,
            selector=selector,
            durability=durability,
            skip=skip,
            timeout_seconds=timeout,
        )
        return self._client.channel.call(
            Checkpoints.ResolveGeneration, request, timeout=timeout + 10.0
        )

    def look(self, generation: GenerationId) -> checkpoints_pb2.Generation | None:
        """How a generation stands, without waiting; None if there is none."""
        request = checkpoints_pb2.GetGenerationRequest(
            run=self.run, attempt=generation.attempt, step=generation.step
        )
        try:
            return self._client.channel.call(
                Checkpoints.GetGeneration, request, timeout=RPC_SECONDS
            )
        except NotFound:
            return None

    def delete(self, generation: GenerationId) -> None:
        """Delete a generation for good: what a run no longer keeps would fill the trash."""
        request = checkpoints_pb2.DeleteGenerationRequest(
            run=self.run, attempt=generation.attempt, step=generation.step, now=True
        )
        self._client.channel.call(Checkpoints.DeleteGeneration, request, timeout=RPC_SECONDS)

    def manifest(self, manifest: str, generation: GenerationId) -> GenerationManifest:
        """The verified manifest; :class:`IntegrityError` names the generation."""
        try:
            found = parse(
                self._client.read_manifest(manifest), f"generation {generation}", manifest
            )
        except IntegrityError as error:
            raise IntegrityError(f"manifest of generation {generation}: {error.message}") from error
        if not isinstance(found, GenerationManifest):
            raise IntegrityError(f"manifest {manifest} is not that of generation {generation}")
        return found


def to_json(value: Any) -> str:
    """Compact JSON for the text fields of a seal."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def parse_fork(fork_from: str | tuple[str, str | int]) -> tuple[str, str]:
    """``(run, selector)`` of ``"run"``, ``"run@SELECTOR"`` or ``("run", SELECTOR)``."""
    if isinstance(fork_from, tuple):
        if len(fork_from) != 2:
            raise InvalidRequest(
                f"fork_from={fork_from!r}: give 'run', 'run@SELECTOR' or (run, selector)"
            )
        run, selector = fork_from
    else:
        run, _, selector = fork_from.partition("@")
    return check_name("run", run), str(selector or "latest")
