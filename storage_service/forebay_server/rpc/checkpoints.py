"""The Checkpoints service: messages to use cases and back, no decisions."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from forebay_server.catalog.queries_checkpoints import PackPlan
from forebay_server.catalog.queries_runs import AttemptInfo, GenerationInfo, RunInfo
from forebay_server.model.lineage import Point
from forebay_server.publish.checkpoint import Checkpoints, PackSeal
from forebay_server.publish.generations import parse_point
from forebay_server.rpc.interceptors import caller_uid
from forebay_wire.ids import GenerationId
from forebay_wire.v1 import checkpoints_pb2 as pb
from forebay_wire.v1 import checkpoints_pb2_grpc


class TicketGiver(Protocol):
    """What is needed of :class:`forebay_server.bulk.tickets.Auth`."""

    def ticket(
        self, method: Literal["GET", "PUT"], *, uid: int, stop: int, session: str | None
    ) -> str:
        """A ticket for the first *stop* bytes of *session*'s slot."""
        ...


class CheckpointsService(checkpoints_pb2_grpc.CheckpointsServicer):
    """Converts between messages and :class:`Checkpoints`."""

    def __init__(
        self, checkpoints: Checkpoints, tickets: TicketGiver, incarnation: str = ""
    ) -> None:
        self._checkpoints = checkpoints
        self._incarnation = incarnation
        self._generations = checkpoints.generations
        self._tickets = tickets

    async def BeginAttempt(self, request: pb.BeginAttemptRequest, context: Any) -> pb.Attempt:
        parent = Point(request.parent_attempt, request.parent_step) if request.has_parent else None
        attempt = await self._checkpoints.begin_attempt(
            request.run, parent, request.num_ranks, request.request
        )
        return _attempt(attempt)

    async def BeginPack(self, request: pb.BeginPackRequest, context: Any) -> pb.PackSession:
        plan = PackPlan(
            GenerationId(request.run, request.attempt, request.step),
            request.rank,
            request.num_ranks,
            request.total_bytes,
        )
        uid = caller_uid()
        grant = await self._checkpoints.begin_pack(uid, plan, request.slot_bytes)
        return pb.PackSession(
            session=grant.session,
            slot_bytes=grant.slot_bytes,
            lease_seconds=grant.lease_seconds,
            put_ticket=self._tickets.ticket(
                "PUT", uid=uid, stop=grant.slot_bytes, session=grant.session
            ),
            incarnation=self._incarnation,
        )

    async def SealPack(self, request: pb.SealPackRequest, context: Any) -> pb.SealPackResponse:
        seal = PackSeal(
            session=request.session,
            sequence=request.sequence,
            num_bytes=request.num_bytes,
            cuts=tuple(request.cuts),
            description_bytes=request.description_bytes,
            metrics_json=request.metrics_json,
            dataset_json=request.dataset_json,
        )
        all_sealed = await self._checkpoints.seal_pack(caller_uid(), seal)
        return pb.SealPackResponse(all_sealed=all_sealed)

    async def WaitGeneration(
        self, request: pb.WaitGenerationRequest, context: Any
    ) -> pb.Generation:
        generation = GenerationId(request.run, request.attempt, request.step)
        found = await self._generations.wait(
            generation, request.durability, request.timeout_seconds
        )
        return _generation(found)

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Any) -> pb.Generation:
        generation = GenerationId(request.run, request.attempt, request.step)
        return _generation(await self._generations.look(generation))

    async def ResolveGeneration(
        self, request: pb.ResolveGenerationRequest, context: Any
    ) -> pb.Generation:
        found = await self._generations.resolve(
            request.run,
            request.selector,
            request.durability,
            [parse_point(text) for text in request.skip],
            request.timeout_seconds,
        )
        return _generation(found)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        found, after = await self._generations.list_runs(request.after, request.limit)
        return pb.ListRunsResponse(runs=[_run(run) for run in found], next=after)

    async def ListGenerations(
        self, request: pb.ListGenerationsRequest, context: Any
    ) -> pb.ListGenerationsResponse:
        attempts, found, after = await self._generations.list_generations(
            request.run, request.after, request.limit
        )
        return pb.ListGenerationsResponse(
            attempts=[_attempt(attempt) for attempt in attempts],
            generations=[_generation(generation) for generation in found],
            next=after,
        )

    async def DeleteGeneration(
        self, request: pb.DeleteGenerationRequest, context: Any
    ) -> pb.DeleteGenerationResponse:
        use, run = self._checkpoints, request.run
        if request.all:
            number = await (use.delete_run_now if request.now else use.delete_run)(run)
        else:
            delete = use.delete_generation_now if request.now else use.delete_generation
            number = await delete(GenerationId(run, request.attempt, request.step))
        return pb.DeleteGenerationResponse(num_deleted=number)


def _attempt(attempt: AttemptInfo) -> pb.Attempt:
    return pb.Attempt(
        run=attempt.run,
        attempt=attempt.attempt,
        created_unix=attempt.created_unix,
        **_parent(attempt.parent),
    )


def _generation(found: GenerationInfo) -> pb.Generation:
    return pb.Generation(
        run=found.id.run,
        attempt=found.id.attempt,
        step=found.id.step,
        state=found.state,
        durability=found.durability,
        manifest=found.manifest or "",
        num_ranks=found.num_ranks,
        num_bytes=found.num_bytes,
        created_unix=found.created_unix,
        metrics_json=found.metrics_json,
        error=found.error,
        **_parent(found.parent),
    )


def _run(run: RunInfo) -> pb.RunSummary:
    summary = pb.RunSummary(
        run=run.run,
        num_attempts=run.num_attempts,
        num_generations=run.num_generations,
        num_bytes=run.num_bytes,
    )
    if run.latest is not None:
        summary.has_latest = True
        summary.latest_attempt = run.latest.id.attempt
        summary.latest_step = run.latest.id.step
        summary.latest_durability = run.latest.durability
    return summary


def _parent(parent: Point | None) -> dict[str, Any]:
    if parent is None:
        return {}
    return {"has_parent": True, "parent_attempt": parent.attempt, "parent_step": parent.step}
