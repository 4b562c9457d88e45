"""Manifests: the list of blobs that makes one version of something, and its canonical bytes.

A manifest is a frame (magic, version, kind, length, digest, stamp) around canonical JSON, so that
it can be read with any tool and checked with one digest. Its id is that digest: BLAKE3 under a
domain key. The stamp says when it was committed; it is no part of the id, so that equal content has
an equal id, and with it equal orders and splits, whenever it is written. Byte table:
``docs/formats/manifest.md``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from blake3 import blake3

from forebay_wire.errors import IntegrityError, InvalidRequest
from forebay_wire.limits import (
    MAX_MANIFEST_BYTES,
    MAX_RANKS,
    MAX_SHARDS_PER_VERSION,
    check_limit,
)
from forebay_wire.segments import MANIFEST_KEY, xxh3

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

MAGIC: Final = b"FBMANIF1"
HEAD: Final = struct.Struct("<8sIIQ32sQQ")
"""magic, version u32, kind u32, payload length u64, BLAKE3 of kind and payload (32 bytes), begun_ns
u64, committed_ns u64."""
CHECK: Final = struct.Struct("<Q")
"""XXH3-64 of the head, behind it."""
FRAME_BYTES: Final = HEAD.size + CHECK.size

VERSION: Final = 2
ORIGIN_KEY: Final = blake3(b"forebay origin id, domain key, version 1").digest()

KIND_DATASET: Final = 1
KIND_SELECTION: Final = 2
KIND_GENERATION: Final = 3
KIND_STATISTICS: Final = 4
KIND_RUN_NOTES: Final = 5
"""No manifest: what people said about a run, framed alike."""


@dataclass(frozen=True)
class Stamp:
    """When a manifest came to be, in Unix nanoseconds that one catalog gives out but once and only
    upwards: of two stamps of one catalog the larger one is later, whatever the clocks did."""

    begun_ns: int = 0
    """When the first manifest of its dataset or run was committed: tells a dataset or run from an
    earlier one of the same name, which was deleted."""
    committed_ns: int = 0


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no white space and no NaN: equal values, equal bytes."""
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a manifest cannot hold this value: {error}") from error
    return text.encode()


def _digest(kind: int, payload: bytes) -> bytes:
    return blake3(struct.pack("<I", kind) + payload, key=MANIFEST_KEY).digest()


def encode(kind: int, payload: Mapping[str, Any]) -> tuple[str, bytes]:
    """``(manifest id in hex, the manifest's bytes)`` of a JSON-able *payload*; not yet stamped."""
    body = canonical_json(payload)
    check_limit("manifest bytes", len(body), MAX_MANIFEST_BYTES, "use fewer shards or tensors")
    digest = _digest(kind, body)
    return digest.hex(), _head(kind, len(body), digest, Stamp()) + body


def _head(kind: int, length: int, digest: bytes, stamp: Stamp) -> bytes:
    head = HEAD.pack(MAGIC, VERSION, kind, length, digest, stamp.begun_ns, stamp.committed_ns)
    return head + CHECK.pack(xxh3(head))


def put_stamp(data: bytes, stamp: Stamp) -> bytes:
    """The same manifest, stamped."""
    _, _, kind, length, digest, _, _ = HEAD.unpack_from(data)
    return _head(kind, length, digest, stamp) + data[FRAME_BYTES:]


def read_stamp(data: Buffer) -> Stamp:
    """The stamp of a manifest that :func:`decode` has verified."""
    return Stamp(*HEAD.unpack_from(data)[5:])


def decode(data: Buffer, where: str, manifest_id: str | None = None) -> tuple[int, dict[str, Any]]:
    """``(kind, payload)`` of a manifest's bytes; with *manifest_id*, proven to be that manifest.

    Raises :class:`IntegrityError` for anything that is not exactly what was written.
    """
    raw = bytes(data)
    if len(raw) < FRAME_BYTES:
        raise IntegrityError(f"manifest is cut short ({where})")
    magic, version, kind, length, digest, _, _ = HEAD.unpack_from(raw)
    body = raw[FRAME_BYTES:]
    if magic != MAGIC or version != VERSION:
        raise IntegrityError(f"no manifest of version {VERSION} ({where})")
    if CHECK.unpack_from(raw, HEAD.size)[0] != xxh3(raw[: HEAD.size]):
        raise IntegrityError(f"the head of the manifest is damaged ({where})")
    if len(body) != length or _digest(kind, body) != digest:
        raise IntegrityError(f"manifest does not match its digest ({where}); it is damaged")
    if manifest_id is not None and digest.hex() != manifest_id:
        raise IntegrityError(f"this is manifest {digest.hex()}, not {manifest_id} ({where})")
    payload = json.loads(body)
    if not isinstance(payload, dict):
        raise IntegrityError(f"manifest holds no object ({where})")
    return kind, payload


@dataclass(frozen=True)
class OriginRef:
    """A file that the user keeps elsewhere, as it was when it was registered."""

    url: str
    validator: dict[str, str | int]
    """What tells it from a changed one, beside its size: ``etag``, ``mtime_ns`` and ``inode``, or
    ``modified``, whatever the place has."""

    def identity(self, num_bytes: int) -> str:
        """The origin's id in hex: the keyed digest of URL, size and validator."""
        return blake3(
            canonical_json([self.url, num_bytes, self.validator]), key=ORIGIN_KEY
        ).hexdigest()


@dataclass(frozen=True)
class ShardRef:
    """One shard of a dataset version: a file that is one blob, or an origin."""

    blob: str
    """Id of the blob, or of the origin."""
    num_bytes: int
    num_rows: int
    batch_rows: tuple[int, ...]
    """Rows of each record batch, in order; they add up to ``num_rows``."""
    origin: OriginRef | None = None
    """Where the file lies that stands here instead of a blob."""
    format: str = ""
    """Of a file that was not written by Forebay, also after it became a blob: ``parquet``, whose
    row groups are the record batches; empty: an Arrow IPC file."""
    schema: int = 0
    """Which of the version's ``shard_schemas`` its columns are."""

    def payload(self) -> dict[str, Any]:
        """As it stands in a manifest; an origin, a format or a schema only where there is one."""
        value = {**vars(self)}  # of a hundred thousand, asdict would take seconds
        if self.origin is None:
            del value["origin"]
        else:
            value["origin"] = vars(self.origin)
        if not self.format:
            del value["format"]
        if not self.schema:
            del value["schema"]
        return value

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> ShardRef:
        origin = payload.get("origin")
        return cls(
            payload["blob"],
            payload["num_bytes"],
            payload["num_rows"],
            tuple(payload["batch_rows"]),
            None if origin is None else OriginRef(**origin),
            payload.get("format", ""),
            payload.get("schema", 0),
        )


@dataclass(frozen=True)
class LayerRef:
    """Columns that a version added or replaced, without the others: they lie in shards of their
    own, cut where their writer wanted, which have one row for each row of the version then."""

    columns: tuple[str, ...]
    """Those of the version's columns that are read here."""
    schema: str
    """Of its shards, like that of a version; may have columns that are not read any more."""
    shards: tuple[ShardRef, ...]
    num_base_shards: int
    """It stands beside the first so many shards of the version. Those after them were appended
    later, and have its columns themselves."""

    def payload(self) -> dict[str, Any]:
        return {**vars(self), "shards": [shard.payload() for shard in self.shards]}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> LayerRef:
        shards = tuple(ShardRef.from_payload(shard) for shard in payload["shards"])
        return cls(**{**payload, "columns": tuple(payload["columns"]), "shards": shards})


@dataclass(frozen=True)
class ColumnShards:
    """The shards that some columns of a version are read from: one row for each row of it."""

    shards: tuple[ShardRef, ...]
    num_own: int
    """The first so many are those of a layer, whose schema is ``own_schema``."""
    own_schema: str
    schemas: tuple[str, ...]

    def schema_of(self, number: int) -> str:
        """The schema that shard *number* was written with."""
        if number < self.num_own:
            return self.own_schema
        return self.schemas[self.shards[number].schema]


@dataclass(frozen=True)
class DatasetManifest:
    """An immutable version of a dataset. Row r of the version is row r - start of its shard."""

    dataset: str
    version: int
    parent: str | None
    """Manifest id of the version it was appended to."""
    schema: str
    """The Arrow schema, serialised (IPC) and base64-encoded, with the sample schema as metadata."""
    shards: tuple[ShardRef, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    shard_schemas: tuple[str, ...] = ()
    """What the shards were written with, where that is not ``schema`` for all: each names one by
    its number, which stays the same in later versions."""
    layers: tuple[LayerRef, ...] = ()
    """Columns that lie in shards of their own; the others lie in ``shards``."""
    rows_of: str = ""
    """Manifest id of the first version that had these rows; empty: this one. Splits and folds are
    shares of that one's order, so that they choose the same rows in all such versions."""

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def every_shard(self) -> Iterator[ShardRef]:
        """Those of the layers too."""
        yield from self.shards
        for layer in self.layers:
            yield from layer.shards

    @property
    def num_shards(self) -> int:
        """Those of layers among them."""
        return len(self.shards) + sum(len(layer.shards) for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """Of all shards, those of layers among them."""
        return sum(shard.num_bytes for shard in self.every_shard())

    def blobs(self) -> list[str]:
        """The blobs among the shards; origins are none."""
        return [shard.blob for shard in self.every_shard() if shard.origin is None]

    def layer_of(self, column: str) -> int | None:
        """The number of the layer that *column* is read from; None: from ``shards``."""
        for number, layer in enumerate(self.layers):
            if column in layer.columns:
                return number
        return None

    def layers_of(self, columns: Iterable[str]) -> list[int | None]:
        """Where *columns* are read from: each of :meth:`column_shards` once, None first."""
        found = {self.layer_of(column) for column in columns}
        return sorted(found, key=lambda one: -1 if one is None else one)

    def column_shards(self, layer: int | None) -> ColumnShards:
        """The shards of the columns of *layer*; None: of those that lie in no layer."""
        schemas = self.shard_schemas or (self.schema,)
        if layer is None:
            return ColumnShards(self.shards, 0, "", schemas)
        own = self.layers[layer]
        shards = own.shards + self.shards[own.num_base_shards :]
        return ColumnShards(shards, len(own.shards), own.schema, schemas)

    def encode(self) -> tuple[str, bytes]:
        check_limit(
            "shards of a version", self.num_shards, MAX_SHARDS_PER_VERSION, "write larger shards"
        )
        payload = {**vars(self), "shards": [shard.payload() for shard in self.shards]}
        payload["layers"] = [layer.payload() for layer in self.layers]
        for name in ("shard_schemas", "layers", "rows_of"):
            if not payload[name]:
                del payload[name]
        return encode(KIND_DATASET, payload)

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> DatasetManifest:
        shards = tuple(ShardRef.from_payload(shard) for shard in payload["shards"])
        return cls(
            payload["dataset"],
            payload["version"],
            payload["parent"],
            payload["schema"],
            shards,
            payload["metadata"],
            tuple(payload.get("shard_schemas", ())),
            tuple(LayerRef.from_payload(layer) for layer in payload.get("layers", ())),
            payload.get("rows_of", ""),
        )


@dataclass(frozen=True)
class SelectionManifest:
    """A named, immutable choice of rows of one version: a split, a fold, a filter, a bucket.

    ``rule`` says how the rows follow from the version (``forebay_wire.selection``). Splits and
    folds are positions of a keyed permutation of all rows: no list of rows is stored or built. Of
    the others the rows lie in blobs.
    """

    dataset: str
    version: int
    dataset_manifest: str
    name: str
    num_rows: int
    rule: dict[str, Any]
    shards: tuple[ShardRef, ...] = ()
    """Row numbers, or runs of them, as Arrow IPC files; of stored selections only."""

    def blobs(self) -> list[str]:
        return [shard.blob for shard in self.shards]

    def encode(self) -> tuple[str, bytes]:
        payload = {**vars(self), "shards": [shard.payload() for shard in self.shards]}
        if not self.shards:
            del payload["shards"]
        return encode(KIND_SELECTION, payload)

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> SelectionManifest:
        shards = tuple(ShardRef.from_payload(shard) for shard in payload.get("shards", ()))
        return cls(**{**payload, "shards": shards})


@dataclass(frozen=True)
class StatisticsManifest:
    """What columns of one version, or of one of its selections, hold: figures that were computed
    once and are kept with it. It names no blob."""

    dataset: str
    version: int
    dataset_manifest: str
    selection_manifest: str
    """Empty: of the whole version."""
    columns: dict[str, Any]
    """Figures of each column; see ``docs/formats/manifest.md``."""

    def blobs(self) -> list[str]:
        return []

    def encode(self) -> tuple[str, bytes]:
        return encode(KIND_STATISTICS, vars(self))

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> StatisticsManifest:
        return cls(**payload)


@dataclass(frozen=True)
class PackRef:
    """The blob of all the bytes that one rank contributes to a generation."""

    rank: int
    blob: str
    num_bytes: int
    description: dict[str, Any]
    """What the rank wrote where; see ``docs/formats/generation.md``."""


@dataclass(frozen=True)
class GenerationManifest:
    """One saved state of a run."""

    run: str
    attempt: int
    step: int
    parent: tuple[int, int] | None
    """(attempt, step) of the generation that the attempt restored."""
    num_ranks: int
    metrics: dict[str, float]
    dataset: dict[str, Any] | None
    """The dataset version that the loader stood on, with its position."""
    packs: tuple[PackRef, ...]
    created_unix: float

    def blobs(self) -> list[str]:
        return [pack.blob for pack in self.packs]

    def encode(self) -> tuple[str, bytes]:
        check_limit("ranks of a generation", self.num_ranks, MAX_RANKS, "use fewer ranks")
        return encode(KIND_GENERATION, asdict(self))

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> GenerationManifest:
        packs = tuple(PackRef(**pack) for pack in payload["packs"])
        parent = payload["parent"]
        return cls(**{**payload, "packs": packs, "parent": tuple(parent) if parent else None})


AnyManifest = DatasetManifest | SelectionManifest | GenerationManifest | StatisticsManifest


def parse(data: Buffer, where: str, manifest_id: str | None = None) -> AnyManifest:
    """The manifest in *data* as the class of its kind, verified as :func:`decode` does."""
    kind, payload = decode(data, where, manifest_id)
    classes: dict[int, type[AnyManifest]] = {
        KIND_DATASET: DatasetManifest,
        KIND_SELECTION: SelectionManifest,
        KIND_GENERATION: GenerationManifest,
        KIND_STATISTICS: StatisticsManifest,
    }
    if kind not in classes:
        raise IntegrityError(f"manifest of unknown kind {kind} ({where}); upgrade Forebay")
    try:
        return classes[kind].from_payload(payload)
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"manifest lacks or adds a field: {error} ({where})") from error
