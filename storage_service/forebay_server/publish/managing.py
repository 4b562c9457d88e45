"""What people say about the generations of a run: tags, pins, notes, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from forebay_server.catalog import queries_managing as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_lineage import fork_of_run, forks_of
from forebay_server.catalog.queries_managing import TagInfo
from forebay_server.catalog.queries_runs import GenerationInfo, find_generation
from forebay_server.publish.retention import check_metric
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.ids import GenerationId, check_name
from forebay_wire.keep import Keep, check_tag
from forebay_wire.limits import MAX_NAME_BYTES, check_limit

T = TypeVar("T")

MAX_REASON_BYTES = 8 * MAX_NAME_BYTES


@dataclass(frozen=True)
class RunDetail:
    """What is known of a run beside its generations."""

    run: str
    keep_json: str
    """Empty: everything is kept."""
    tags: tuple[TagInfo, ...]
    forks: tuple[tuple[str, int, GenerationId], ...]
    """Runs that began from a generation of this one: name, attempt, that generation."""
    fork: GenerationId | None
    """What the run itself was forked from."""


class Managing:
    """Belongs to the event loop; holds no state."""

    def __init__(self, catalog: Catalog, wake: Callable[[], object]) -> None:
        """*wake* is called when jobs were queued."""
        self._catalog = catalog
        self._wake = wake

    async def detail(self, run: str) -> RunDetail:
        """:class:`NotFound` if there is no such run."""
        check_name("run", run)

        def look(connection: Connection) -> RunDetail:
            queries.check_run(connection, run)
            return _detail(connection, run)

        return await self._catalog.read(look)

    async def set_keep(self, run: str, keep_json: str) -> RunDetail:
        """Replace what is kept of *run* (empty: everything); what no rule keeps goes in the
        background. :class:`InvalidRequest` for what is no policy, or one by a metric that no
        generation of the run has."""
        check_name("run", run)
        keep = Keep.from_json(keep_json)

        def change(connection: Connection) -> RunDetail:
            if keep is not None:
                check_metric(connection, run, keep)
            queries.set_keep(connection, run, keep_json)
            return _detail(connection, run)

        return await self._change(change)

    async def tag(self, generation: GenerationId, tag: str) -> RunDetail:
        """Give a committed generation a tag, which it takes from any other one of its run."""
        check_name("run", generation.run)
        check_tag(tag)

        def change(connection: Connection) -> RunDetail:
            queries.set_tag(connection, generation, tag)
            check_limit(
                "tags of a run",
                len(queries.list_tags(connection, generation.run)),
                queries.MAX_TAGS,
                "take some away",
            )
            return _detail(connection, generation.run)

        return await self._change(change)

    async def untag(self, run: str, tag: str) -> RunDetail:
        """Take a tag away. :class:`NotFound` if the run has no such tag."""
        check_name("run", run)

        def change(connection: Connection) -> RunDetail:
            if not queries.remove_tag(connection, run, tag):
                raise NotFound(f"run {run} has no tag {tag}")
            return _detail(connection, run)

        return await self._change(change)

    async def pin(
        self, generation: GenerationId, reason: str, hold_seconds: float
    ) -> GenerationInfo:
        """Keep a committed generation from retention for so long; 0: until it is unpinned."""
        check_name("run", generation.run)
        check_limit("bytes of a reason", len(reason.encode()), MAX_REASON_BYTES, "say it shorter")
        if not 0 <= hold_seconds < float("inf"):
            raise InvalidRequest(f"hold for {hold_seconds} seconds: use a number from 0")
        return await self._change(
            _then_look(generation, queries.set_pin, generation, reason, hold_seconds)
        )

    async def unpin(self, generation: GenerationId) -> GenerationInfo:
        """Let retention decide about a generation again. Idempotent."""
        check_name("run", generation.run)
        return await self._change(_then_look(generation, queries.remove_pin, generation))

    async def note(self, generation: GenerationId, note_json: str) -> GenerationInfo:
        """Replace the free metadata of a committed generation; the caller has checked it."""
        check_name("run", generation.run)
        return await self._change(_then_look(generation, queries.set_note, generation, note_json))

    async def _change(self, change: Callable[[Connection], T]) -> T:
        found = await self._catalog.write(change)
        self._wake()
        return found


def _then_look(
    generation: GenerationId, change: Callable[..., object], *arguments: Any
) -> Callable[[Connection], GenerationInfo]:
    def apply(connection: Connection) -> GenerationInfo:
        change(connection, *arguments)
        found = find_generation(connection, generation)
        assert found is not None, "the change refuses what is not there"
        return found

    return apply


def _detail(connection: Connection, run: str) -> RunDetail:
    return RunDetail(
        run,
        queries.read_keep(connection, run),
        tuple(queries.list_tags(connection, run)),
        tuple(forks_of(connection, run)),
        fork_of_run(connection, run),
    )
