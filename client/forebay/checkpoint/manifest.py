"""What a rank says about its pack, as JSON, and what all ranks' words mean to torch's planners."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem

from forebay.checkpoint.objects import (
    INLINE_BYTES,
    EncodedObject,
    Json,
    Path,
    decode,
    dotted,
    dtype_name,
    dtype_of,
)
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound, UnsupportedObject
from forebay_wire.limits import MAX_DESCRIPTION_BYTES, MAX_TENSORS_PER_PACK, check_limit
from forebay_wire.manifest import GenerationManifest, PackRef

FORMAT: Final = 1
"""Version of the description; a reader refuses a newer one."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor, or the part of it that one rank had, and where it lies in that rank's pack."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of this part: the box [offsets, offsets + sizes)."""
    pack_offset: int
    """Bytes from the start of the pack; the part lies there row-major."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def encode(self) -> Json:
        entry: dict[str, Any] = {
            "name": self.name,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
            "at": [self.pack_offset, self.num_bytes],
        }
        if self.sizes != self.shape:
            entry["offsets"] = list(self.offsets)
            entry["sizes"] = list(self.sizes)
        return entry

    @classmethod
    def decode(cls, entry: Mapping[str, Any], pack: PackRef) -> TensorEntry:
        shape = tuple(entry["shape"])
        found = cls(
            entry["name"],
            dtype_of(entry["dtype"]),
            shape,
            tuple(entry.get("offsets", [0] * len(shape))),
            tuple(entry.get("sizes", shape)),
            entry["at"][0],
        )
        end = found.pack_offset + found.num_bytes
        if found.num_bytes != entry["at"][1] or not 0 <= found.pack_offset <= end <= pack.num_bytes:
            raise IntegrityError(
                f"tensor {found.name} of rank {pack.rank} does not fit its pack of "
                f"{pack.num_bytes} bytes; the description is damaged"
            )
        return found


def json_bytes(value: Any) -> bytes:
    """As it stands in a description: compact, UTF-8."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def check_description(data: bytes) -> bytes:
    """*data* if a pack may have so long a description."""
    check_limit(
        "bytes of a pack's description",
        len(data),
        MAX_DESCRIPTION_BYTES,
        "keep large values as tensors, arrays or bytes, which lie in the pack",
    )
    return data


@dataclass(frozen=True)
class Description:
    """Everything that is in one rank's pack."""

    tensors: Sequence[TensorEntry]
    objects: Mapping[str, Json]
    structure: Mapping[str, Path] = field(default_factory=dict)
    """Name to path of every item of *all* ranks; only rank 0 has it."""
    properties: Mapping[str, Json] = field(default_factory=dict)
    """What torch's metadata says of tensors, where that is not the usual."""
    planner_data: Json = None
    """What a planner keeps that is no structure, encoded."""
    is_separate: bool = False
    """Whether this pack alone is the state of its rank."""

    def encode(self) -> bytes:
        """UTF-8 JSON, at most ``MAX_DESCRIPTION_BYTES``."""
        check_limit("tensors of a pack", len(self.tensors), MAX_TENSORS_PER_PACK, "use more ranks")
        body: dict[str, Any] = {
            "format": FORMAT,
            "tensors": [entry.encode() for entry in self.tensors],
            "objects": dict(self.objects),
        }
        if self.structure:
            body["structure"] = [encode_place(name, path) for name, path in self.structure.items()]
        return check_description(json_bytes(body))

    @classmethod
    def decode(cls, pack: PackRef) -> Description:
        """The description in *pack*; :class:`IntegrityError` if it does not describe that pack."""
        body = pack.description
        version = body.get("format")
        if version != FORMAT:
            raise IntegrityError(
                f"pack of rank {pack.rank} has description format {version!r}, this client reads "
                f"{FORMAT}: upgrade Forebay (pip install -U forebay)"
            )
        try:
            return cls(
                [TensorEntry.decode(entry, pack) for entry in body["tensors"]],
                body["objects"],
                dict(decode_place(place) for place in body.get("structure", [])),
                body.get("properties", {}),
                body.get("planner_data"),
                body.get("separate", False),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise IntegrityError(
                f"description of rank {pack.rank}'s pack lacks or bends a field: {error!r}"
            ) from error


def extra_of(
    items: Sequence[WriteItem], planner_data: EncodedObject | None, *, is_separate: bool
) -> dict[str, Json]:
    """What a description holds only if torch's functions save, and only if it is unusual."""
    properties = {}
    for item in items:
        if item.tensor_data is not None:
            found = item.tensor_data.properties
            said = [found.requires_grad, str(found.memory_format), found.pin_memory]
            if said != _USUAL:
                properties[item.index.fqn] = said
    extra: dict[str, Json] = {"properties": properties} if properties else {}
    if planner_data is not None:
        if planner_data.attachments:
            raise UnsupportedObject(
                f"planner_data has values above {INLINE_BYTES} bytes: keep them in the state"
            )
        extra["planner_data"] = planner_data.json
    if is_separate:
        extra["separate"] = True
    return extra


_USUAL: Final = [False, str(torch.contiguous_format), False]


def with_extra(description: bytes, extra: Mapping[str, Json]) -> bytes:
    """An encoded description with more keys."""
    body = {**json.loads(description), **extra}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _properties(dtype: torch.dtype, said: Json) -> TensorProperties:
    if said is None:
        return TensorProperties(dtype=dtype)
    requires_grad, memory_format, pin_memory = said
    return TensorProperties(
        dtype=dtype,
        requires_grad=bool(requires_grad),
        memory_format=getattr(torch, memory_format.removeprefix("torch.")),
        pin_memory=bool(pin_memory),
    )


def encode_place(name: str, path: Path) -> Json:
    """A path as JSON; its name only where it does not follow from the path."""
    return list(path) if name == dotted(path) else {"name": name, "path": list(path)}


def decode_place(place: Json) -> tuple[str, Path]:
    """The inverse of :func:`encode_place`."""
    if isinstance(place, list):
        return dotted(place), tuple(place)
    return place["name"], tuple(place["path"])


@dataclass(frozen=True)
class StoredObject:
    """An encoded object and the pack that holds what did not fit into its JSON."""

    json: Json
    pack: PackRef


@dataclass(frozen=True)
class StoredTensor:
    """One saved part of a tensor and the pack that holds it."""

    entry: TensorEntry
    pack: PackRef


@dataclass(frozen=True)
class SavedState:
    """All that a generation holds, as torch's planners and our restore need it."""

    manifest: GenerationManifest
    metadata: Metadata
    """Sizes, dtypes and parts of all tensors; ``planner_data`` is the structure."""
    parts: Mapping[MetadataIndex, StoredTensor]
    objects: Mapping[str, StoredObject]
    structure: Mapping[str, Path]

    def memory_of(self, name: str) -> object | None:
        """Equal for two names of one tensor; None for a tensor without elements."""
        item = self.metadata.state_dict_metadata[name]
        if not isinstance(item, TensorStorageMetadata) or not math.prod(item.size):
            return None
        found: list[object] = [item.properties.dtype, tuple(item.size)]
        for chunk in item.chunks:
            stored = self.parts[MetadataIndex(name, chunk.offsets)]
            found.append((tuple(chunk.offsets), stored.pack.rank, stored.entry.pack_offset))
        return tuple(found)

    @staticmethod
    def is_separate(manifest: GenerationManifest) -> bool:
        """Whether each rank's pack is a state of its own."""
        return any(pack.description.get("separate", False) for pack in manifest.packs)

    @classmethod
    def of(cls, manifest: GenerationManifest, rank: int | None = None) -> SavedState:
        """The state that all packs make together; with *rank*, that of its pack alone.

        Raises :class:`IntegrityError` if the ranks' descriptions contradict each other.
        """
        tensors: dict[str, TensorStorageMetadata] = {}
        parts: dict[MetadataIndex, StoredTensor] = {}
        objects: dict[str, StoredObject] = {}
        structure: dict[str, Path] = {}
        planner_data: Json = None
        for pack, description in _descriptions(manifest, rank):
            structure.update(description.structure)
            planner_data = description.planner_data or planner_data
            for name, encoded in description.objects.items():
                objects.setdefault(name, StoredObject(encoded, pack))
            for entry in description.tensors:
                index = MetadataIndex(entry.name, entry.offsets)
                if index in parts and parts[index].entry.sizes == entry.sizes:
                    continue  # a planner that lets several ranks save the same
                _add_part(tensors, entry, description.properties.get(entry.name))
                parts[index] = StoredTensor(entry, pack)
        for name, whole in tensors.items():
            _check_complete(name, whole)
        metadata = Metadata(
            state_dict_metadata={**tensors, **{name: BytesStorageMetadata() for name in objects}},
            planner_data=structure if planner_data is None else decode(planner_data, _no_bytes, {}),
        )
        return cls(manifest, metadata, parts, objects, structure)


def _descriptions(
    manifest: GenerationManifest, rank: int | None
) -> Iterator[tuple[PackRef, Description]]:
    generation = f"generation {manifest.run}@{manifest.attempt}/{manifest.step}"
    for pack in manifest.packs:
        if rank is not None and pack.rank != rank:
            continue
        description = Description.decode(pack)
        if description.is_separate and rank is None:
            raise InvalidRequest(
                f"{generation} holds {manifest.num_ranks} states, one of each rank, for they were "
                "saved with use_collectives=False: load it with as many ranks"
            )
        yield pack, description
    if rank is not None and all(pack.rank != rank for pack in manifest.packs):
        raise NotFound(f"{generation} has no rank {rank}, only {manifest.num_ranks} ranks")


def _no_bytes(offset: int, num_bytes: int) -> bytes:
    raise IntegrityError("planner_data refers to bytes that it cannot have")


def _add_part(tensors: dict[str, TensorStorageMetadata], entry: TensorEntry, said: Json) -> None:
    whole = tensors.setdefault(
        entry.name,
        TensorStorageMetadata(_properties(entry.dtype, said), torch.Size(entry.shape), []),
    )
    if (whole.size, whole.properties.dtype) != (torch.Size(entry.shape), entry.dtype):
        raise IntegrityError(f"ranks disagree about shape or dtype of {entry.name}")
    whole.chunks.append(ChunkStorageMetadata(torch.Size(entry.offsets), torch.Size(entry.sizes)))


def _check_complete(name: str, whole: TensorStorageMetadata) -> None:
    covered = sum(math.prod(chunk.sizes) for chunk in whole.chunks)
    if covered != math.prod(whole.size):
        raise IntegrityError(
            f"{name} has {math.prod(whole.size)} elements and the packs hold {covered} of them"
        )
