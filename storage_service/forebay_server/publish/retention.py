"""Deletes what the policy of a run does not keep: after each commit, at the start, when asked.

The decision is that of ``model/retention.py``, made and carried out in one transaction: a daemon
that dies before it has deleted nothing, one that dies after it has jobs that do the rest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from forebay_server.catalog import queries_checkpoints
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_jobs import RETAIN, enqueue_anew, enqueue_collection
from forebay_server.catalog.queries_managing import check_run, read_keep
from forebay_server.catalog.queries_retention import Candidate, load_candidates
from forebay_server.catalog.queries_runs import load_lineage
from forebay_server.model.lineage import Lineage, Point
from forebay_server.model.retention import (
    Facts,
    Verdict,
    decide,
    knows_metric,
    metrics_known,
    seconds_until_change,
)
from forebay_server.publish.readers import Readers
from forebay_wire.errors import InvalidRequest
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import GenerationId, check_name
from forebay_wire.keep import Keep

logger = logging.getLogger(__name__)

AGAIN_SECONDS: Final = 5.0
"""How soon what only a reader keeps is looked at again."""
SOONEST_SECONDS: Final = 0.2


class Progress(Protocol):
    """What is needed of :class:`forebay_server.move.jobs.Progress`."""

    @property
    def target(self) -> str: ...

    def guard(self, connection: Connection) -> None:
        """Raise if the job is somebody else's by now."""
        ...


@dataclass(frozen=True)
class Pruned:
    """What a policy says about a run, and what came of it."""

    keep: Keep
    verdicts: tuple[Verdict, ...]
    num_bytes: Mapping[Point, int]
    """Of all packs."""
    num_deleted: int


class Retention:
    """Belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        readers: Readers,
        *,
        is_open: Callable[[str], bool] = lambda blob: False,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        """*is_open* tells whether a client has a blob in hand; *wake* is called when jobs were
        queued."""
        self._catalog = catalog
        self._readers = readers
        self._is_open = is_open
        self._wake = wake
        self._warned: set[tuple[str, str]] = set()
        """Runs and metrics that no generation of them had."""

    async def __call__(self, progress: Progress) -> None:
        """Handles jobs of the kind ``retain``; the target is ``RUN NUMBER``. Idempotent."""
        run = progress.target.partition(" ")[0]
        text = await self._catalog.read(lambda connection: read_keep(connection, run))
        if text:
            await self._prune(run, None, is_dry=False, guard=progress.guard)

    async def prune(self, run: str, keep_json: str, *, is_dry: bool) -> Pruned:
        """Apply *keep_json*, or the run's own policy if that is empty; *is_dry*: only say what
        would go. :class:`InvalidRequest` if there is none."""
        check_name("run", run)
        return await self._prune(run, Keep.from_json(keep_json), is_dry=is_dry)

    async def _prune(
        self,
        run: str,
        keep: Keep | None,
        *,
        is_dry: bool,
        guard: Callable[[Connection], object] = lambda connection: None,
    ) -> Pruned:
        async with self._readers.settled(run):
            lent = self._readers.lent(run) | await self._seen_open(run)
            if is_dry:
                return await self._catalog.read(
                    lambda connection: self._judge(connection, run, keep, lent)
                )

            def apply(connection: Connection) -> Pruned:
                guard(connection)
                found = self._judge(connection, run, keep, lent)
                return _carry_out(connection, run, found, is_own=keep is None)

            found = await self._catalog.write(apply)
            failpoint("retain.after_delete")
        if found.num_deleted:
            logger.info("run %s: deleted %d generations", run, found.num_deleted)
        self._wake()
        return found

    async def _seen_open(self, run: str) -> set[GenerationId]:
        """The generations of which somebody has a blob in hand: their readers go on."""
        found = await self._catalog.read(lambda connection: load_candidates(connection, run))
        seen = {
            GenerationId(run, *one.point)
            for one in found.generations
            if any(map(self._is_open, one.blobs))
        }
        for generation in seen:
            self._readers.lend(generation)
        return seen

    def _judge(
        self, connection: Connection, run: str, keep: Keep | None, lent: set[GenerationId]
    ) -> Pruned:
        check_run(connection, run)
        is_own = keep is None
        keep = keep or Keep.from_json(read_keep(connection, run))
        if keep is None:
            raise InvalidRequest(
                f"run {run} has no policy, everything of it is kept: set one with keep= of "
                "forebay.Checkpointer or client.run(...).set_keep(...), or give one to prune"
            )
        lineage = load_lineage(connection, run) or Lineage({}, {})
        found = load_candidates(connection, run)
        facts = {one.point: _facts(one, run, lent) for one in found.generations}
        if facts and not knows_metric(keep, facts):
            self._no_metric(run, keep, facts, is_own=is_own)
        verdicts = decide(keep, lineage, facts, found.now)
        sizes = {one.point: one.num_bytes for one in found.generations}
        return Pruned(keep, tuple(verdicts), sizes, 0)

    def _no_metric(
        self, run: str, keep: Keep, facts: Mapping[Point, Facts], *, is_own: bool
    ) -> None:
        """No generation has the metric of *keep*. A trainer may say it before it saves one."""
        if not is_own:
            raise InvalidRequest(_unknown_metric(run, keep, facts))
        if (run, keep.best) not in self._warned:
            self._warned.add((run, keep.best))
            logger.warning(
                "%s; until one has it all of them stay", _unknown_metric(run, keep, facts)
            )


def check_metric(connection: Connection, run: str, keep: Keep) -> None:
    """:class:`InvalidRequest` if *run* has generations and none has the metric of *keep*."""
    found = load_candidates(connection, run).generations if keep.best else ()
    facts = {one.point: _facts(one, run, set()) for one in found}
    if facts and not knows_metric(keep, facts):
        raise InvalidRequest(_unknown_metric(run, keep, facts))


def _unknown_metric(run: str, keep: Keep, facts: Mapping[Point, Facts]) -> str:
    names = ", ".join(metrics_known(facts)) or "none"
    return (
        f"no good generation of run {run} has the metric {keep.best!r} of {keep}, they have {names}"
    )


def _facts(one: Candidate, run: str, lent: set[GenerationId]) -> Facts:
    return Facts(
        committed=one.committed_unix,
        is_good=one.is_good,
        metrics=json.loads(one.metrics_json) if one.metrics_json else {},
        tags=one.tags,
        pin=one.pin,
        is_read=GenerationId(run, *one.point) in lent,
        forks=one.forks,
    )


def _carry_out(connection: Connection, run: str, found: Pruned, *, is_own: bool) -> Pruned:
    doomed = [one for one in found.verdicts if not one.is_kept]
    failpoint("retain.before_delete")
    for one in doomed:
        generation = GenerationId(run, *one.point)
        reason = f"{found.keep}: {'; '.join(one.reasons)}"
        queries_checkpoints.delete_generations(connection, [generation], reason)
    if doomed:
        enqueue_collection(connection)
        failpoint("retain.inside_delete")
    if is_own and (seconds := _look_again(connection, run, found)) is not None:
        enqueue_anew(connection, RETAIN, run, max(seconds, SOONEST_SECONDS))
    return Pruned(found.keep, found.verdicts, found.num_bytes, len(doomed))


def _look_again(connection: Connection, run: str, found: Pruned) -> float | None:
    """In how many seconds the run's own policy may say something else by itself; None: never."""
    left = load_candidates(connection, run)
    facts = {one.point: Facts(one.committed_unix) for one in left.generations}
    times = [seconds_until_change(found.keep, facts, left.now)]
    times += [AGAIN_SECONDS for one in found.verdicts if one.is_only_read]
    times += [one.pin_ends_unix - left.now for one in left.generations if one.pin_ends_unix]
    return min((seconds for seconds in times if seconds is not None), default=None)
