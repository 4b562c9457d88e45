"""Compares the catalog with the tiers, both ways, and repairs what can be repaired.

Everything is looked at while the daemon serves: what seems wrong is looked up once more before it
counts. A repair never deletes what could be the last of something: it quarantines, queues jobs that
copy first, and hands files that nothing names to the collector, which has its own grace period.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from forebay_server.catalog import queries_fsck as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_damage import enqueue_repair
from forebay_server.catalog.queries_fsck import FileRow, ManifestRow
from forebay_server.catalog.queries_jobs import COLLECT, GARBAGE, TOMBSTONE, enqueue
from forebay_server.catalog.queries_objects import without_object_replica
from forebay_server.catalog.queries_scrub import is_live
from forebay_server.locks import NamedLocks
from forebay_server.move.collect import BLOBS, MANIFESTS, TOMBSTONES
from forebay_server.move.lists import list_problem, rewrite_list
from forebay_server.tier.registry import Tiers
from forebay_server.tier.store import FileInfo, Tier
from forebay_wire.errors import ForebayError, IntegrityError, InvalidRequest, NotFound
from forebay_wire.manifest import parse

PAGE: Final = 500

Repair = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    kind: str
    """A few words: what sort of thing it is."""
    subject: str
    """``blob ID``, ``manifest ID``, ``tier NAME`` or ``pin ID``."""
    detail: str
    repair: str = ""
    """What ``--repair`` does about it; empty: nothing can be done here."""


Found = tuple[Finding, Repair | None]


class Strays(Protocol):
    """What is needed of :class:`forebay_server.move.collect.Collector`."""

    async def strays(self, tier: Tier) -> list[FileInfo]:
        """The blob files of *tier* that nothing names, past the grace period."""
        ...


class Condemner(Protocol):
    """What is needed of :class:`forebay_server.quarantine.Quarantine`."""

    async def condemn(
        self, blob: str, replica_id: str, tier: str, file: str, error: ForebayError
    ) -> None:
        """Take a replica out of service because of *error*; its file stays."""
        ...


class Fsck:
    """Belongs to the event loop; holds no state of its own."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        collector: Strays,
        quarantine: Condemner,
        locks: NamedLocks,
        *,
        grace_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """*locks* are shared with whoever publishes and collects; *grace_seconds* is the age at
        which what nothing names is garbage; *clock* answers Unix seconds."""
        self._catalog = catalog
        self._tiers = tiers
        self._collector = collector
        self._quarantine = quarantine
        self._locks = locks
        self._grace_seconds = grace_seconds
        self._clock = clock

    async def run(self, *, repair: bool = False) -> list[Finding]:
        """All that is wrong now; with *repair* what can be done about it is done or queued: wake
        the jobs afterwards. A tier that does not answer is among the findings."""
        findings: list[Finding] = []
        async for finding, mend in self._all():
            findings.append(finding)
            if repair and mend is not None:
                await mend()
        return findings

    async def _all(self) -> AsyncIterator[Found]:
        for tier in self._tiers.own:
            try:
                async for found in self._tier(tier):
                    yield found
            except (ForebayError, OSError) as error:
                yield Finding("unreachable", f"tier {tier.name}", str(error)), None
        async for found in self._catalog_alone():
            yield found

    async def _tier(self, tier: Tier) -> AsyncIterator[Found]:
        async for found in self._rows(tier):
            yield found
        for info in await self._collector.strays(tier):
            detail = f"file {info.name}, {info.size_bytes} bytes: no row names it"
            yield Finding("stray file", f"tier {tier.name}", detail, "it is collected"), self._sweep
        if tier is self._tiers.object:
            async for found in self._lists(tier):
                yield found
            async for found in self._manifests(tier):
                yield found
            async for found in self._tombstones(tier):
                yield found

    # --------------------------------------------------------------------------- copies and files

    async def _rows(self, tier: Tier) -> AsyncIterator[Found]:
        """Every row of a file has its file, of its size."""
        after = ""
        while page := await self._page_files(tier, after):
            sizes = await self._tiers.run(tier, _sizes, tier, page)
            for row, size in zip(page, sizes, strict=True):
                if row.state != "live":
                    yield self._quarantined(tier, row)
                elif size != row.num_bytes and await self._is_live(row):
                    yield self._bad_file(tier, row, size)
            after = page[-1].file

    async def _page_files(self, tier: Tier, after: str) -> list[FileRow]:
        return await self._catalog.read(
            lambda connection: queries.page_files(connection, tier.name, after, PAGE)
        )

    async def _is_live(self, row: FileRow) -> bool:
        return await self._catalog.read(lambda connection: is_live(connection, row.replica_id))

    def _quarantined(self, tier: Tier, row: FileRow) -> Found:
        def queue(connection: Connection) -> None:
            enqueue_repair(connection, row.blob, tier.name)

        detail = f"{tier.name}, file {row.file}: {row.reason}"
        repair = "a good copy takes its place, if there is one"
        return Finding("quarantined", f"blob {row.blob}", detail, repair), self._write(queue)

    def _bad_file(self, tier: Tier, row: FileRow, size: int | None) -> Found:
        kind = "missing file" if size is None else "wrong size"
        state = "is not there" if size is None else f"has {size} bytes"
        detail = f"{tier.name}: file {row.file} of {row.num_bytes} bytes {state}"

        async def condemn() -> None:
            error = NotFound(detail) if size is None else IntegrityError(detail)
            await self._quarantine.condemn(row.blob, row.replica_id, tier.name, row.file, error)

        repair = "it is quarantined, and a good copy takes its place"
        return Finding(kind, f"blob {row.blob}", detail, repair), condemn

    async def _sweep(self) -> None:
        await self._catalog.write(lambda connection: enqueue(connection, COLLECT, GARBAGE))

    # ---------------------------------------------------------------------------- the object tier

    async def _lists(self, tier: Tier) -> AsyncIterator[Found]:
        """Every copy has its extent list, and every list its copy."""
        after = ""
        while page := await self._page_files(tier, after):
            for row in page:
                if row.state == "live" and (found := await self._check_list(tier, row)):
                    yield found
            after = page[-1].file
        infos = await self._tiers.run(tier, _list, tier, BLOBS)
        names = [info.name.removeprefix(BLOBS) for info in infos]
        foreign = await self._catalog.read(
            lambda connection: without_object_replica(connection, tier.name, names)
        )
        if not foreign:
            return
        needed = await self._named_elsewhere(tier)
        limit = self._clock() - self._grace_seconds
        for info, blob in zip(infos, names, strict=True):
            if blob in foreign and info.modified_unix < limit:
                yield self._foreign_list(tier, blob, needed)

    async def _check_list(self, tier: Tier, row: FileRow) -> Found | None:
        arguments = tier, row.blob, row.file, row.encoding
        problem = await self._tiers.run(tier, list_problem, *arguments)
        if not problem or not await self._is_live(row):
            return None

        async def rewrite() -> None:
            async with self._locks.hold(row.blob):
                if not await self._is_live(row):
                    return
                try:
                    await self._tiers.run_moving(tier, rewrite_list, *arguments)
                except (IntegrityError, NotFound) as error:
                    await self._quarantine.condemn(
                        row.blob, row.replica_id, tier.name, row.file, error
                    )

        repair = "it is written anew from the file, which is checked first"
        return Finding("bad extent list", f"blob {row.blob}", problem, repair), rewrite

    def _foreign_list(self, tier: Tier, blob: str, needed: set[str] | None) -> Found:
        subject = f"blob {blob}"
        if needed is None or blob in needed:
            detail = f"{tier.name} has it for a manifest that the catalog does not know"
            return Finding("unknown blob", subject, detail), None

        async def delete() -> None:
            async with self._locks.hold(blob):
                known = await self._catalog.read(
                    lambda connection: queries.has_replica(connection, blob, tier.name)
                )
                if not known:
                    await self._tiers.run(tier, tier.delete, BLOBS + blob)

        detail = f"{tier.name} has an extent list of it; no row and no manifest names it"
        return Finding("stray extent list", subject, detail, "it is deleted"), delete

    async def _unknown_manifests(self, tier: Tier) -> list[str]:
        infos = await self._tiers.run(tier, _list, tier, MANIFESTS)
        names = [info.name.removeprefix(MANIFESTS) for info in infos]
        known = await self._catalog.read(
            lambda connection: queries.known_manifests(connection, names)
        )
        return sorted(set(names) - known)

    async def _named_elsewhere(self, tier: Tier) -> set[str] | None:
        """The blobs that manifests name which the catalog does not know; None: nobody can tell."""
        needed: set[str] = set()
        for manifest in await self._unknown_manifests(tier):
            try:
                data = await self._tiers.run(tier, tier.get, MANIFESTS + manifest)
                needed |= _blobs(data, manifest)
            except NotFound:
                continue
            except (IntegrityError, InvalidRequest):
                return None
        return needed

    async def _manifests(self, tier: Tier) -> AsyncIterator[Found]:
        """Every manifest that is remote lies there as it is."""
        after = ""
        while page := await self._page_manifests(after):
            for row in page:
                if row.is_remote and (problem := await self._look_up(tier, row)):
                    repair = "it is published again"
                    yield (
                        Finding("bad manifest", f"manifest {row.manifest}", problem, repair),
                        self._publish(row.manifest),
                    )
            after = page[-1].manifest
        for manifest in await self._unknown_manifests(tier):
            detail = (
                f"{tier.name} has it, the catalog does not: it stays; `forebay recover` into a new "
                "folder brings back what it names"
            )
            yield Finding("unknown manifest", f"manifest {manifest}", detail), None

    async def _look_up(self, tier: Tier, row: ManifestRow) -> str:
        try:
            data = await self._tiers.run(tier, tier.get, MANIFESTS + row.manifest)
        except (IntegrityError, NotFound) as error:
            return error.message
        return "" if data == row.data else f"{tier.name} has it with other bytes: it is damaged"

    def _publish(self, manifest: str) -> Repair:
        return self._write(lambda connection: queries.publish_again(connection, manifest))

    async def _tombstones(self, tier: Tier) -> AsyncIterator[Found]:
        """What the object tier says of deletions is what the trash holds."""
        infos = await self._tiers.run(tier, _list, tier, TOMBSTONES)
        said = {info.name.removeprefix(TOMBSTONES) for info in infos}
        held = await self._catalog.read(queries.trashed_manifests)
        for manifest in sorted(said ^ held):
            detail = (
                f"{tier.name} says that it is deleted, the trash does not have it"
                if manifest in said
                else f"{tier.name} does not say yet that it is in the trash"
            )
            finding = Finding("bad tombstone", f"manifest {manifest}", detail, "it is put right")
            yield finding, self._tombstone(manifest)

    def _tombstone(self, manifest: str) -> Repair:
        return self._write(lambda connection: enqueue(connection, TOMBSTONE, manifest))

    # -------------------------------------------------------------------------- the catalog alone

    async def _page_manifests(self, after: str) -> list[ManifestRow]:
        return await self._catalog.read(
            lambda connection: queries.page_manifests(connection, after, PAGE)
        )

    async def _catalog_alone(self) -> AsyncIterator[Found]:
        after = ""
        while page := await self._page_manifests(after):
            for row in page:
                if problem := _contradiction(row):
                    yield Finding("bad manifest row", f"manifest {row.manifest}", problem), None
            after = page[-1].manifest
        after = ""
        while lost := await self._lost(after):
            for blob in lost:
                detail = "a manifest needs it, and no tier has a copy in service"
                yield Finding("lost blob", f"blob {blob}", detail), None
            after = lost[-1]
        for tier, file in await self._catalog.read(
            lambda connection: queries.files_without_copy(connection, PAGE)
        ):
            detail = f"the row of file {file} belongs to no copy"
            yield Finding("stray row", f"tier {tier}", detail), None
        for pin, target, blob in await self._catalog.read(
            lambda connection: queries.pins_to_nothing(connection, PAGE)
        ):
            detail = f"it holds blob {blob} for {target}, which is gone"
            yield Finding("pin to nothing", f"pin {pin}", detail, "it ends"), self._unpin(pin, blob)

    async def _lost(self, after: str) -> list[str]:
        return await self._catalog.read(
            lambda connection: queries.lost_blobs(connection, after, PAGE)
        )

    def _unpin(self, pin: str, blob: str) -> Repair:
        return self._write(lambda connection: queries.drop_pin_blob(connection, pin, blob))

    def _write(self, change: Callable[[Connection], object]) -> Repair:
        async def write() -> None:
            await self._catalog.write(change)

        return write


def _contradiction(row: ManifestRow) -> str:
    """What is wrong between a manifest's bytes and the rows that keep its blobs."""
    try:
        named = _blobs(row.data, row.manifest)
    except (IntegrityError, InvalidRequest) as error:
        return error.message
    if missing := sorted(named - row.blobs):
        return f"it names {len(missing)} blobs that are not kept for it, like {missing[0]}"
    if extra := sorted(row.blobs - named):
        return f"{len(extra)} blobs are kept for it that it does not name, like {extra[0]}"
    return ""


def _blobs(data: bytes, manifest: str) -> set[str]:
    return set(parse(data, f"manifest {manifest}", manifest).blobs())


def _sizes(tier: Tier, rows: Iterable[FileRow]) -> list[int | None]:
    return [tier.head(tier.blob_name(row.file)) for row in rows]


def _list(tier: Tier, prefix: str) -> list[FileInfo]:
    return list(tier.list(prefix))
