"""The Integrity service: converts between messages and scrub, fsck and garbage collection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import grpc.aio

from forebay_server.catalog.queries_jobs import Job
from forebay_server.move.fsck import Finding
from forebay_server.move.garbage import Doomed
from forebay_server.move.scrub import Report
from forebay_wire.v1 import integrity_pb2 as messages
from forebay_wire.v1 import integrity_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

MAX_NAMED: Final = 1000
"""Findings in one answer; it counts all."""


class ScrubState(Protocol):
    """What is needed of :class:`forebay_server.integrity.ScrubState`."""

    @property
    def job(self) -> Job: ...

    @property
    def report(self) -> Report: ...

    @property
    def outcomes(self) -> tuple[str, ...]: ...


class Checked(Protocol):
    """What is needed of :class:`forebay_server.integrity.Checked`."""

    @property
    def found(self) -> list[Finding]: ...

    @property
    def left(self) -> list[Finding]: ...


class Integrity(Protocol):
    """What is needed of :class:`forebay_server.integrity.Integrity`."""

    async def begin_scrub(self, tier: str) -> ScrubState: ...

    async def look_at_scrub(self, job: str) -> ScrubState: ...

    async def fsck(self, *, repair: bool) -> Checked: ...

    async def list_garbage(self) -> list[Doomed]: ...

    async def collect(self) -> None: ...


class IntegrityService(integrity_pb2_grpc.IntegrityServicer):
    """What each call promises stands in ``integrity.proto``."""

    def __init__(self, integrity: Integrity) -> None:
        self._integrity = integrity

    async def Scrub(self, request: messages.ScrubRequest, context: Context) -> messages.ScrubState:
        return _scrub(await self._integrity.begin_scrub(request.tier))

    async def GetScrub(
        self, request: messages.GetScrubRequest, context: Context
    ) -> messages.ScrubState:
        return _scrub(await self._integrity.look_at_scrub(request.job))

    async def Fsck(self, request: messages.FsckRequest, context: Context) -> messages.FsckReport:
        checked = await self._integrity.fsck(repair=request.repair)
        return messages.FsckReport(
            found=_findings(checked.found),
            num_found=len(checked.found),
            left=_findings(checked.left),
            num_left=len(checked.left),
        )

    async def ListGarbage(
        self, request: messages.ListGarbageRequest, context: Context
    ) -> messages.ListGarbageResponse:
        doomed = await self._integrity.list_garbage()
        return messages.ListGarbageResponse(
            doomed=[messages.Doomed(**vars(one)) for one in doomed[:MAX_NAMED]],
            num_doomed=len(doomed),
            num_bytes=sum(one.num_bytes for one in doomed),
        )

    async def CollectGarbage(
        self, request: messages.CollectGarbageRequest, context: Context
    ) -> messages.CollectGarbageResponse:
        await self._integrity.collect()
        return messages.CollectGarbageResponse()


def _findings(found: Sequence[Finding]) -> list[messages.Finding]:
    return [messages.Finding(**vars(one)) for one in found[:MAX_NAMED]]


def _scrub(found: ScrubState) -> messages.ScrubState:
    job, report = found.job, found.report
    return messages.ScrubState(
        job=job.job,
        state=job.state,
        error=job.error,
        done_bytes=job.done_bytes,
        total_bytes=job.total_bytes,
        num_copies=report.num_copies,
        num_bytes=report.num_bytes,
        num_damaged=report.num_damaged,
        num_lists=report.num_lists,
        num_unread=report.num_unread,
        unread=report.unread,
        damaged=[
            messages.DamagedCopy(**one, outcome=outcome)
            for one, outcome in zip(report.damaged, found.outcomes, strict=True)
        ],
    )
