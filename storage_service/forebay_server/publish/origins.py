"""Datasets whose shards stay where the user keeps them: registered, listed, and made blobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from forebay_server.catalog import queries_datasets as queries
from forebay_server.catalog.engine import Catalog, Connection
from forebay_server.catalog.queries_blobs import live_replica
from forebay_server.catalog.queries_datasets import VersionInfo
from forebay_server.catalog.queries_history import record
from forebay_server.catalog.queries_manifests import read_manifest
from forebay_server.catalog.queries_origins import (
    OriginRow,
    add_origin,
    find_origins,
    forget_place,
)
from forebay_server.model.arrow_file import ArrowFile, inspect
from forebay_server.model.parquet_file import footer_of
from forebay_server.model.sample_files import CHECKS
from forebay_server.publish.dataset import JobRunner
from forebay_server.publish.selections import carry_over
from forebay_server.publish.shards import FORMATS
from forebay_server.tier.origin import OriginFile
from forebay_server.tier.origin_tier import OriginTier, off
from forebay_server.tier.registry import Tiers
from forebay_wire.errors import (
    Conflict,
    IntegrityError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import check_name, check_random_name
from forebay_wire.limits import MAX_BLOB_BYTES, MAX_PAGE_ROWS, check_limit
from forebay_wire.manifest import DatasetManifest, OriginRef, ShardRef, parse
from forebay_wire.zarr_keys import ARRAY_NAMES, array_folders, is_metadata

MAX_URLS: Final = 100
"""Of one request: each is looked at."""
AT_ONCE: Final = 4
"""Files that are looked at, or made blobs, at a time."""
PIN_TRIES: Final = 3
"""A copy may be evicted again while the others are made."""


class Copies(Protocol):
    """What pinning needs of ``serve.bring.Bringer``."""

    async def bring(
        self,
        blob: str,
        tier: str,
        progress: Callable[[str, int], object],
        guard: Callable[[Connection], object],
    ) -> bool:
        """Have a verified copy in a landing tier; whether one was made."""
        ...

    async def check(self, blob: str, tier: str) -> bool:
        """Whether the copy there is good, every byte read."""
        ...


@dataclass(frozen=True)
class Registered:
    """An origin, with what its file says of itself."""

    origin: str
    ref: OriginRef
    num_bytes: int
    content: ArrowFile
    footer: bytes = b""
    """Of a Parquet file."""


class OriginDatasets:
    """The use cases. Belongs to the event loop; holds no state."""

    def __init__(
        self,
        catalog: Catalog,
        tiers: Tiers,
        jobs: JobRunner,
        copies: Copies,
        content_of: Callable[[str], Awaitable[str | None]],
    ) -> None:
        """*content_of* answers the blob that an origin's bytes make, after reading them if need
        be."""
        self._catalog = catalog
        self._tiers = tiers
        self._jobs = jobs
        self._copies = copies
        self._content_of = content_of
        self._tier = next((tier for tier in tiers.all if isinstance(tier, OriginTier)), None)
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def register(self, urls: Sequence[str], format: str = "") -> list[Registered]:
        """Look at the files at *urls*, in *format*, and remember what they are now.

        The first one that will not do is the error: :class:`NotFound`, :class:`PermissionDenied`,
        :class:`InvalidRequest` for what is no Arrow IPC file, :class:`StorageError`.
        """
        if self._tier is None:
            raise off()
        if format and format not in FORMATS:
            raise InvalidRequest(f"files in format {format!r} cannot be read in place")
        most = 1 if format == "parquet" else MAX_URLS
        check_limit("URLs of one request", len(urls), most, "register them in several")
        arrays: set[str] = set()
        found = await asyncio.gather(*(self._look(self._tier, url, format, arrays) for url in urls))

        def keep(connection: Connection) -> None:
            for one in found:
                add_origin(connection, one.ref, one.num_bytes)

        await self._catalog.write(keep)
        return found

    async def _look(self, tier: OriginTier, url: str, format: str, arrays: set[str]) -> Registered:
        async with self._slots:
            return await self._tiers.run(tier, _look, tier, url, format, arrays)

    async def page(
        self, dataset: str, version: int, after: int, limit: int
    ) -> tuple[list[OriginRow], bool]:
        """The origins of a version (0: newest) but the first *after*; whether there are more."""
        _, manifest = await self._manifest(dataset, version)
        ids = [shard.blob for shard in manifest.shards if shard.origin is not None]
        page = ids[after : after + min(limit or MAX_PAGE_ROWS, MAX_PAGE_ROWS)]
        rows = await self._catalog.read(lambda connection: find_origins(connection, page))
        return [rows[one] for one in page], after + len(page) < len(ids)

    # ------------------------------------------------------------------------------------- pin

    async def pin(self, dataset: str, request: str) -> VersionInfo:
        """Make all origins of the newest version blobs of a new version, kept here and flushed.

        Every byte is read, compared with what the first read found, and copied durably; after that
        the originals may go. :class:`OriginChanged`, :class:`ResourceExhausted`, :class:`Conflict`
        if somebody appends meanwhile.
        """
        check_random_name("request", request)
        done = await self._catalog.read(lambda one: queries.version_of_request(one, request))
        if done is not None:
            return done
        base, manifest = await self._manifest(dataset, 0)
        if all(shard.origin is None for shard in manifest.shards):
            return base
        for _ in range(PIN_TRIES):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._kept(shard)) for shard in manifest.shards]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            shards = [task.result() for task in tasks]
            made = await self._commit(base, manifest, shards, request)
            if made is not None:
                self._jobs.wake()
                return made
        raise ResourceExhausted(
            f"the origins of dataset {dataset} do not fit the local tiers at once: give those more "
            "room, or import the files in parts (forebay dataset import)"
        )

    async def _kept(self, shard: ShardRef) -> ShardRef:
        """The same rows as a blob that a landing tier has, every byte checked."""
        if shard.origin is None:
            return shard
        async with self._slots:
            blob = await self._content_of(shard.blob)
            if blob is None:
                raise NotFound(f"origin {shard.origin.url} is not known any more: register it anew")
            full: ResourceExhausted | None = None
            for tier in self._tiers.landing:
                try:
                    made = await self._copies.bring(blob, tier.name, _nothing, _nothing)
                except ResourceExhausted as error:
                    full = full or error
                    continue
                if made or await self._copies.check(blob, tier.name):
                    return replace(shard, blob=blob, origin=None)
                await self._copies.bring(blob, tier.name, _nothing, _nothing)
                return replace(shard, blob=blob, origin=None)
            raise full or ResourceExhausted(f"no tier takes {shard.num_bytes} bytes")

    async def _commit(
        self, base: VersionInfo, below: DatasetManifest, shards: list[ShardRef], request: str
    ) -> VersionInfo | None:
        """The new version; None if a copy has gone again."""
        manifest = replace(
            below,
            version=base.version + 1,
            parent=base.manifest,
            shards=tuple(shards),
            rows_of=below.rows_of or base.manifest,
        )
        manifest_id, data = manifest.encode()
        names = [tier.name for tier in self._tiers.all if tier.keeps]
        fresh = [
            shard.blob
            for shard, before in zip(shards, below.shards, strict=True)
            if before.origin is not None
        ]
        failpoint("origin.before_pin")

        def apply(connection: Connection) -> VersionInfo | None:
            newest = queries.find_version(connection, base.dataset, 0)
            if newest is None or newest.manifest != base.manifest:
                raise Conflict(
                    f"dataset {base.dataset} was changed while its origins were read: pin it again"
                )
            for blob in fresh:
                if live_replica(connection, blob, names) is None:
                    return None
            made = queries.insert_version(connection, manifest, manifest_id, data, request)
            carry_over(connection, base, made, ())
            for blob in fresh:
                forget_place(connection, blob)
            subject = f"dataset {base.dataset}@{made.version}"
            record(connection, subject, "pinned", f"{len(fresh)} origins are blobs now")
            queries.enqueue_flush(connection, manifest_id)
            return made

        return await self._catalog.write(apply)

    async def _manifest(self, dataset: str, version: int) -> tuple[VersionInfo, DatasetManifest]:
        check_name("dataset", dataset)

        def look(connection: Connection) -> tuple[VersionInfo, bytes] | None:
            found = queries.find_version(connection, dataset, version)
            data = read_manifest(connection, found.manifest) if found else None
            return None if found is None or data is None else (found, data)

        found = await self._catalog.read(look)
        if found is None:
            which = f" with a version {version}" if version else ""
            raise NotFound(f"there is no dataset {dataset}{which}")
        info, data = found
        manifest = await asyncio.to_thread(parse, data, f"dataset {dataset}", info.manifest)
        if not isinstance(manifest, DatasetManifest):
            raise IntegrityError(f"manifest {info.manifest} is not one of a dataset version")
        return info, manifest


def _look(tier: OriginTier, url: str, format: str, arrays: set[str]) -> Registered:
    """On a thread: the file as it is now, and what it holds. *arrays*: folders that are known to be
    of arrays of zarr."""
    looked = tier.places.look(tier.places.spell(url))
    check_limit(f"bytes of {looked.url}", looked.num_bytes, MAX_BLOB_BYTES, "cut it")
    if not looked.num_bytes:
        raise InvalidRequest(f"{looked.url} is empty, and no {format or 'Arrow IPC'} file")
    file = tier.places.open(looked.url, looked.num_bytes, looked.validator)
    content, footer = ArrowFile(b"", (), has_dictionaries=False), b""
    try:
        if format == "parquet":
            footer = footer_of(file.read, looked.num_bytes, looked.url)
        elif format == "zarr":
            _check_zarr(tier, file, arrays)
        elif format:
            CHECKS[format](file.read, looked.num_bytes, looked.url)
        else:
            content = inspect(file.read, looked.num_bytes, looked.url)
    finally:
        file.close()
    ref = OriginRef(looked.url, looked.validator)
    return Registered(ref.identity(looked.num_bytes), ref, looked.num_bytes, content, footer)


def _check_zarr(tier: OriginTier, file: OriginFile, arrays: set[str]) -> None:
    """Refuse what is no description of an array or a group, nor of an array that has one: so that
    only such files can be read below the origin prefixes."""
    if is_metadata(file.url):
        if bytes(file.read(0, 1)) != b"{":
            raise InvalidRequest(f"{file.url} is no JSON object, as zarr's descriptions are")
        return
    folders = array_folders(file.url)
    if any(folder in arrays for folder in folders):
        return
    for folder in folders:
        for name in ARRAY_NAMES:
            with contextlib.suppress(NotFound, PermissionDenied):
                tier.places.look(tier.places.spell(f"{folder}/{name}"))
                arrays.add(folder)
                return
    raise InvalidRequest(
        f"{file.url} is no file of an array of zarr: no folder above it has a {ARRAY_NAMES[0]} or "
        f"{ARRAY_NAMES[1]}"
    )


def _nothing(*arguments: object) -> None:
    pass
