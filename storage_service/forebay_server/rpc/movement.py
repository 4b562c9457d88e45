"""The Movement service: converts between messages and pins, policies, the trash, the stories."""

from __future__ import annotations

from typing import Any, Protocol

import grpc.aio

from forebay_server.move.jobs import Jobs
from forebay_server.move.pins import Pins, PinState
from forebay_server.move.policies import Assignment, PolicyBook
from forebay_server.move.trash import Trash
from forebay_server.move.why import Story, describe
from forebay_server.rpc.admin import convert_job
from forebay_wire.v1 import movement_pb2 as messages
from forebay_wire.v1 import movement_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class Movement(Protocol):
    """What is needed of :class:`forebay_server.movement.Movement`."""

    pins: Pins
    book: PolicyBook
    trash: Trash
    story: Story
    jobs: Jobs

    async def assign(self, owner: str, policy: str) -> Assignment:
        """Give *owner* a policy, and have what that asks for done."""
        ...


class MovementService(movement_pb2_grpc.MovementServicer):
    """What each call promises stands in ``movement.proto``."""

    def __init__(self, movement: Movement) -> None:
        self._movement = movement

    async def Pin(self, request: messages.PinRequest, context: Context) -> messages.PinState:
        found = await self._movement.pins.pin(
            request.target, request.tier, request.hold_seconds, self._movement.jobs
        )
        return _pin(found)

    async def GetPin(self, request: messages.GetPinRequest, context: Context) -> messages.PinState:
        return _pin(await self._movement.pins.look(request.pin))

    async def ListPins(
        self, request: messages.ListPinsRequest, context: Context
    ) -> messages.ListPinsResponse:
        found = await self._movement.pins.list()
        return messages.ListPinsResponse(pins=[_pin(one) for one in found])

    async def Unpin(
        self, request: messages.UnpinRequest, context: Context
    ) -> messages.UnpinResponse:
        number = await self._movement.pins.unpin(request.pin)
        return messages.UnpinResponse(num_unpinned=number)

    async def SetPolicy(
        self, request: messages.SetPolicyRequest, context: Context
    ) -> messages.PolicyAssignment:
        made = await self._movement.assign(request.owner, request.policy)
        return messages.PolicyAssignment(**vars(made))

    async def ListPolicies(
        self, request: messages.ListPoliciesRequest, context: Context
    ) -> messages.ListPoliciesResponse:
        book = self._movement.book
        return messages.ListPoliciesResponse(
            policies=[
                messages.PolicyInfo(
                    name=name, text=describe(policy), is_default=policy is book.default
                )
                for name, policy in sorted(book.policies.items())
            ],
            assignments=[messages.PolicyAssignment(**vars(one)) for one in book.assignments()],
        )

    async def ListTrash(
        self, request: messages.ListTrashRequest, context: Context
    ) -> messages.ListTrashResponse:
        found = await self._movement.trash.list()
        return messages.ListTrashResponse(
            entries=[messages.TrashEntry(**vars(entry)) for entry in found]
        )

    async def RestoreTrash(
        self, request: messages.RestoreTrashRequest, context: Context
    ) -> messages.TrashEntry:
        entry = await self._movement.trash.restore(request.deletion)
        return messages.TrashEntry(**vars(entry))

    async def EmptyTrash(
        self, request: messages.EmptyTrashRequest, context: Context
    ) -> messages.EmptyTrashResponse:
        number = await self._movement.trash.empty(request.deletion)
        return messages.EmptyTrashResponse(num_deletions=number)

    async def ListJobs(
        self, request: messages.ListJobsRequest, context: Context
    ) -> messages.ListJobsResponse:
        story = self._movement.story
        page, following = await story.jobs(request.after, request.limit, everything=request.all)
        return messages.ListJobsResponse(jobs=[convert_job(job) for job in page], next=following)

    async def Why(self, request: messages.WhyRequest, context: Context) -> messages.WhyResponse:
        found = await self._movement.story.why(request.subject, request.num_events)
        return messages.WhyResponse(
            subject=found.subject,
            num_blobs=found.num_blobs,
            num_bytes=found.num_bytes,
            dirty_bytes=found.dirty_bytes,
            policy=found.policy,
            policy_from=found.policy_from,
            copies=[messages.Copies(**vars(one)) for one in found.copies],
            kept_by=found.kept_by,
            because=found.because,
            pins=[_pin(one) for one in found.pins],
            jobs=[convert_job(job) for job in found.jobs],
            history=[messages.Event(**vars(one)) for one in found.history],
        )


def _pin(found: PinState) -> messages.PinState:
    return messages.PinState(**vars(found))
