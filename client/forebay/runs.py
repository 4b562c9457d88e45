"""A run as people manage it: tags, pins, notes, what is kept, and what stands on what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from forebay.methods import Checkpoints
from forebay_wire.durability import Durability, check_durability
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.ids import GenerationId, check_name
from forebay_wire.keep import Keep, check_tag
from forebay_wire.v1 import checkpoints_pb2 as pb

if TYPE_CHECKING:
    from forebay.client import Client

Selector = str | int
"""``"latest"``, ``"best"``, a step, ``"ATTEMPT/STEP"`` or a tag."""

PRUNE_SECONDS: Final = 300.0


@dataclass(frozen=True)
class Generation:
    """One saved state of a run."""

    id: GenerationId
    state: str
    """``open``, ``sealed``, ``committed``, ``aborted`` or ``failed``."""
    durability: Durability
    reached: Mapping[Durability, float]
    """When it became each of them, in Unix seconds; those that are known."""
    num_bytes: int
    num_ranks: int
    metrics: Mapping[str, float]
    tags: Sequence[str]
    pinned: str | None
    """Why no retention takes it, empty without a reason; None: it may."""
    note: Mapping[str, Any]
    dataset: Mapping[str, Any]
    """The dataset version that its loader stood on, with its position; empty without one."""
    parent: GenerationId | None
    """What its attempt restored, maybe of another run."""
    created_unix: float
    error: str

    @property
    def attempt(self) -> int:
        return self.id.attempt

    @property
    def step(self) -> int:
        return self.id.step


@dataclass(frozen=True)
class PruneVerdict:
    """What a policy says about one generation."""

    id: GenerationId
    is_kept: bool
    reasons: Sequence[str]
    """The rules that keep it, or why it goes."""
    num_bytes: int


@dataclass(frozen=True)
class LineageAttempt:
    """One incarnation of a run, and what it committed."""

    attempt: int
    parent: GenerationId | None
    """What it restored, maybe of another run."""
    generations: Sequence[Generation]
    """Committed ones, oldest first."""


@dataclass(frozen=True)
class Lineage:
    """What stands on what."""

    run: str
    attempts: Sequence[LineageAttempt]
    """Oldest first."""
    path: Sequence[GenerationId]
    """What the newest attempt stands on, newest first: what rollbacks left behind is not on it."""
    forked_from: GenerationId | None
    forks: Sequence[tuple[str, GenerationId]]
    """Runs that began from a generation of this one, and which."""


class Run:
    """What :meth:`forebay.Client.run` returns. Thread-safe; holds nothing open."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.name = check_name("run", name)

    def __repr__(self) -> str:
        return f"<forebay run {self.name}>"

    # Looking.

    def generations(self) -> list[Generation]:
        """All generations, newest first, those not committed included. NotFound."""
        return [_generation(one) for one in self._client.checkpoints(self.name)]

    def get(self, selector: Selector, durability: str = "local") -> Generation:
        """The committed generation that *selector* means. NotFound."""
        return self._resolve(selector, durability)

    def latest(self, durability: str = "local", timeout: float = 0.0) -> Generation:
        """The newest committed generation that the newest attempt stands on, and that is at least
        so durable; of a fork without its own, what it was forked from. What is still landing is
        waited for up to *timeout* seconds. NotFound."""
        return self._resolve("latest", durability, timeout)

    def tags(self) -> dict[str, GenerationId]:
        """Tag to generation, by name."""
        return {
            one.tag: GenerationId(self.name, one.attempt, one.step) for one in self._detail().tags
        }

    def lineage(self) -> Lineage:
        """Attempts, rollbacks and forks. NotFound."""
        detail = self._detail()
        attempts, generations = self._client.describe_run(self.name)
        committed = [_generation(one) for one in generations if one.state == "committed"]
        rows = [
            LineageAttempt(
                one.attempt,
                _parent(one),
                [each for each in reversed(committed) if each.attempt == one.attempt],
            )
            for one in sorted(attempts, key=lambda one: one.attempt)
        ]
        forks = [
            (one.run, GenerationId(self.name, one.parent_attempt, one.parent_step))
            for one in detail.forks
        ]
        return Lineage(self.name, rows, _path(self.name, rows), _parent(detail), forks)

    # Tags, pins and notes.

    def tag(self, tag: str, selector: Selector = "latest") -> None:
        """Give a committed generation a tag; another one of the run that has it loses it.

        No retention takes what has a tag; who deletes it by name does. ``restore(tag)`` brings it
        back.
        """
        check_tag(tag)
        found = self._own(selector)
        self._call(
            Checkpoints.SetTag,
            pb.SetTagRequest(run=self.name, tag=tag, attempt=found.attempt, step=found.step),
        )

    def untag(self, tag: str) -> None:
        """Take a tag away. NotFound if there is no such tag."""
        self._call(Checkpoints.SetTag, pb.SetTagRequest(run=self.name, tag=tag, remove=True))

    def pin(
        self, selector: Selector, reason: str = "", *, hold: float | timedelta = 0.0
    ) -> Generation:
        """Keep a committed generation from retention and deletion, for *hold* seconds (0: until it
        is unpinned)."""
        found = self._own(selector)
        request = pb.SetPinRequest(
            run=self.name,
            attempt=found.attempt,
            step=found.step,
            reason=reason,
            hold_seconds=hold.total_seconds() if isinstance(hold, timedelta) else hold,
        )
        return _generation(self._call(Checkpoints.SetPin, request))

    def unpin(self, selector: Selector) -> Generation:
        """Let retention decide about a generation again. Idempotent."""
        found = self._own(selector)
        request = pb.SetPinRequest(
            run=self.name, attempt=found.attempt, step=found.step, remove=True
        )
        return _generation(self._call(Checkpoints.SetPin, request))

    def note(self, selector: Selector, note: Mapping[str, Any]) -> Generation:
        """Replace the free metadata of a committed generation: what JSON can say."""
        found = self._own(selector)
        request = pb.SetNoteRequest(
            run=self.name, attempt=found.attempt, step=found.step, note_json=note_json(note)
        )
        return _generation(self._call(Checkpoints.SetNote, request))

    # What is kept.

    @property
    def keep(self) -> Keep | None:
        """What is kept of the run; None: everything."""
        return Keep.from_json(self._detail().keep_json)

    def set_keep(self, keep: Keep | None) -> None:
        """Change what is kept of the run (None: everything) and delete the rest in the
        background."""
        text = _keep_json(keep)
        self._call(Checkpoints.SetKeep, pb.SetKeepRequest(run=self.name, keep_json=text))

    def prune(self, keep: Keep | None = None, *, dry_run: bool = False) -> list[PruneVerdict]:
        """Delete for good what *keep* (default: the run's own policy) does not keep, now; what it
        said about each committed generation, newest first. *dry_run*: only say so."""
        request = pb.PruneRequest(run=self.name, dry_run=dry_run, keep_json=_keep_json(keep))
        answer = self._client.channel.call(Checkpoints.Prune, request, timeout=PRUNE_SECONDS)
        return [
            PruneVerdict(
                GenerationId(self.name, one.attempt, one.step),
                one.is_kept,
                tuple(one.reasons),
                one.num_bytes,
            )
            for one in answer.verdicts
        ]

    # Below: how.

    def _detail(self) -> pb.RunDetail:
        return self._client.channel.call(Checkpoints.GetRun, pb.GetRunRequest(run=self.name))

    def _own(self, selector: Selector) -> Generation:
        found = self._resolve(selector, "local")
        if found.id.run != self.name:
            raise NotFound(
                f"run {self.name} has committed nothing of its own: it stands on {found.id}"
            )
        return found

    def _resolve(self, selector: Selector, durability: str, timeout: float = 0.0) -> Generation:
        check_durability(durability)
        request = pb.ResolveGenerationRequest(
            run=self.name,
            selector=str(selector),
            durability=durability,
            timeout_seconds=timeout,
            look_only=True,
        )
        found = self._client.channel.call(
            Checkpoints.ResolveGeneration, request, timeout=timeout + 10.0
        )
        return _generation(found)

    def _call(self, method: Any, request: Any) -> Any:
        return self._client.channel.call(method, request)


def note_json(note: Mapping[str, Any] | None) -> str:
    """*note* as the daemon takes it; InvalidRequest for what JSON cannot say."""
    if not note:
        return ""
    try:
        return json.dumps(dict(note), separators=(",", ":"), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a note holds what JSON can say, not {note!r}: {error}") from None


def _keep_json(keep: Keep | None) -> str:
    if keep is None:
        return ""
    if not isinstance(keep, Keep):
        raise InvalidRequest(f"{keep!r} is no policy: give a forebay.Keep, as Keep(last=3)")
    return keep.to_json()


def _generation(found: pb.Generation) -> Generation:
    times = {
        Durability.RAM: found.ram_unix,
        Durability.LOCAL: found.local_unix,
        Durability.REMOTE: found.remote_unix,
    }
    return Generation(
        id=GenerationId(found.run, found.attempt, found.step),
        state=found.state,
        durability=Durability(found.durability),
        reached={level: at for level, at in times.items() if at},
        num_bytes=found.num_bytes,
        num_ranks=found.num_ranks,
        metrics=json.loads(found.metrics_json) if found.metrics_json else {},
        tags=tuple(found.tags),
        pinned=found.pin_reason if found.is_pinned else None,
        note=json.loads(found.note_json) if found.note_json else {},
        dataset=json.loads(found.dataset_json) if found.dataset_json else {},
        parent=_parent(found) if found.has_parent else None,
        created_unix=found.created_unix,
        error=found.error,
    )


def _parent(found: pb.Attempt | pb.Generation | pb.RunDetail) -> GenerationId | None:
    if isinstance(found, pb.RunDetail):
        run = found.parent_run
    else:
        run = (found.parent_run or found.run) if found.has_parent else ""
    return GenerationId(run, found.parent_attempt, found.parent_step) if run else None


def _path(run: str, attempts: Sequence[LineageAttempt]) -> list[GenerationId]:
    """What the newest attempt stands on, within the run."""
    by_number = {one.attempt: one for one in attempts}
    path: list[GenerationId] = []
    number, upto = max(by_number, default=0), None
    while number in by_number:
        one = by_number[number]
        path += [each.id for each in reversed(one.generations) if upto is None or each.step <= upto]
        if one.parent is None or one.parent.run != run or one.parent.attempt >= number:
            break
        number, upto = one.parent.attempt, one.parent.step
    return path
