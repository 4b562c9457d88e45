"""Rebuilds a lost catalog from the object tier alone: ``forebay recover URL --data DIR``.

Everything that was ``remote`` is there again; what was only local is lost with its node. A manifest
is taken only if all that it names is there; what is left out is reported with the reason. Bytes are
not copied: they are fetched, and verified, when somebody reads them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from forebay_server.catalog import queries_recovery as queries
from forebay_server.catalog.engine import Catalog, Connection, sqlite_url
from forebay_server.catalog.queries_managing import restore_notes
from forebay_server.catalog.queries_objects import enqueue_missing
from forebay_server.catalog.queries_settings import own_name, pass_moment
from forebay_server.config import CONFIG_FILE_NAME, load_config
from forebay_server.folder import FolderLock, load_node, write_private
from forebay_server.model.chains import choose
from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectBlob
from forebay_server.object_options import ObjectOptions
from forebay_server.publish.manifests import BLOBS, MANIFESTS
from forebay_server.publish.run_notes import RUNS, FoundNotes, newest_names, read_notes
from forebay_server.tier.encode import open_plain
from forebay_server.tier.owner import Owner, take_over
from forebay_server.tier.publication import fsync_folder
from forebay_server.tier.remote import ObjectClientName, RemoteTier
from forebay_server.tier.store import FileInfo, Tier
from forebay_server.tier.verify import read_table
from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    ForebayError,
    IntegrityError,
    InvalidRequest,
    NotFound,
)
from forebay_wire.ids import check_id
from forebay_wire.manifest import (
    KIND_DATASET,
    KIND_GENERATION,
    KIND_SELECTION,
    KIND_STATISTICS,
    AnyManifest,
    DatasetManifest,
    GenerationManifest,
    SelectionManifest,
    Stamp,
    StatisticsManifest,
    parse,
    read_stamp,
)

logger = logging.getLogger(__name__)

NO_OPTIONS: Final = ObjectOptions()

T = TypeVar("T")

TOMBSTONES: Final = "trash/"
"""What says in the object tier that a manifest was deleted."""
KINDS: Final = {
    DatasetManifest: KIND_DATASET,
    GenerationManifest: KIND_GENERATION,
    SelectionManifest: KIND_SELECTION,
    StatisticsManifest: KIND_STATISTICS,
}
CATALOG_FILE_NAME: Final = "catalog.sqlite"
UNFINISHED_FILE_NAME: Final = "catalog-recovering.sqlite"
NUM_READERS: Final = 8
"""Calls to the object tier at a time."""

BAD: Final = (IntegrityError, InvalidRequest, NotFound)
"""A piece that is damaged or missing; anything else ends the recovery, to be begun again."""

Report = Callable[[str, int, int], object]
"""Told the step (``manifests``, ``blobs``, ``rows``), how much of it is done, and of how much."""


@dataclass(frozen=True)
class LeftOut:
    """Something in the object tier that could not be taken."""

    what: str
    reason: str


@dataclass
class Recovered:
    """What a recovery found."""

    url: str
    folder: str
    num_datasets: int = 0
    num_versions: int = 0
    num_selections: int = 0
    num_statistics: int = 0
    num_runs: int = 0
    num_generations: int = 0
    num_trashed: int = 0
    """Versions, selections and generations that were deleted: they are in the trash again."""
    num_blobs: int = 0
    num_bytes: int = 0
    """Of all blobs."""
    left_out: list[LeftOut] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """JSON-able, with the field names as keys."""
        return asdict(self)


@dataclass(frozen=True)
class _Found:
    """A good manifest of the object tier."""

    identity: str
    data: bytes
    manifest: AnyManifest
    stamp: Stamp

    @property
    def what(self) -> str:
        return _describe(self.manifest)

    @property
    def blobs(self) -> list[str]:
        return self.manifest.blobs()


async def recover(
    url: str,
    folder: Path,
    *,
    client: ObjectClientName = "s3fs",
    options: ObjectOptions = NO_OPTIONS,
    report: Report = lambda step, done, total: None,
) -> Recovered:
    """Rebuild the data folder *folder* from the object tier at *url*; durable on return.

    *client* and *options* say how to speak with an object store.

    The folder has no catalog yet (:class:`AlreadyExists`) and no daemon. Its ``forebay.toml`` will
    name *url* as the object tier. A recovery that was interrupted is begun again. The tier is the
    new catalog's then: the daemon that had it before can no longer open it. Of what was deleted and
    made again under the same name the newer one is taken. :class:`NotFound` if there is nothing to
    recover; nothing is made there then.
    """
    with FolderLock(folder):
        if (folder / CATALOG_FILE_NAME).exists():
            raise AlreadyExists(
                f"{folder} holds a catalog: recover into an empty folder, so that nothing is lost"
            )
        tier = RemoteTier(
            "object", url, client=client, options=options.as_dict(), must_have=MANIFESTS
        )
        await asyncio.to_thread(tier.open)
        try:
            recovery = _Recovery(tier, Recovered(url, str(folder)), report)
            name = await recovery.run(folder)
            _write_settings(folder, url, client, options)
            # Before the catalog has its name: a recovery that ends here can be begun again.
            await asyncio.to_thread(_take_over, tier, name, folder)
            _publish_catalog(folder / UNFINISHED_FILE_NAME, folder / CATALOG_FILE_NAME)
        finally:
            await asyncio.to_thread(tier.close)
    return recovery.result


class _Recovery:
    """One run of :func:`recover`."""

    def __init__(self, tier: Tier, result: Recovered, report: Report) -> None:
        self.result = result
        self._tier = tier
        self._report = report
        self._slots = asyncio.Semaphore(NUM_READERS)

    async def run(self, folder: Path) -> str:
        """Fill a new catalog in *folder*, not yet under its final name; the catalog's own name."""
        manifests = await self._read_manifests()
        located = await self._locate({blob for found in manifests for blob in found.blobs})
        unfinished = folder / UNFINISHED_FILE_NAME
        catalog = await asyncio.to_thread(_open_fresh, unfinished)
        try:
            await self._fill(catalog, manifests, located)
            return await catalog.write(own_name)
        finally:
            # Closing moves the whole write-ahead log into the file.
            await asyncio.to_thread(catalog.close)

    # --------------------------------------------------------------------------------- manifests

    async def _read_manifests(self) -> list[_Found]:
        infos = await asyncio.to_thread(lambda: list(self._tier.list(MANIFESTS)))
        if not infos:
            raise NotFound(
                f"there is no manifest in the object tier at {self._tier.location}: is the URL "
                "right? Nothing was recovered"
            )
        infos.sort(key=lambda info: info.name)
        found = await self._each("manifests", infos, self._read_manifest)
        return [one for one in found if one is not None]

    def _read_manifest(self, info: FileInfo) -> _Found | None:
        identity = info.name.removeprefix(MANIFESTS)
        try:
            check_id("manifest", identity)
            data = self._tier.get(info.name)
            where = f"tier {self._tier.name}, file {info.name}"
            return _Found(identity, data, parse(data, where, identity), read_stamp(data))
        except BAD as error:
            self._leave_out(f"manifest {identity}", error)
            return None

    # ------------------------------------------------------------------------------------- blobs

    async def _locate(self, blobs: set[str]) -> dict[str, ObjectBlob | ForebayError]:
        ordered = sorted(blobs)
        found = await self._each("blobs", ordered, self._locate_blob)
        return dict(zip(ordered, found, strict=True))

    def _locate_blob(self, blob: str) -> ObjectBlob | ForebayError:
        """Where a blob lies, with size and segment table of its file checked."""
        where = f"tier {self._tier.name}, file {BLOBS}{blob}"
        try:
            found = ObjectBlob.decode(self._tier.get(BLOBS + blob), where, blob)
            extent = found.extents[0]
            size = None if found.encoding == PIECES else extent.file_bytes
            with open_plain(
                self._tier, extent.file, found.encoding, blob, stored_bytes=size
            ) as reader:
                read_table(reader, blob)
        except NotFound as error:
            return IntegrityError(f"a piece of blob {blob} is missing: {error}")
        except BAD as error:
            return error
        return found

    # ------------------------------------------------------------------------------------- trash

    async def _read_tombstones(self) -> dict[str, bytes]:
        """Manifest to what the object tier says of its deletion."""
        infos = await asyncio.to_thread(lambda: list(self._tier.list(TOMBSTONES)))
        found = await self._each("tombstones", infos, lambda info: self._tier.get(info.name))
        names = [info.name.removeprefix(TOMBSTONES) for info in infos]
        return dict(zip(names, found, strict=True))

    async def _restore_trashed(
        self,
        catalog: Catalog,
        found: _Found,
        located: Mapping[str, ObjectBlob | ForebayError],
        tombstone: bytes,
    ) -> None:
        """What was deleted does not come back by itself: it lies in the trash again."""

        def restore(connection: Connection) -> None:
            self._restore_blobs(connection, found, located)
            kind = KINDS[type(found.manifest)]
            queries.restore_trashed(
                connection, found.identity, kind, found.data, found.blobs, tombstone
            )

        try:
            await catalog.write(restore)
            self.result.num_trashed += 1
        except (ValueError, KeyError) as error:
            self._leave_out(found.what, f"it was deleted, and its tombstone is damaged: {error}")

    # -------------------------------------------------------------------------------------- rows

    async def _fill(
        self,
        catalog: Catalog,
        manifests: Sequence[_Found],
        located: Mapping[str, ObjectBlob | ForebayError],
    ) -> None:
        latest = max((found.stamp.committed_ns for found in manifests), default=0)
        await catalog.write(lambda connection: pass_moment(connection, latest))
        whole = [found for found in manifests if self._is_whole(found, located)]
        tombstones = await self._read_tombstones()
        for found in whole:
            if found.identity in tombstones:
                await self._restore_trashed(catalog, found, located, tombstones[found.identity])
        choice = choose([found for found in whole if found.identity not in tombstones])
        for older, reason in choice.left_out:
            self._leave_out(older.what, reason)
        for number, found in enumerate(choice.kept, 1):
            try:
                await catalog.write(self._restoring(found, located))
                self._count(found.manifest)
            except Conflict as error:
                self._leave_out(found.what, error)
            self._report("rows", number, len(choice.kept))
        begun = {
            found.manifest.run: found.stamp.begun_ns
            for found in choice.kept
            if isinstance(found.manifest, GenerationManifest)
        }
        await self._restore_notes(catalog, begun)
        await catalog.write(enqueue_missing)
        await self._count_all(catalog)

    async def _restore_notes(self, catalog: Catalog, begun: Mapping[str, int]) -> None:
        """What people said about the runs that came back."""
        infos = await asyncio.to_thread(lambda: list(self._tier.list(RUNS)))
        for run, names in newest_names([info.name for info in infos]).items():
            if run not in begun:
                continue
            try:
                found = await asyncio.to_thread(read_notes, self._tier, names)
            except IntegrityError as error:
                self._leave_out(f"what was said about run {run}", error)
                continue
            if found.begun_ns == begun[run]:
                await catalog.write(partial(_restore_said, found=found))

    def _is_whole(self, found: _Found, located: Mapping[str, ObjectBlob | ForebayError]) -> bool:
        for blob in found.blobs:
            if isinstance(place := located[blob], Exception):
                self._leave_out(found.what, place)
                return False
        return True

    def _restoring(
        self, found: _Found, located: Mapping[str, ObjectBlob | ForebayError]
    ) -> Callable[[Connection], None]:
        def restore(connection: Connection) -> None:
            self._restore_blobs(connection, found, located)
            _restore(connection, found)

        return restore

    def _restore_blobs(
        self,
        connection: Connection,
        found: _Found,
        located: Mapping[str, ObjectBlob | ForebayError],
    ) -> None:
        for blob in found.blobs:
            place = located[blob]
            assert isinstance(place, ObjectBlob), "damaged ones are left out before"
            queries.restore_blob(connection, blob, self._tier.name, place)

    def _count(self, manifest: AnyManifest) -> None:
        if isinstance(manifest, DatasetManifest):
            self.result.num_versions += 1
        elif isinstance(manifest, SelectionManifest):
            self.result.num_selections += 1
        elif isinstance(manifest, StatisticsManifest):
            self.result.num_statistics += 1
        else:
            self.result.num_generations += 1

    async def _count_all(self, catalog: Catalog) -> None:
        counts = await catalog.read(queries.count_recovered)
        self.result.num_datasets = counts.num_datasets
        self.result.num_runs = counts.num_runs
        self.result.num_blobs = counts.num_blobs
        self.result.num_bytes = counts.num_bytes

    # ----------------------------------------------------------------------------------- helpers

    def _leave_out(self, what: str, reason: Exception | str) -> None:
        logger.error("%s is left out: %s", what, reason)
        self.result.left_out.append(LeftOut(what, str(reason)))

    async def _each(self, step: str, items: list[Any], read: Callable[[Any], T]) -> list[T]:
        """What *read* gives for each of *items*, a few at a time, in order."""
        done = 0

        async def one(item: Any) -> T:
            nonlocal done
            async with self._slots:
                found = await asyncio.to_thread(read, item)
            done += 1
            self._report(step, done, len(items))
            return found

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(item)) for item in items]
        except BaseExceptionGroup as errors:  # the object tier itself failed: nothing is left out
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]


def _restore_said(connection: Connection, found: FoundNotes) -> None:
    pass_moment(connection, found.moment)
    restore_notes(connection, found.said)


def _restore(connection: Connection, found: _Found) -> None:
    manifest = found.manifest
    if isinstance(manifest, DatasetManifest):
        queries.restore_version(connection, found.identity, found.data, manifest)
    elif isinstance(manifest, SelectionManifest):
        queries.restore_selection(connection, found.identity, found.data, manifest)
    elif isinstance(manifest, StatisticsManifest):
        queries.restore_statistics(connection, found.identity, found.data, manifest)
    else:
        queries.restore_generation(connection, found.identity, found.data, manifest)


def _describe(manifest: AnyManifest) -> str:
    if isinstance(manifest, GenerationManifest):
        return f"generation {manifest.run}@{manifest.attempt}/{manifest.step}"
    text = f"version {manifest.version} of dataset {manifest.dataset}"
    if isinstance(manifest, SelectionManifest):
        return f"selection {manifest.name} of {text}"
    if isinstance(manifest, StatisticsManifest):
        return f"statistics of {text}"
    return text


def _write_settings(
    folder: Path, url: str, client: ObjectClientName, options: ObjectOptions
) -> None:
    """Have the folder's daemons use the recovered object tier, unless its file says so already.

    Credentials are not written: the daemon gets them as it got them before.
    """
    path = folder / CONFIG_FILE_NAME
    if path.exists():
        told = load_config({}, {}, path).config.object_url
        if told != url:
            raise InvalidRequest(
                f"{path} names the object tier {told!r} and not {url!r}: recover into an empty "
                "folder"
            )
        return
    # A JSON string is a TOML string.
    lines = ["# Written by `forebay recover`.", f"object-url = {json.dumps(url)}"]
    if client != "s3fs":
        lines.append(f"object-client = {json.dumps(client)}")
    if shown := options.without_credentials():
        lines.append("[object-options]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in shown.items()]
    write_private(path, ("\n".join(lines) + "\n").encode())


def _take_over(tier: Tier, catalog: str, folder: Path) -> None:
    take_over(tier, Owner(catalog, load_node(folder), str(folder.resolve())))


def _open_fresh(path: Path) -> Catalog:
    """An empty catalog; what an interrupted recovery left is thrown away."""
    for leftover in path.parent.glob(f"{path.name}*"):
        leftover.unlink()
    return Catalog.open(sqlite_url(path))


def _publish_catalog(unfinished: Path, final: Path) -> None:
    """Give the finished catalog its name, durably."""
    unfinished.rename(final)
    fsync_folder(final.parent)
