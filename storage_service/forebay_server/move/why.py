"""Answers where something lies, why, and what happened to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from forebay_server.catalog import queries_why as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_bindings import generations_on
from forebay_server.catalog.queries_datasets import find_dataset
from forebay_server.catalog.queries_history import Event, list_events
from forebay_server.catalog.queries_jobs import COPY, Job
from forebay_server.catalog.queries_pins import list_pins, pins_of_blob
from forebay_server.catalog.queries_policies import policy_of
from forebay_server.catalog.queries_subjects import resolve_all
from forebay_server.catalog.queries_why import Copies
from forebay_server.model.placement import Policy, fills
from forebay_server.model.subjects import Subject, parse_subject
from forebay_server.move.pins import PinState, state_of
from forebay_server.move.room import kind_of
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.limits import MAX_PAGE_ROWS

NUM_EVENTS: Final = 50
MAX_JOBS: Final = 50
MAX_PINS: Final = 50


@dataclass(frozen=True)
class Why:
    """All that is known about a subject; the field names are those of the message."""

    subject: str
    num_blobs: int
    num_bytes: int
    dirty_bytes: int
    policy: str
    policy_from: str
    copies: Sequence[Copies]
    kept_by: Sequence[str]
    because: Sequence[str]
    pins: Sequence[PinState]
    jobs: Sequence[Job]
    history: Sequence[Event]


class Story:
    """Reads the catalog; belongs to the event loop."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        find_policy: Callable[[str], Policy],
        seconds_until_use: Callable[[str], float | None] = lambda blob: None,
    ) -> None:
        """*find_policy* knows the named policies; *seconds_until_use* when a plan reads a blob."""
        self._catalog = catalog
        self._tiers = tiers
        self._find_policy = find_policy
        self._seconds_until_use = seconds_until_use

    async def why(self, text: str, num_events: int) -> Why:
        """The story of what *text* names. :class:`NotFound` if neither it is there nor anything is
        known of its past."""
        subject = parse_subject(text)
        limit = min(num_events or NUM_EVENTS, MAX_PAGE_ROWS)
        return await self._catalog.read(lambda connection: self._read(connection, subject, limit))

    async def jobs(self, after: str, limit: int, *, everything: bool) -> tuple[list[Job], str]:
        """``(jobs, where the next page begins)``, oldest first; empty: no more."""
        size = min(limit or MAX_PAGE_ROWS, MAX_PAGE_ROWS)
        behind = _parse_after(after)
        page = await self._catalog.read(
            lambda connection: queries.page_jobs(
                connection, behind, size + 1, everything=everything
            )
        )
        if len(page) <= size:
            return page, ""
        last = page[size - 1]
        return page[:size], f"{last.created_unix!r}/{last.job}"

    # ---------------------------------------------------------------------------------- reading

    def _read(self, connection: Connection, subject: Subject, limit: int) -> Why:
        events = list_events(connection, _subjects(connection, subject), limit)
        manifests: tuple[str, ...] = ()
        blobs: tuple[str, ...] = ()
        name = str(subject)
        try:
            found = resolve_all(connection, subject)
            name, manifests, blobs = found.target, found.manifests, found.blobs
        except NotFound:
            if not events:
                raise
        number, total, dirty = queries.count_bytes(connection, blobs)
        if subject.kind == "blob" and not number and not events:
            raise NotFound(f"there is no {subject}, and nothing is known of its past")
        blob = subject.name if subject.kind == "blob" else ""
        kept_by = queries.owners_of(connection, blob) if blob else _standing(connection, subject)
        policy, source = self._policy(connection, subject, kept_by if blob else [])
        copies = queries.count_copies(connection, blobs)
        pins = self._pins(connection, subject, name)
        jobs = queries.jobs_about(connection, manifests, blobs, MAX_JOBS)
        because = self._because(policy, source, copies, dirty, pins, kept_by, blobs, blob)
        because += self._missing(connection, policy, blobs, jobs) if kept_by or not blob else []
        return Why(
            subject=name,
            num_blobs=number,
            num_bytes=total,
            dirty_bytes=dirty,
            policy=policy.name,
            policy_from=source,
            copies=copies,
            kept_by=kept_by,
            because=because,
            pins=pins,
            jobs=jobs,
            history=events,
        )

    def _policy(
        self, connection: Connection, subject: Subject, kept_by: Sequence[str]
    ) -> tuple[Policy, str]:
        owners = [subject.owner] if subject.owner else [_owner_of(one) for one in kept_by]
        for owner in owners:
            assigned = policy_of(connection, owner)
            if assigned is not None:
                return self._find_policy(assigned), owner
        return self._find_policy(""), "default"

    def _pins(self, connection: Connection, subject: Subject, name: str) -> list[PinState]:
        if subject.kind == "blob":
            found = pins_of_blob(connection, subject.name)
        else:
            found = [
                pin
                for pin in list_pins(connection)
                if pin.target == name or pin.target.startswith(f"{name}@")
            ]
        return [state_of(connection, pin.pin) for pin in found[-MAX_PINS:]]

    def _because(
        self,
        policy: Policy,
        source: str,
        copies: Sequence[Copies],
        dirty: int,
        pins: Sequence[PinState],
        kept_by: Sequence[str],
        blobs: Sequence[str],
        blob: str,
    ) -> list[str]:
        """Sentences, for people."""
        told = [f"policy {policy.name} ({source}): {describe(policy)}"]
        for pin in pins:
            if pin.state in ("held", "fetching"):
                until = "it is unpinned" if not pin.expires_unix else "its hold ends"
                told.append(f"pinned in {pin.tier} until {until} (pin {pin.pin})")
        if dirty:
            told.append(f"{dirty} bytes are not in the object tier: their last copy stays")
        told.extend(
            f"{one.num_blobs} copies in {one.tier} are quarantined: {one.reason}"
            for one in copies
            if one.state == "quarantined"
        )
        soonest = min(
            (found for one in blobs if (found := self._seconds_until_use(one)) is not None),
            default=None,
        )
        if soonest is not None:
            told.append(f"a plan reads it in {max(soonest, 0):.0f} s")
        if blob and not kept_by:
            told.append("nothing names it: it is collected once nobody has it open")
        return told

    def _missing(
        self,
        connection: Connection,
        policy: Policy,
        blobs: Sequence[str],
        jobs: Sequence[Job],
    ) -> list[str]:
        """Why copies that *policy* wants are not there."""
        told = []
        for wanted in policy.copies:
            tiers = [
                tier
                for tier in self._tiers.all
                if not tier.is_foreign and fills(kind_of(tier), wanted)
            ]
            if not tiers:
                continue
            names = [tier.name for tier in tiers]
            number = queries.count_without(connection, blobs, names)
            if not number:
                continue
            troubles = {
                job.error
                for job in jobs
                if job.kind == COPY and job.target.rpartition(" ")[2] in names and job.error
            }
            free = None if wanted == "object" else max(one.space().free_bytes for one in tiers)
            told.append(missing_text(policy, wanted, number, free, sorted(troubles)))
        return told


def missing_text(
    policy: Policy, kind: str, num_missing: int, free_bytes: int | None, troubles: Sequence[str]
) -> str:
    """Why so many blobs have no copy in tiers of *kind*, which *policy* wants.

    *free_bytes*: what is left there, None: nobody can say; *troubles*: what kept the jobs from
    making them when they were last tried.
    """
    within = policy.copies[kind]
    when = "at leisure" if within is None else f"within {within:g} s"
    text = f"{num_missing} blobs have no copy in {kind}, which policy {policy.name} wants {when}"
    if troubles:
        return f"{text}: {troubles[0]}"
    if free_bytes is None:
        return f"{text}: the copies are on their way"
    if within is None:
        return f"{text}: they are made where there is room, and {free_bytes} bytes are free"
    return f"{text}: they are on their way, or not due yet while only {free_bytes} bytes are free"


def describe(policy: Policy) -> str:
    """What a policy says, in one sentence."""
    parts = [f"new bytes land in {', else '.join(policy.land)}"]
    for kind, within in policy.copies.items():
        when = "in the background" if within is None else f"within {within:g} s"
        parts.append(f"a copy is made in {kind} {when}")
    for kind, after in policy.demote_after_seconds.items():
        parts.append(f"what nobody used for {after:g} s leaves {kind}")
    parts.extend(f"copies in {kind} are {name}" for kind, name in policy.encoding.items())
    return "; ".join(parts)


def _standing(connection: Connection, subject: Subject) -> list[str]:
    """The generations because of which a dataset cannot be deleted, with the version of each."""
    if subject.kind != "dataset":
        return []
    found = generations_on(connection, subject.name, subject.version)
    listed = [f"generation {one.generation} (version {one.version})" for one in found]
    return listed[: queries.MAX_NAMED]


def _owner_of(kept_by: str) -> str:
    """What a policy would be assigned to, of an entry of ``kept_by``."""
    kind, _, name = kept_by.partition(" ")
    base = name.partition("@")[0]
    return f"{'run' if kind == 'generation' else kind} {base}"


def _subjects(connection: Connection, subject: Subject) -> list[str]:
    """Under which names things may have happened to it."""
    names = [str(subject)]
    if subject.kind == "dataset":
        found = find_dataset(connection, subject.name)
        versions = found.versions if found is not None else ()
        names = [f"dataset {subject.name}"]
        names += [
            f"dataset {subject.name}@{one.version}"
            for one in versions
            if subject.version in (0, one.version)
        ]
    elif subject.generation is not None:
        names.append(f"run {subject.generation.run}")
    return names


def _parse_after(after: str) -> tuple[float, str] | None:
    if not after:
        return None
    created, _, job = after.partition("/")
    try:
        return float(created), job
    except ValueError as error:
        raise InvalidRequest(f"{after!r} is not where a page of jobs begins") from error
