"""Datasets: sealed shards become one visible version in one transaction, or nothing does."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

from forebay_server.catalog import queries_datasets as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_bindings import (
    Standing,
    check_nothing_stands_on,
    generations_on,
)
from forebay_server.catalog.queries_datasets import (
    DatasetInfo,
    DatasetSummary,
    VersionInfo,
)
from forebay_server.catalog.queries_jobs import DELETE, FLUSH, TOMBSTONE, Job, job_of
from forebay_server.catalog.queries_manifests import read_manifest
from forebay_server.catalog.queries_origins import OriginRow, find_origins
from forebay_server.catalog.queries_parts import forget_parts
from forebay_server.catalog.queries_trash import trash_dataset
from forebay_server.catalog.queries_uploads import claim_landed
from forebay_server.model.versions import NewColumns, appended, with_columns
from forebay_server.publish import selections
from forebay_server.publish.lease import Uploads
from forebay_server.publish.parts import request_of
from forebay_server.publish.selections import NewSelection
from forebay_server.publish.shards import ShardCommit, check_sizes
from forebay_wire.errors import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    IntegrityError,
    InvalidRequest,
    NotFound,
)
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import check_name, check_random_name
from forebay_wire.limits import KIB, MAX_PAGE_ROWS, MAX_SHARDS_PER_VERSION, MIB, check_limit
from forebay_wire.manifest import DatasetManifest, SelectionManifest, ShardRef, parse

MAX_SCHEMA_BYTES: Final = 1 * MIB
MAX_METADATA_BYTES: Final = 256 * KIB
MAX_WAIT_SECONDS: Final = 7 * 86400.0

DELETE_SECONDS: Final = 600.0
"""How long a delete waits for the object tier before it leaves the rest to the background."""


class JobRunner(Protocol):
    """What datasets need of :class:`forebay_server.move.jobs.Jobs`."""

    def wake(self) -> None:
        """There may be new work."""
        ...

    async def wait(self, kind: str, target: str, timeout_seconds: float) -> Job | None:
        """The job's row once it is done or given up; None after the timeout or without a row."""
        ...


@dataclass(frozen=True)
class VersionCommit:
    """Everything that makes one new version."""

    dataset: str
    base_version: int
    """0 creates the dataset; n appends to version n, which must be the newest."""
    schema: bytes
    """Arrow schema, IPC-serialised."""
    shards: tuple[ShardCommit, ...]
    request: str
    """Random name: the same request is applied once."""
    metadata_json: str = ""
    """A JSON object; empty: that of the base version."""
    write: str = ""
    """Whose parts these shards were; they end with the commit, and the name remembers it."""
    base_manifest: str = ""
    """Of version *base_version*; empty: whichever it is."""
    columns: NewColumns | None = None
    """The base's rows with other columns, of which the shards are; None: its rows and others."""


class Datasets:
    """The use cases of datasets. Belongs to the event loop; holds no state."""

    def __init__(
        self,
        catalog: Catalog,
        uploads: Uploads,
        jobs: JobRunner,
        *,
        trash_seconds: float = 0.0,
        why_not_remote: str = "",
    ) -> None:
        """*trash_seconds*: how long what is deleted can be restored; *why_not_remote*: why nothing
        ever becomes remote, empty: it does."""
        self._why_not_remote = why_not_remote
        self._trash_seconds = trash_seconds
        self._catalog = catalog
        self._uploads = uploads
        self._jobs = jobs

    # ------------------------------------------------------------------------------------- look

    async def list(self, after: str = "", limit: int = 0) -> tuple[Sequence[DatasetSummary], str]:
        """A page by name, and the name to go on after (empty: no more). *limit* 0: a full page."""
        size = min(limit or MAX_PAGE_ROWS, MAX_PAGE_ROWS)
        page = await self._catalog.read(
            lambda connection: queries.list_datasets(connection, after, size + 1)
        )
        more = len(page) > size
        return page[:size], page[size - 1].name if more else ""

    async def get(self, name: str) -> DatasetInfo:
        """:class:`NotFound` if there is no such dataset."""
        check_name("dataset", name)
        found = await self._catalog.read(lambda connection: queries.find_dataset(connection, name))
        if found is None:
            raise _no_dataset(name)
        return found

    async def wait_version(
        self, name: str, version: int, durability: str, timeout_seconds: float
    ) -> VersionInfo:
        """The version (0: newest) once it is *durability*; :class:`DeadlineExceeded` says why not.

        A dataset that is deleted meanwhile raises :class:`NotFound`.
        """
        check_name("dataset", name)
        if durability not in ("local", "remote"):
            raise InvalidRequest(f"durability {durability!r} is not 'local' or 'remote'")
        if not 0 <= timeout_seconds <= MAX_WAIT_SECONDS:
            raise InvalidRequest(
                f"a timeout of {timeout_seconds} s; allowed: 0 to {MAX_WAIT_SECONDS:.0f}"
            )
        wanted = await self._version(name, version)
        if durability == "remote" and timeout_seconds:
            self._refuse_remote(wanted)

        def reached(connection: Connection) -> VersionInfo | NotFound | None:
            now = queries.find_version(connection, name, wanted.version)
            if now is None or now.manifest != wanted.manifest:
                return _no_dataset(name)
            return now if now.durability == "remote" or durability == "local" else None

        found: VersionInfo | NotFound | None = await self._catalog.wait_until(
            reached, timeout_seconds
        )
        if isinstance(found, NotFound):
            raise found
        if found is None:
            raise await self._not_remote(wanted, timeout_seconds)
        return found

    def _refuse_remote(self, version: VersionInfo) -> None:
        if self._why_not_remote and version.durability != "remote":
            raise InvalidRequest(
                f"version {version.version} of dataset {version.dataset} is local and never "
                f"becomes remote: {self._why_not_remote}"
            )

    # ----------------------------------------------------------------------------------- commit

    async def commit_version(self, commit: VersionCommit, uid: int) -> VersionInfo:
        """Make a new version visible: with all its shards, durable on this node, or not at all.

        Each shard's session has to live, belong to *uid* and hold the shard's blob; the commit ends
        those sessions. A repeated request, or one with a *write* that was committed to this
        dataset before, is answered with the version that was made.
        :class:`AlreadyExists` for a create of a name that exists, :class:`Conflict` for a base that
        is not the newest version.
        """
        refs = _check_commit(commit)
        if commit.write:
            commit = replace(commit, request=request_of(commit.dataset, commit.write, uid))
        base, done = await self._base_of(commit)
        if done is not None:
            return done
        manifest = _manifest_of(commit, await self._with_origins(commit, refs), base)
        manifest_id, data = manifest.encode()
        failpoint("dataset.before_commit")

        def apply(connection: Connection) -> VersionInfo:
            repeated = _find_repeated(connection, commit)
            if repeated is not None:
                return repeated
            _check_base(connection, commit, manifest.parent)
            check_sizes(connection, commit.shards)
            claim_landed(
                connection, uid, {one.session: one.blob for one in commit.shards if one.session}
            )
            below = queries.find_version(connection, commit.dataset, 0)
            made = queries.insert_version(connection, manifest, manifest_id, data, commit.request)
            if commit.columns is not None and below is not None:
                changed = {*commit.columns.columns, *commit.columns.dropped}
                selections.carry_over(connection, below, made, changed)
            queries.enqueue_flush(connection, manifest_id)
            if commit.write:
                forget_parts(connection, uid, commit.write)
            failpoint("dataset.inside_commit")
            return made

        made = await self._catalog.write(apply)
        failpoint("dataset.after_commit")
        self._uploads.committed(shard.session for shard in commit.shards if shard.session)
        self._jobs.wake()
        return made

    async def _with_origins(
        self, commit: VersionCommit, refs: tuple[ShardRef, ...]
    ) -> tuple[ShardRef, ...]:
        """*refs*, with where the origins among them lie."""
        ids = [shard.blob for shard in commit.shards if not shard.session]
        if not ids:
            return refs
        known = await self._catalog.read(lambda connection: find_origins(connection, ids))
        return tuple(
            ref if shard.session else _origin_shard(ref, known.get(ref.blob))
            for shard, ref in zip(commit.shards, refs, strict=True)
        )

    async def _base_of(
        self, commit: VersionCommit
    ) -> tuple[DatasetManifest | None, VersionInfo | None]:
        """The manifest that the commit appends to, and what it made if it is a repeat."""

        def look(connection: Connection) -> tuple[tuple[str, bytes] | None, VersionInfo | None]:
            repeated = _find_repeated(connection, commit)
            if repeated is not None:
                return None, repeated
            _check_base(connection, commit, commit.base_manifest or None)
            if not commit.base_version:
                return None, None
            base = queries.find_version(connection, commit.dataset, commit.base_version)
            data = read_manifest(connection, base.manifest) if base else None
            if base is None or data is None:
                raise _no_dataset(commit.dataset)
            return (base.manifest, data), None

        found, done = await self._catalog.read(look)
        if found is None:
            return None, done
        return _parse_dataset(found[1], commit.dataset, found[0]), None

    # ------------------------------------------------------------------------------- selections

    async def define_splits(
        self, name: str, version: int, fractions: Mapping[str, float], seed: int
    ) -> DatasetInfo:
        """Name shares of a version (0: newest) under one seeded permutation of its rows.

        A repeat changes nothing, in whatever order the splits are named; so do other fractions that
        select the same rows, as all do of a version without rows. Splits that select other rows of
        the same version are refused (:class:`AlreadyExists`).
        """
        of = await self._version(name, version)
        return await self._define(
            of, selections.splits(of, fractions, seed, await self._rows_of(of))
        )

    async def define_folds(
        self, name: str, version: int, num_folds: int, seed: int, prefix: str, within: str = ""
    ) -> DatasetInfo:
        """Name the training and the test part of each of *num_folds* folds of a version (0: newest)
        under one seeded permutation of its rows: ``PREFIX0-train``, ``PREFIX0-test``, … *within*:
        of the rows of its selection of that name.

        A repeat changes nothing. :class:`AlreadyExists` if a name chooses other rows.
        """
        of = await self._version(name, version)
        if within:
            there = await self._catalog.read(
                lambda one: queries.find_selection_manifests(one, of.dataset, of.version)
            )
            parents = [one for one in there if one[0].name == within]
            if not parents:
                raise NotFound(
                    f"version {of.version} of dataset {name} has no split {within!r} to share out"
                )
            made = selections.folds_within(of, parents[0], num_folds, seed, prefix)
            return await self._define(of, made)
        made = selections.folds(of, num_folds, seed, prefix, await self._rows_of(of))
        return await self._define(of, made)

    async def _rows_of(self, of: VersionInfo) -> str:
        """Manifest of the first version that had the rows of *of*; empty: it is that itself."""
        data = await self._catalog.read(lambda one: read_manifest(one, of.manifest))
        if data is None:
            raise _no_dataset(of.dataset)
        manifest = await asyncio.to_thread(_parse_dataset, data, of.dataset, of.manifest)
        return manifest.rows_of

    async def define_selections(
        self, name: str, version: int, wanted: Sequence[NewSelection], uid: int
    ) -> DatasetInfo:
        """Name rows of a version (0: newest) that lie in sealed blobs: all of *wanted* or none.

        The sessions have to live, belong to *uid* and hold the blobs; those of what is new end. A
        repeat changes nothing. :class:`AlreadyExists` for a name with another definition.
        """
        of = await self._version(name, version)
        shards = {one.name: one.shards for one in wanted}
        made = [selections.stored(of, one) for one in wanted]
        failpoint("selection.before_commit")

        def claim(connection: Connection, new: Sequence[SelectionManifest]) -> None:
            held = [shard for one in new for shard in shards[one.name]]
            check_sizes(connection, held)
            claim_landed(connection, uid, {shard.session: shard.blob for shard in held})
            claimed.extend(shard.session for shard in held)

        claimed: list[str] = []
        defined = await self._define(of, made, claim)
        failpoint("selection.after_commit")
        self._uploads.committed(claimed)
        return defined

    async def _define(
        self,
        of: VersionInfo,
        wanted: Sequence[SelectionManifest],
        claim: Callable[[Connection, Sequence[SelectionManifest]], None] = lambda *_: None,
    ) -> DatasetInfo:
        """Make those of *wanted* visible that are not, in one transaction, in which *claim* takes
        the blobs that they name."""
        encoded = {one.name: one.encode() for one in wanted}
        while True:
            there = await self._catalog.read(
                lambda one: queries.find_selection_manifests(one, of.dataset, of.version)
            )
            known = [info for info, _ in there]
            new = selections.missing(of, there, wanted)

            def apply(connection: Connection, known: object, new: Any) -> DatasetInfo | None:
                now = queries.find_version(connection, of.dataset, of.version)
                if now is None or now.manifest != of.manifest:
                    raise _no_dataset(of.dataset)
                if list(queries.find_selections(connection, of.dataset, of.version)) != known:
                    return None  # somebody defined some meanwhile: look again
                claim(connection, new)
                for one in new:
                    queries.insert_selection(connection, one, *encoded[one.name])
                    queries.enqueue_flush(connection, encoded[one.name][0])
                failpoint("selection.inside_commit")
                return queries.find_dataset(connection, of.dataset)

            defined = await self._catalog.write(partial(apply, known=known, new=new))
            if defined is not None:
                self._jobs.wake()
                return defined

    # ----------------------------------------------------------------------------------- delete

    async def standing_on(self, name: str) -> Sequence[Standing]:
        """The committed generations whose loaders go on in a version of the dataset."""
        check_name("dataset", name)
        return await self._catalog.read(lambda connection: generations_on(connection, name))

    async def delete(self, name: str, *, force: bool = False) -> bool:
        """Put a dataset with all versions and selections into the trash; whether there was one.

        It is gone for readers at once, and its name is free. On return the object tier says so
        too. Without a grace period as :meth:`delete_now`. :class:`Conflict` while a committed
        generation stands on it, unless *force*.
        """
        if not self._trash_seconds:
            return await self.delete_now(name, force=force)
        check_name("dataset", name)
        grace = self._trash_seconds

        def forget(connection: Connection) -> list[str]:
            if not force:
                check_nothing_stands_on(connection, name)
            return trash_dataset(connection, name, grace)

        doomed = await self._catalog.write(forget)
        self._jobs.wake()
        for manifest in doomed:
            job = await self._jobs.wait(TOMBSTONE, manifest, DELETE_SECONDS)
            if job is None and await self._is_stored(manifest):
                raise DeadlineExceeded(
                    f"dataset {name} is in the trash here; the object tier does not say so after "
                    f"{DELETE_SECONDS:.0f} s: that goes on in the background"
                )
        return bool(doomed)

    async def delete_now(self, name: str, *, force: bool = False) -> bool:
        """Delete a dataset with all versions and selections for good; whether there was one.

        It is gone for readers at once. On return it is gone from the object tier too, its bytes
        with it unless something else names them. :class:`DeadlineExceeded` if the object tier takes
        longer: the rest goes on in the background, and after a restart. :class:`Conflict` while a
        committed generation stands on it, unless *force*.
        """
        check_name("dataset", name)

        def forget(connection: Connection) -> list[str]:
            if not force:
                check_nothing_stands_on(connection, name)
            return queries.delete_dataset(connection, name)

        doomed = await self._catalog.write(forget)
        self._jobs.wake()
        for manifest in doomed:
            job = await self._jobs.wait(DELETE, manifest, DELETE_SECONDS)
            if job is not None and job.state == "failed":
                raise IntegrityError(
                    f"dataset {name} is deleted here, but not in the object tier: {job.error}"
                )
            if job is None and await self._is_stored(manifest):
                raise DeadlineExceeded(
                    f"dataset {name} is deleted here; removing it from the object tier takes "
                    f"longer than {DELETE_SECONDS:.0f} s and goes on in the background"
                )
        return bool(doomed)

    # ---------------------------------------------------------------------------------- helpers

    async def _is_stored(self, manifest: str) -> bool:
        return await self._catalog.read(
            lambda connection: read_manifest(connection, manifest) is not None
        )

    async def _version(self, name: str, version: int) -> VersionInfo:
        check_name("dataset", name)

        def look(connection: Connection) -> tuple[VersionInfo | None, VersionInfo | None]:
            newest = queries.find_version(connection, name, 0)
            return newest, queries.find_version(connection, name, version)

        newest, found = await self._catalog.read(look)
        if newest is None:
            raise _no_dataset(name)
        if found is None:
            raise NotFound(
                f"dataset {name} has no version {version}: the newest is {newest.version}"
            )
        return found

    async def _not_remote(self, version: VersionInfo, waited_seconds: float) -> DeadlineExceeded:
        job = await self._catalog.read(
            lambda connection: job_of(connection, FLUSH, version.manifest)
        )
        state = "no flush is queued: the daemon may have no object tier"
        if job is not None:
            state = f"its flush is {job.state} after {job.tries} tries"
            state += f", the last error was: {job.error}" if job.error else ""
        return DeadlineExceeded(
            f"version {version.version} of dataset {version.dataset} is not remote after "
            f"{waited_seconds:g} s; {state}"
        )


def _no_dataset(name: str) -> NotFound:
    return NotFound(f"there is no dataset {name}: `forebay dataset list` names those that exist")


def _check_commit(commit: VersionCommit) -> tuple[ShardRef, ...]:
    """Refuse at the border what can never be committed."""
    check_name("dataset", commit.dataset)
    check_random_name("request", commit.request)
    check_limit(
        "shards of a commit", len(commit.shards), MAX_SHARDS_PER_VERSION, "write larger shards"
    )
    check_limit("schema bytes", len(commit.schema), MAX_SCHEMA_BYTES, "use fewer columns")
    check_limit(
        "metadata bytes", len(commit.metadata_json.encode()), MAX_METADATA_BYTES, "store less there"
    )
    if not commit.schema:
        raise InvalidRequest(f"the commit of dataset {commit.dataset} has no schema")
    sessions = [shard.session for shard in commit.shards if shard.session]
    if len(set(sessions)) != len(sessions):
        raise InvalidRequest("two shards of one commit name the same upload session")
    if commit.columns is not None:
        check_limit(
            "schema bytes", len(commit.columns.schema), MAX_SCHEMA_BYTES, "use fewer columns"
        )
        if len(sessions) < len(commit.shards):
            raise InvalidRequest("columns are written, not read in place: import the file first")
    return tuple(shard.check() for shard in commit.shards)


def _origin_shard(ref: ShardRef, known: OriginRow | None) -> ShardRef:
    if known is None:
        raise NotFound(f"origin {ref.blob} is not registered: register its URL first")
    if known.num_bytes != ref.num_bytes:
        raise InvalidRequest(
            f"origin {known.ref.url} has {known.num_bytes} bytes, the commit says {ref.num_bytes}"
        )
    return replace(ref, origin=known.ref)


def _find_repeated(connection: Connection, commit: VersionCommit) -> VersionInfo | None:
    found = queries.version_of_request(connection, commit.request)
    if found is not None and found.dataset != commit.dataset:
        raise Conflict(
            f"request {commit.request} committed dataset {found.dataset} before, not "
            f"{commit.dataset}: use a new request name for each commit"
        )
    return found


def _check_base(connection: Connection, commit: VersionCommit, parent: str | None) -> None:
    """Refuse a base that is not the newest version, or (with *parent*) another one by now."""
    newest = queries.find_version(connection, commit.dataset, 0)
    if commit.base_version == 0:
        if newest is not None:
            raise AlreadyExists(
                f"dataset {commit.dataset} exists already, its newest version is "
                f"{newest.version}: append to it, choose another name, or delete it first"
            )
        return
    if newest is None:
        raise _no_dataset(commit.dataset)
    if newest.version != commit.base_version or parent not in (None, newest.manifest):
        does, again = "appends to", "the append"
        if commit.columns is not None:
            does, again = "changes columns of", "this"
        is_anew = newest.version == commit.base_version
        same = " of a dataset that was deleted since" if is_anew else ""
        raise Conflict(
            f"dataset {commit.dataset} has version {newest.version} by now, this commit {does} "
            f"{commit.base_version}{same}: begin {again} again from the newest version"
        )


def _manifest_of(
    commit: VersionCommit, refs: tuple[ShardRef, ...], base: DatasetManifest | None
) -> DatasetManifest:
    schema = base64.b64encode(commit.schema).decode()
    metadata = _metadata(commit.metadata_json)
    if base is None:
        if commit.columns is not None:
            raise InvalidRequest(
                f"columns are written beside those of a version: dataset {commit.dataset} is new"
            )
        return DatasetManifest(commit.dataset, 1, None, schema, refs, metadata)
    if commit.columns is not None:
        made = with_columns(base, refs, schema, commit.columns)
    else:
        made = appended(base, refs, schema)
    return replace(
        made,
        version=commit.base_version + 1,
        parent=base.encode()[0],
        metadata=metadata if commit.metadata_json else base.metadata,
    )


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidRequest(f"the metadata is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("the metadata is no JSON object")
    return value


def _parse_dataset(data: bytes, name: str, manifest_id: str) -> DatasetManifest:
    manifest = parse(data, f"dataset {name}, manifest {manifest_id} in the catalog", manifest_id)
    if not isinstance(manifest, DatasetManifest):
        raise IntegrityError(f"manifest {manifest_id} is not one of a dataset version")
    return manifest
