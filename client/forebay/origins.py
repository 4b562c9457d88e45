"""Datasets of files that stay where they are: registered, shown, and made blobs; part of
:class:`forebay.Client`."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forebay.methods import Datasets
from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.ids import check_name, new_random_name
from forebay_wire.limits import MAX_PAGE_ROWS
from forebay_wire.v1 import datasets_pb2

if TYPE_CHECKING:
    from forebay._channel import RpcChannel
    from forebay.dataset.dataset import Dataset
    from forebay.dataset.schema import Schema

URLS_AT_ONCE = 50
FORMATS = ("arrow", "parquet", "mds", "webdataset", "zarr")
"""That can be read in place."""
LOOK_SECONDS = 600.0
"""The daemon reads the ends of each file."""
PIN_SECONDS = 7 * 86400.0
"""The daemon reads all of it."""


@dataclass(frozen=True)
class Origin:
    """One file that a dataset reads where it lies."""

    url: str
    num_bytes: int
    validator: dict[str, str | int]
    """What tells it from a changed one, beside its size."""
    blob: str
    """What its bytes made when they were first read; empty: not read yet."""

    @property
    def trust(self) -> str:
        """In words, for people."""
        if not self.blob:
            return "trusted on first use: not read yet"
        return "trusted on first use: read, and verified since"


class OriginCalls(ABC):
    """The calls of :class:`forebay.Client` about origins. Thread-safe."""

    channel: RpcChannel

    @abstractmethod
    def dataset(self, name: str, version: int | str = "latest") -> Dataset:
        """One version of a dataset, by name."""

    def register_dataset(
        self,
        name: str,
        urls: Sequence[str | os.PathLike[str]],
        *,
        format: str | None = None,
        append: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> Dataset:
        """A dataset of files that stay where they are: absolute URLs or paths, in the order of
        rows, each below one of the daemon's ``origin-prefixes``.

        *format* is ``"arrow"`` for Arrow IPC files, which are mapped as they lie; ``"parquet"``,
        whose row groups are decoded when they are read; ``"mds"`` for folders of uncompressed MDS
        shards and ``"webdataset"`` for uncompressed tar files, in which this process looks for the
        samples; ``"zarr"`` for the root folder of one zarr store, which ``forebay.zarr`` reads.
        Default: by names.

        Nothing is copied: a file's bytes are trusted when they are first read, and compared with
        that ever since. One that changes is OriginChanged from then on. *append* adds a version to
        a dataset that exists. NotFound, PermissionDenied, InvalidRequest, SchemaMismatch name the
        file that will not do; AlreadyExists, Conflict.
        """
        check_name("dataset", name)
        if isinstance(urls, (str, os.PathLike)) or not urls:
            raise InvalidRequest(f"dataset {name!r}: give a list of at least one URL")
        base = self.dataset(name) if append else None
        given = [_absolute(os.fspath(url)) for url in urls]
        schema = base.schema if base is not None else None
        shards: list[datasets_pb2.ShardCommit] = []
        kind = _format_of(given, format)
        if kind == "zarr":
            metadata = {**(metadata or {}), **_one_store(given, append=append)}
        if kind in ("mds", "webdataset", "zarr"):
            schema, shards = self._place_samples(given, kind, schema)
        at_once = 1 if kind == "parquet" else URLS_AT_ONCE
        for start in range(0, 0 if shards else len(given), at_once):
            for one in self._look(given[start : start + at_once], kind):
                if kind:
                    schema, shard = _parquet(one, schema)
                else:
                    schema, shard = _fitting(one, schema), _shard(one)
                shards.append(shard)
        assert schema is not None, "there is a URL"
        commit = datasets_pb2.CommitVersionRequest(
            dataset=name,
            base_version=0 if base is None else base.version,
            base_manifest="" if base is None else base.manifest_id,
            schema=schema.arrow.serialize().to_pybytes(),
            shards=shards,
            request=new_random_name(),
            metadata_json=json.dumps(dict(metadata)) if metadata is not None else "",
        )
        made = self.channel.call(Datasets.CommitVersion, commit, timeout=LOOK_SECONDS)
        return self.dataset(name, made.version)

    def _look(self, urls: Sequence[str], kind: str) -> Sequence[datasets_pb2.Origin]:
        request = datasets_pb2.RegisterOriginsRequest(urls=urls, format=kind)
        return self.channel.call(Datasets.RegisterOrigins, request, timeout=LOOK_SECONDS).origins

    def _place_samples(
        self, paths: Sequence[str], kind: str, schema: Schema | None
    ) -> tuple[Schema, list[datasets_pb2.ShardCommit]]:
        """Schema and shards of files of samples."""
        from forebay.importers.in_place import place
        from forebay.importers.piece import Options, Source

        placed = list(place(paths, kind))
        if kind == "zarr":
            from forebay.dataset.schema import Schema
            from forebay.zarr_version import SCHEMA

            schema = Schema.of(SCHEMA) if schema is None else schema
        else:
            pieces = [one.piece for one in placed if one.piece is not None]
            found = Source.of(kind, pieces).schema(Options())
            schema = found if schema is None else _checked(found, schema, paths[0])
        shards: list[datasets_pb2.ShardCommit] = []
        for start in range(0, len(placed), URLS_AT_ONCE):
            some = placed[start : start + URLS_AT_ONCE]
            origins = self._look([one.url for one in some], kind)
            for one, origin in zip(some, origins, strict=True):
                if origin.num_bytes != one.num_bytes:
                    raise InvalidRequest(
                        f"{one.url} has {origin.num_bytes} bytes for the daemon, {one.num_bytes} "
                        "here or in its index"
                    )
                shards.append(
                    datasets_pb2.ShardCommit(
                        blob=origin.origin,
                        num_bytes=one.num_bytes,
                        num_rows=sum(one.batch_rows),
                        batch_rows=one.batch_rows,
                        format=one.format,
                    )
                )
        return schema, shards

    def origins(self, name: str, version: int | str = "latest") -> list[Origin]:
        """The files that a dataset version reads where they lie, in the order of shards."""
        number = 0 if version == "latest" else int(version)
        found: list[Origin] = []
        more = True
        while more:
            request = datasets_pb2.ListOriginsRequest(
                dataset=check_name("dataset", name),
                version=number,
                after=len(found),
                limit=MAX_PAGE_ROWS,
            )
            page = self.channel.call(Datasets.ListOrigins, request)
            found.extend(
                Origin(one.url, one.num_bytes, json.loads(one.validator_json), one.blob)
                for one in page.origins
            )
            more = page.more
        return found

    def pin_origins(self, name: str) -> Dataset:
        """Make all origins of a dataset blobs, in a new version: read, verified, kept, and on their
        way to the object tier. The originals may go once it is "remote" (or "local", if this
        node's disk is safe enough).

        A version without origins is returned as it is; a call that broke off goes on where it was.
        OriginChanged, ResourceExhausted if the local tiers cannot hold them, Conflict.
        """
        request = datasets_pb2.PinOriginsRequest(
            dataset=check_name("dataset", name), request=new_random_name()
        )
        made = self.channel.call(Datasets.PinOrigins, request, timeout=PIN_SECONDS)
        return self.dataset(name, made.version)


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(url)


def _format_of(paths: Sequence[str], given: str | None) -> str:
    """As the wire has it: empty for Arrow."""
    if given not in (None, *FORMATS):
        raise InvalidRequest(
            f"files in format {given!r} cannot be read in place: {', '.join(FORMATS)} can; import "
            "others (forebay dataset import)"
        )
    if given is not None:
        return "" if given == "arrow" else given
    kinds = {_guessed(path) for path in paths}
    if len(kinds) > 1:
        raise InvalidRequest(
            "the files are of several formats: register them as several versions (append=True)"
        )
    return kinds.pop()


def _one_store(paths: Sequence[str], *, append: bool) -> dict[str, Any]:
    """What the metadata of a zarr store says."""
    from forebay.zarr_version import METADATA

    if append or len(paths) != 1:
        raise InvalidRequest(
            "a dataset is one zarr store: give its root folder alone, and another name for another "
            "one; what changes in a version that was registered, ForebayStore commits"
        )
    return METADATA


def _guessed(path: str) -> str:
    from forebay.importers.in_place import is_mds, is_zarr

    if path.lower().endswith((".parquet", ".pq")):
        return "parquet"
    if path.lower().endswith(".tar"):
        return "webdataset"
    if is_mds(path):
        return "mds"
    is_arrow = path.lower().endswith((".arrow", ".feather", ".ipc"))
    return "zarr" if not is_arrow and is_zarr(path) else ""


def _parquet(
    found: datasets_pb2.Origin, wanted: Schema | None
) -> tuple[Schema, datasets_pb2.ShardCommit]:
    """Schema and shard of a Parquet file: each row group is a record batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from forebay.dataset.schema import Schema

    try:
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + found.footer))
        schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise InvalidRequest(f"{found.url} cannot be read as parquet: {error}") from error
    ours = Schema.from_arrow(schema)
    _check_same(found.url, ours, wanted)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [int(group.num_rows) for group in groups]
    if not all(rows) or not rows:
        raise InvalidRequest(f"{found.url} has a row group without rows: write it without")
    for number, group in enumerate(groups):
        _check_group(found.url, ours, number, group)
    shard = datasets_pb2.ShardCommit(
        blob=found.origin,
        num_bytes=found.num_bytes,
        num_rows=sum(rows),
        batch_rows=rows,
        format="parquet",
    )
    return wanted or ours, shard


def _check_group(url: str, schema: Schema, number: int, group: Any) -> None:
    """Refuse missing numbers, as far as a row group tells of them."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        if "." in chunk.path_in_schema or chunk.statistics is None:
            continue
        column = schema[chunk.path_in_schema]
        nulls = chunk.statistics.null_count or 0
        is_whole = column.dtype is not None and column.dtype.kind in "iub"
        if nulls and column.kind == "scalar" and is_whole:
            raise SchemaMismatch(
                f"{url}, column {column.name!r}: {nulls} values are missing in row group {number}, "
                f"which no {column.text} stands for; fill them, or make the column a float"
            )


def _shard(found: datasets_pb2.Origin) -> datasets_pb2.ShardCommit:
    if not all(found.batch_rows):
        raise InvalidRequest(f"{found.url} has a record batch without rows: write it without")
    return datasets_pb2.ShardCommit(
        blob=found.origin,
        num_bytes=found.num_bytes,
        num_rows=sum(found.batch_rows),
        batch_rows=found.batch_rows,
    )


def _checked(found: Schema, wanted: Schema, path: str) -> Schema:
    """*wanted* if samples of *found* can be read with it: what they lack may be missing.

    SchemaMismatch. Only the first sample was looked at.
    """
    there = {column.name: column for column in wanted.columns}
    for column in found.columns:
        own = there.pop(column.name, None)
        if own is not None and own.kind == column.kind == "arrow":
            continue  # nested: of what the first sample has one cannot tell
        if own is None or own.spec() != column.spec():
            is_now = "no such column" if own is None else f"{own.text} there"
            raise SchemaMismatch(
                f"{path}: column {column.name!r} is {column.text}, and the dataset has {is_now}: "
                "register it as a dataset of its own, or import it with append=True"
            )
    lacking = [name for name, column in there.items() if not column.nullable]
    if lacking:
        raise SchemaMismatch(
            f"{path} has no {', '.join(map(repr, lacking))}, which the dataset has: import it with "
            "these columns, or drop them from the dataset first"
        )
    return wanted


def _fitting(found: datasets_pb2.Origin, wanted: Schema | None) -> Schema:
    """The schema of the dataset, which is that of its first file; SchemaMismatch for a file that
    cannot be read with it as it lies."""
    import pyarrow as pa

    from forebay.dataset.schema import Schema

    schema = pa.ipc.read_schema(pa.py_buffer(found.schema))
    if found.has_dictionaries:
        raise SchemaMismatch(
            f"{found.url} has dictionary-encoded columns, which cannot be read in place: import it "
            "(forebay dataset import), or write it with plain columns"
        )
    ours = Schema.from_arrow(schema)
    for column, there in zip(ours.columns, schema, strict=True):
        if _layout(column.arrow_type) != _layout(there.type):
            raise SchemaMismatch(
                f"{found.url}, column {column.name!r}: {there.type} cannot be read in place; "
                f"write it as {column.arrow_type}, or import the file (forebay dataset import)"
            )
    _check_same(found.url, ours, wanted)
    return ours if wanted is None else wanted


def _check_same(url: str, ours: Schema, wanted: Schema | None) -> None:
    if wanted is not None and not (wanted.accepts(ours) and wanted.names == ours.names):
        raise SchemaMismatch(
            f"{url} has other columns ({ours}) than the dataset ({wanted}): register it as "
            "another one"
        )


def _layout(kind: Any) -> Any:
    """How values of an Arrow type lie in memory."""
    import pyarrow as pa

    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.storage_type
    if pa.types.is_fixed_size_list(kind):
        return "fixed", kind.list_size, kind.value_type
    if pa.types.is_list(kind):
        return "list", kind.value_type
    return kind
