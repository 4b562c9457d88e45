"""What a generation holds, read from its manifest: names, shapes, places; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.manifest import GenerationManifest, PackRef

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, in elements."""


@dataclass(frozen=True)
class TensorPart:
    """The box of a tensor that one rank saved, and where it lies in that rank's pack."""

    box: Box
    rank: int
    index: int
    """Its number among the tensors of the pack's description."""
    pack_offset: int
    num_bytes: int


@dataclass(frozen=True)
class TensorInfo:
    """A whole tensor."""

    name: str
    dtype: str
    """torch's name, without ``torch.``."""
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]
    """By their boxes; they cover it once."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def item_bytes(self) -> int:
        """Of one element; 0 of a tensor without any."""
        return self.num_bytes // self.num_elements if self.num_elements else 0

    @property
    def ranks(self) -> list[int]:
        """Whose packs it lies in."""
        return sorted({part.rank for part in self.parts})

    @property
    def places(self) -> tuple[tuple[int, int, int], ...]:
        """Of two tied tensors the same."""
        return tuple((part.rank, part.pack_offset, part.num_bytes) for part in self.parts)


@dataclass(frozen=True)
class Contents:
    """Everything that is in a generation."""

    manifest: GenerationManifest
    tensors: Mapping[str, TensorInfo]
    """In the order of the ranks' descriptions."""
    objects: Mapping[str, tuple[Any, PackRef]]
    """What is no tensor, encoded, with the pack that holds what did not fit into its JSON."""
    packs: Mapping[int, PackRef] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: GenerationManifest) -> Contents:
        """:class:`IntegrityError` if a description lacks or bends a field, or does not cover what
        it names."""
        found: dict[str, _Collected] = {}
        objects: dict[str, tuple[Any, PackRef]] = {}
        for pack in manifest.packs:
            try:
                # Each rank saved a state of its own, whose names say nothing of the others'.
                before = f"rank{pack.rank}/" if pack.description.get("separate") else ""
                for index, entry in enumerate(pack.description.get("tensors", [])):
                    _collect(found, pack, index, {**entry, "name": before + entry["name"]})
                for name, encoded in pack.description.get("objects", {}).items():
                    objects.setdefault(before + name, (encoded, pack))
            except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
                raise IntegrityError(
                    f"description of rank {pack.rank}'s pack lacks or bends a field: {error!r}"
                ) from error
        tensors = {name: one.info(name) for name, one in found.items()}
        return cls(manifest, tensors, objects, {pack.rank: pack for pack in manifest.packs})

    def tensor(self, name: str) -> TensorInfo:
        """:class:`NotFound` names the closest ones."""
        import difflib

        if name in self.tensors:
            return self.tensors[name]
        close = difflib.get_close_matches(name, self.tensors, n=3, cutoff=0.5)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise NotFound(f"{self.name} has no tensor {name!r}{hint}")

    @property
    def name(self) -> str:
        one = self.manifest
        return f"generation {one.run}@{one.attempt}/{one.step}"

    def at(self, rank: int, start: int, stop: int) -> list[str]:
        """The tensors that have bytes among [start, stop) of a rank's pack."""
        return [
            info.name
            for info in self.tensors.values()
            if any(
                part.rank == rank
                and part.pack_offset < stop
                and start < part.pack_offset + part.num_bytes
                for part in info.parts
            )
        ]

    @property
    def unique_bytes(self) -> int:
        """Of all tensors, tied ones counted once."""
        return sum(
            num_bytes
            for _, _, num_bytes in {place for one in self.tensors.values() for place in one.places}
        )


@dataclass
class Module:
    """A node of the tree of names: what lies below one prefix."""

    name: str
    num_tensors: int = 0
    num_elements: int = 0
    num_bytes: int = 0
    children: dict[str, Module] = field(default_factory=dict)

    def walk(self, depth: int) -> Iterator[tuple[int, Module]]:
        """Level and node of all down to *depth* levels below this one, the largest first."""
        for child in sorted(self.children.values(), key=lambda one: (-one.num_bytes, one.name)):
            yield 0, child
            if depth > 1:
                yield from ((level + 1, one) for level, one in child.walk(depth - 1))


def module_tree(contents: Contents) -> Module:
    """Tensors by the words of their names. Tied ones count as often as they have names."""
    root = Module("")
    for info in contents.tensors.values():
        node = root
        for word in ["", *info.name.split(".")]:
            if word:
                node = node.children.setdefault(word, Module(f"{node.name}.{word}".strip(".")))
            node.num_tensors += 1
            node.num_elements += info.num_elements
            node.num_bytes += info.num_bytes
    return root


@dataclass
class _Collected:
    dtype: str
    shape: tuple[int, ...]
    parts: dict[Box, TensorPart] = field(default_factory=dict)

    def info(self, name: str) -> TensorInfo:
        covered = sum(math.prod(sizes) for _, sizes in self.parts)
        if covered != math.prod(self.shape):
            raise IntegrityError(
                f"{name} has {math.prod(self.shape)} elements and the packs hold {covered} of them"
            )
        parts = tuple(self.parts[box] for box in sorted(self.parts))
        return TensorInfo(name, self.dtype, self.shape, parts)


def _collect(
    found: dict[str, _Collected], pack: PackRef, index: int, entry: Mapping[str, Any]
) -> None:
    shape = tuple(entry["shape"])
    one = found.setdefault(entry["name"], _Collected(entry["dtype"], shape))
    if (one.dtype, one.shape) != (entry["dtype"], shape):
        raise IntegrityError(f"ranks disagree about shape or dtype of {entry['name']}")
    offsets = tuple(entry.get("offsets", (0,) * len(shape)))
    sizes = tuple(entry.get("sizes", shape))
    pack_offset, num_bytes = entry["at"]
    if not 0 <= pack_offset <= pack_offset + num_bytes <= pack.num_bytes:
        raise IntegrityError(
            f"tensor {entry['name']} of rank {pack.rank} does not fit its pack of "
            f"{pack.num_bytes} bytes; the description is damaged"
        )
    box = (offsets, sizes)  # several ranks may have saved the same
    one.parts.setdefault(box, TensorPart(box, pack.rank, index, pack_offset, num_bytes))
