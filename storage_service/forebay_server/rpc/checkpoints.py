"""The Checkpoints service: messages to use cases and back, no decisions."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from forebay_server.catalog.queries_checkpoints import PackPlan
from forebay_server.catalog.queries_runs import AttemptInfo, GenerationInfo, RunInfo
from forebay_server.model.lineage import Point
from forebay_server.model.save_rounds import Ask, Ruling, Verdict
from forebay_server.move.fingerprints import Fingerprints
from forebay_server.publish.checkpoint import (
    SLOT_SECONDS,
    Checkpoints,
    SaveAsk,
)
from forebay_server.publish.generations import parse_point
from forebay_server.publish.lease import Grant
from forebay_server.publish.managing import RunDetail
from forebay_server.publish.retention import Retention
from forebay_server.publish.seal import PackSeal, check_note
from forebay_server.rpc.interceptors import caller_uid
from forebay_wire.ids import GenerationId
from forebay_wire.limits import MANIFEST_CHUNK_BYTES
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
        self,
        checkpoints: Checkpoints,
        retention: Retention,
        tickets: TicketGiver,
        fingerprints: Fingerprints,
        incarnation: str = "",
    ) -> None:
        self._checkpoints = checkpoints
        self._managing = checkpoints.managing
        self._retention = retention
        self._incarnation = incarnation
        self._generations = checkpoints.generations
        self._tickets = tickets
        self._fingerprints = fingerprints

    async def BeginAttempt(self, request: pb.BeginAttemptRequest, context: Any) -> pb.Attempt:
        parent = Point(request.parent_attempt, request.parent_step) if request.has_parent else None
        fork = None
        if parent is not None and request.parent_run not in ("", request.run):
            fork, parent = GenerationId(request.parent_run, *parent), None
        attempt = await self._checkpoints.begin_attempt(
            request.run,
            parent,
            request.num_ranks,
            request.request,
            fork=fork,
            keep_json=request.keep_json if request.has_keep else None,
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
        ruling = Ruling(Verdict.REUSE)
        if request.save_number:
            ruling = await self._checkpoints.ask_to_save(uid, plan, _ask(request))
        told: dict[str, Any] = {
            "verdict": ruling.verdict,
            "plan": ruling.plan,
            "reason": ruling.reason,
        }
        if ruling.verdict is not Verdict.REUSE:
            return pb.PackSession(incarnation=self._incarnation, **told)
        grant = await self._checkpoints.begin_pack(
            uid, plan, request.slot_bytes, request.wait_seconds or SLOT_SECONDS
        )
        return self._session(grant, told)

    async def PreparePack(self, request: pb.PreparePackRequest, context: Any) -> pb.PackSession:
        grant = await self._checkpoints.prepare_pack(
            caller_uid(),
            request.run,
            request.attempt,
            request.rank,
            request.total_bytes,
            request.slot_bytes,
        )
        if grant is None:
            return pb.PackSession(incarnation=self._incarnation)
        return self._session(grant, {})

    def _session(self, grant: Grant, told: dict[str, Any]) -> pb.PackSession:
        return pb.PackSession(
            **told,
            session=grant.session,
            slot_bytes=grant.slot_bytes,
            lease_seconds=grant.lease_seconds,
            was_prepared=grant.was_ahead,
            put_ticket=self._tickets.ticket(
                "PUT", uid=caller_uid(), stop=grant.slot_bytes, session=grant.session
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
            tags=tuple(request.tags),
            note_json=request.note_json,
            stall_seconds=request.stall_seconds,
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
            look_only=request.look_only,
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

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.RunDetail:
        return _detail(await self._managing.detail(request.run))

    async def SetTag(self, request: pb.SetTagRequest, context: Any) -> pb.RunDetail:
        if request.remove:
            return _detail(await self._managing.untag(request.run, request.tag))
        generation = GenerationId(request.run, request.attempt, request.step)
        return _detail(await self._managing.tag(generation, request.tag))

    async def SetPin(self, request: pb.SetPinRequest, context: Any) -> pb.Generation:
        generation = GenerationId(request.run, request.attempt, request.step)
        if request.remove:
            return _generation(await self._managing.unpin(generation))
        return _generation(
            await self._managing.pin(generation, request.reason, request.hold_seconds)
        )

    async def SetNote(self, request: pb.SetNoteRequest, context: Any) -> pb.Generation:
        generation = GenerationId(request.run, request.attempt, request.step)
        return _generation(await self._managing.note(generation, check_note(request.note_json)))

    async def SetKeep(self, request: pb.SetKeepRequest, context: Any) -> pb.RunDetail:
        return _detail(await self._managing.set_keep(request.run, request.keep_json))

    async def Prune(self, request: pb.PruneRequest, context: Any) -> pb.PruneResponse:
        found = await self._retention.prune(request.run, request.keep_json, is_dry=request.dry_run)
        verdicts = [
            pb.PruneVerdict(
                attempt=one.point.attempt,
                step=one.point.step,
                is_kept=one.is_kept,
                reasons=one.reasons,
                num_bytes=found.num_bytes[one.point],
            )
            for one in found.verdicts
        ]
        return pb.PruneResponse(
            verdicts=verdicts, num_deleted=found.num_deleted, keep_json=found.keep.to_json()
        )

    async def ReadFingerprints(
        self, request: pb.ReadFingerprintsRequest, context: Any
    ) -> pb.ReadFingerprintsResponse:
        generation = GenerationId(request.run, request.attempt, request.step)
        if request.compute:
            await self._fingerprints.ask(generation)
        place = request.rank, request.offset, MANIFEST_CHUNK_BYTES
        found = await self._fingerprints.read(generation, *place)
        answer = pb.ReadFingerprintsResponse(
            num_packs=found.num_packs, data=found.chunk, total_bytes=found.num_bytes
        )
        if found.job is not None:
            answer.job_state = found.job.state
            answer.done_bytes, answer.job_bytes = found.job.done_bytes, found.job.total_bytes
            answer.error = found.job.error
        return answer


def _ask(request: pb.BeginPackRequest) -> SaveAsk:
    ask = Ask(request.step, request.structure, request.plan, request.may_skip)
    return SaveAsk(request.save_number, ask)


def _detail(found: RunDetail) -> pb.RunDetail:
    detail = pb.RunDetail(
        run=found.run,
        keep_json=found.keep_json,
        tags=[pb.Tag(tag=one.tag, attempt=one.attempt, step=one.step) for one in found.tags],
        forks=[
            pb.Fork(
                run=run,
                attempt=attempt,
                parent_attempt=parent.attempt,
                parent_step=parent.step,
            )
            for run, attempt, parent in found.forks
        ],
    )
    if found.fork is not None:
        detail.parent_run = found.fork.run
        detail.parent_attempt, detail.parent_step = found.fork.attempt, found.fork.step
    return detail


def _attempt(attempt: AttemptInfo) -> pb.Attempt:
    return pb.Attempt(
        run=attempt.run,
        attempt=attempt.attempt,
        created_unix=attempt.created_unix,
        **_parent(attempt.parent, attempt.fork),
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
        tags=found.tags,
        is_pinned=found.pin is not None,
        pin_reason=found.pin or "",
        pin_expires_unix=found.pin_expires_unix if found.pin is not None else 0.0,
        note_json=found.note_json,
        dataset_json=found.dataset_json,
        ram_unix=found.ram_unix,
        local_unix=found.local_unix,
        remote_unix=found.remote_unix,
        stall_seconds=found.stall_seconds,
        shared_bytes=found.shared_bytes,
        **_parent(found.parent, found.fork),
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


def _parent(parent: Point | None, fork: GenerationId | None) -> dict[str, Any]:
    stands_on = parent or fork
    if stands_on is None:
        return {}
    return {
        "has_parent": True,
        "parent_run": "" if fork is None else fork.run,
        "parent_attempt": stands_on.attempt,
        "parent_step": stands_on.step,
    }
