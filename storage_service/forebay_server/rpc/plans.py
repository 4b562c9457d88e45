"""The Plans service: converts between messages and the plans that the daemon keeps."""

from __future__ import annotations

import json
from typing import Any

import grpc.aio

from forebay_server.model.loader_times import LoaderTimes
from forebay_server.rpc.interceptors import caller_uid
from forebay_server.serve.plans import OrderParameters, Plan, Plans, Waited
from forebay_server.serve.standing import PlanReader, Standing
from forebay_wire.v1 import plans_pb2 as messages
from forebay_wire.v1 import plans_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class PlansService(plans_pb2_grpc.PlansServicer):
    """What each call promises stands in ``plans.proto``."""

    def __init__(self, plans: Plans, reader: PlanReader) -> None:
        self._plans = plans
        self._reader = reader

    async def RegisterPlan(
        self, request: messages.RegisterPlanRequest, context: Context
    ) -> messages.PlanStanding:
        order = None
        if request.HasField("order"):
            given = request.order
            order = OrderParameters(
                manifest=given.manifest,
                selection=given.selection,
                shuffle=given.shuffle,
                seed=given.seed,
                global_batch_size=given.global_batch_size,
                last_batch=given.last_batch,
                rank=given.rank,
                num_ranks=given.num_ranks,
                num_epochs=given.num_epochs,
                window_blocks=given.window_blocks,
                block_rows=given.block_rows,
                lanes=given.lanes,
                columns=json.dumps(list(given.columns)) if given.columns else "",
            )
        made = await self._plans.register(
            request.plan,
            request.loader,
            order,
            request.epoch,
            request.position,
            uid=caller_uid(),
            manifest=request.manifest,
        )
        return self._standing(made)

    async def AddRanges(
        self, request: messages.AddRangesRequest, context: Context
    ) -> messages.PlanStanding:
        turns: list[tuple[int, list[str]]] = []
        for one in request.ranges:
            if one.beside and turns:
                turns[-1][1].append(one.blob)
            else:
                turns.append((one.num_samples or 1, [one.blob]))
        return self._standing(
            self._plans.add_ranges(request.plan, request.page, turns, uid=caller_uid())
        )

    async def AdvancePlan(
        self, request: messages.AdvancePlanRequest, context: Context
    ) -> messages.PlanStanding:
        return self._standing(
            self._plans.advance(request.plan, request.epoch, request.position, uid=caller_uid())
        )

    async def EndPlan(
        self, request: messages.EndPlanRequest, context: Context
    ) -> messages.EndPlanResponse:
        return messages.EndPlanResponse(existed=self._plans.end(request.plan, uid=caller_uid()))

    async def ListPlans(
        self, request: messages.ListPlansRequest, context: Context
    ) -> messages.ListPlansResponse:
        found = await self._reader.read()
        return messages.ListPlansResponse(plans=[convert_standing(one) for one in found])

    def _standing(self, plan: Plan) -> messages.PlanStanding:
        return messages.PlanStanding(
            plan=plan.name, lease_seconds=self._plans.lease_seconds, waits=_waits(plan)
        )


def convert_standing(standing: Standing) -> messages.PlanSummary:
    """The message of a plan."""
    plan = standing.plan
    return messages.PlanSummary(
        plan=plan.name,
        loader=plan.loader,
        dataset=plan.dataset,
        epoch=plan.epoch,
        position=plan.position,
        num_samples=plan.num_samples,
        rate=plan.rate,
        waits=_waits(plan),
        ahead_bytes=standing.ahead_bytes,
        ready_bytes=standing.ready_bytes,
        expires_seconds=standing.expires_seconds,
        recent=[_wait(one, standing.now) for one in reversed(plan.recent)],
        times=None if plan.times is None else _times(plan.times, standing.now - plan.times_at),
        plan_bytes=plan.num_bytes,
    )


def _times(times: LoaderTimes, ago_seconds: float) -> messages.LoaderTimes:
    causes = {**dict.fromkeys(times.reading, 0.0), **times.stalls}
    return messages.LoaderTimes(
        samples=times.samples,
        batches=times.batches,
        bytes_read=times.bytes_read,
        masked_samples=times.masked_samples,
        seconds=times.seconds,
        wait_seconds=times.wait_seconds,
        causes=[
            messages.CauseTime(
                cause=cause,
                wait_seconds=causes[cause],
                read_seconds=times.reading.get(cause, 0.0),
            )
            for cause in sorted(
                causes, key=lambda one: (-causes[one], -times.reading.get(one, 0.0))
            )
        ],
        advice=times.advice,
        covers=times.covers,
        ago_seconds=ago_seconds,
    )


def _wait(waited: Waited, now: float) -> messages.Wait:
    parts = {f"{reason}_seconds": seconds for reason, seconds in waited.parts.items()}
    return messages.Wait(ago_seconds=now - waited.until, **parts)


def _waits(plan: Plan) -> messages.Waits:
    return messages.Waits(**vars(plan.waits))
