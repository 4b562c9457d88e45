"""A rank's pack: which bytes of which tensors go where, and the one copy that brings them there."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from forebay.checkpoint.layout import Extent, Layout, padded, place
from forebay.checkpoint.manifest import Description, TensorEntry, check_description, json_bytes
from forebay.checkpoint.objects import EncodedObject, Json, Path, byte_view
from forebay_wire.limits import MIB

PARALLEL_BYTES: Final = 8 * MIB
"""From here on a copy is worth torch's threads: waking them costs milliseconds on a busy machine,
and one core copies this much in less."""


@dataclass(frozen=True)
class Part:
    """A tensor, or this rank's part of one, that goes into the pack."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    tensor: torch.Tensor
    """Plain; any device, any strides."""
    frozen: bool = False

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.dtype.itemsize

    @property
    def memory(self) -> tuple[object, ...]:
        """Equal for two names of one tensor (tied weights), which then is saved once."""
        tensor = self.tensor
        if not tensor.numel():
            return (self.name, self.offsets)
        where = (str(tensor.device), tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
        return (*where, tensor.dtype, tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True)
class Source:
    """Bytes with their place in the pack."""

    offset: int
    num_bytes: int
    data: torch.Tensor | memoryview
    tensors: tuple[torch.Tensor, ...] = ()
    """Those whose bytes these are: names of one tensor, or views that overlap."""
    name: str = ""


@dataclass(frozen=True)
class Pack:
    """A rank's pack before it is copied: nothing here holds a copy of the state."""

    layout: Layout
    sources: Sequence[Source]
    """In pack order."""
    description: bytes

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes

    def copy_into(self, target: memoryview, start: int, stop: int) -> None:
        """Write the pack's bytes [start, stop) to the start of *target*, padding as zeros.

        One copy straight from each tensor, without holding the GIL.
        """
        self.copy_some(target, start, stop, self.sources)

    def copy_some(
        self, target: memoryview, start: int, stop: int, chosen: Collection[Source]
    ) -> None:
        """:meth:`copy_into` without the bytes of sources that are not *chosen*."""
        if start == stop:
            return
        view = torch.frombuffer(target, dtype=torch.uint8, count=stop - start)
        wanted = set(map(id, chosen))
        clean = start
        for source in self.sources:
            end = source.offset + source.num_bytes
            if end <= start or source.offset >= stop:
                continue
            first, last = max(source.offset, start), min(end, stop)
            if first > clean:
                view[clean - start : first - start].zero_()
            if id(source) in wanted:
                part = view[first - start : last - start]
                copy_bytes(part, source, first - source.offset, last - source.offset)
            clean = last
        view[clean - start :].zero_()


def build_pack(
    parts: Sequence[Part],
    objects: Mapping[str, EncodedObject],
    structure: Mapping[str, Path],
) -> Pack:
    """Lay out *parts* and the bytes of *objects*, and describe them."""
    return PackTemplate(parts, structure).pack([part.tensor for part in parts], objects)


@dataclass(frozen=True)
class _Stored:
    """Bytes that are stored once for one part, or for several that share memory."""

    name: tuple[object, ...]
    num_bytes: int
    frozen: bool
    members: tuple[tuple[int, int], ...]
    """(index of the part, bytes from here to its first one)."""


class PackTemplate:
    """Where things go in the packs of states that look alike, worked out once.

    Not thread-safe. Of *parts* it keeps names and places, and no tensor.
    """

    def __init__(self, parts: Sequence[Part], structure: Mapping[str, Path]) -> None:
        self._parts = [replace(part, tensor=_NOTHING) for part in parts]
        self._dtypes_and_sizes = [(p.tensor.dtype, tuple(p.tensor.shape)) for p in parts]
        self._stored = _stored(parts)
        self._structure = dict(structure)
        self._placed: _Placed | None = None
        self.num_layouts = 0
        """How often things had to be laid out: more than once only if objects' sizes changed."""

    def pack(self, tensors: Sequence[torch.Tensor], objects: Mapping[str, EncodedObject]) -> Pack:
        """The pack of *tensors*, in the order of the parts, which look as those did."""
        attachments = [
            (name, number, attachment)
            for name, encoded in objects.items()
            for number, attachment in enumerate(encoded.attachments)
        ]
        key = tuple((name, number, a.data.nbytes) for name, number, a in attachments)
        if self._placed is None or self._placed.key != key:
            self._placed = self._place(key)
        placed = self._placed
        for (_, _, attachment), offset in zip(attachments, placed.attachments, strict=True):
            attachment.reference[0] = offset
        sources = [
            _source(stored, offset, tensors)
            for stored, offset in zip(self._stored, placed.offsets, strict=True)
        ] + [Source(a.reference[0], a.data.nbytes, a.data) for _, _, a in attachments]
        filled = sorted((s for s in sources if s.num_bytes), key=lambda source: source.offset)
        encoded = {name: item.json for name, item in objects.items()}
        return Pack(placed.layout, filled, placed.describe(encoded))

    def _place(self, key: tuple[tuple[str, int, int], ...]) -> _Placed:
        self.num_layouts += 1
        extents = [Extent(s.name, s.num_bytes, s.frozen) for s in self._stored]
        extents += [Extent((1, name, number), size) for name, number, size in key]
        layout = place(extents)
        count = len(self._stored)
        offsets = layout.offsets[:count]
        places = {
            index: offset + delta
            for stored, offset in zip(self._stored, offsets, strict=True)
            for index, delta in stored.members
        }
        entries = [
            TensorEntry(part.name, dtype, part.shape, part.offsets, sizes, places[index])
            for index, (part, (dtype, sizes)) in enumerate(
                zip(self._parts, self._dtypes_and_sizes, strict=True)
            )
        ]
        head, mark, tail = Description(entries, {}, self._structure).encode().partition(_NO_OBJECTS)
        assert mark
        return _Placed(key, layout, offsets, layout.offsets[count:], head, tail)


@dataclass(frozen=True)
class _Placed:
    key: tuple[tuple[str, int, int], ...]
    """Name, number and bytes of each attachment."""
    layout: Layout
    offsets: tuple[int, ...]
    attachments: tuple[int, ...]
    head: bytes
    tail: bytes
    """Of the description, before and after its objects."""

    def describe(self, objects: Mapping[str, Json]) -> bytes:
        """As :meth:`Description.encode`, of the same tensors and other *objects*."""
        return check_description(
            b"".join((self.head, b',"objects":', json_bytes(objects), self.tail))
        )


_NO_OBJECTS: Final = b',"objects":{}'
"""Only the field itself reads so: within a JSON string the quotes would be escaped."""

_NOTHING: Final = torch.empty(0)


def packed_bytes(parts: Iterable[Part]) -> int:
    """Bytes that *parts* take in a pack, padding included."""
    return sum(padded(part.num_bytes) for part in parts)


def shared_memory(parts: Sequence[Part]) -> list[int | None]:
    """For each part a number, the same for those that are stored as one; None: it is by itself."""
    numbers: list[int | None] = [None] * len(parts)
    for number, stored in enumerate(_stored(parts)):
        if len(stored.members) > 1:
            for index, _ in stored.members:
                numbers[index] = number
    return numbers


def _stored(parts: Sequence[Part]) -> list[_Stored]:
    """What to store of *parts*: tied weights once, views that overlap as the bytes of them all."""
    owners: dict[tuple[object, ...], list[int]] = {}
    for index in sorted(range(len(parts)), key=lambda i: (parts[i].name, parts[i].offsets)):
        owners.setdefault(parts[index].memory, []).append(index)
    groups = [(indices, parts[indices[0]]) for indices in owners.values()]
    found: list[_Stored] = []
    for cluster in _overlapping(groups):
        start = min(_address(part) for _, part in cluster)
        stop = max(_address(part) + part.num_bytes for _, part in cluster)
        first = min((part for _, part in cluster), key=lambda p: (p.name, p.offsets))
        members = [(i, _address(part) - start) for indices, part in cluster for i in indices]
        frozen = all(parts[i].frozen for i, _ in members)
        name = (0, first.name, first.offsets)
        found.append(_Stored(name, stop - start, frozen, tuple(members)))
    return found


_Cluster = list[tuple[list[int], Part]]


def _overlapping(groups: _Cluster) -> list[_Cluster]:
    """*groups* of parts that share all their memory, those together that share some of it."""
    alone = [[group] for group in groups if not _is_run(group[1])]
    runs = sorted(
        (group for group in groups if _is_run(group[1])),
        key=lambda group: (_storage(group[1]), _address(group[1])),
    )
    clusters: list[_Cluster] = []
    where, end = None, 0
    for group in runs:
        address = _address(group[1])
        if where == _storage(group[1]) and address < end:
            clusters[-1].append(group)
            end = max(end, address + group[1].num_bytes)
        else:
            clusters.append([group])
            where, end = _storage(group[1]), address + group[1].num_bytes
    return alone + clusters


def _is_run(part: Part) -> bool:
    """Whether the part's bytes lie in memory as they are stored."""
    tensor = part.tensor
    bent = tensor.is_conj() or tensor.is_neg()
    return bool(tensor.numel()) and tensor.is_contiguous() and not bent


def _storage(part: Part) -> tuple[str, int]:
    return str(part.tensor.device), part.tensor.untyped_storage().data_ptr()


def _address(part: Part) -> int:
    return part.tensor.data_ptr()


def _source(stored: _Stored, offset: int, tensors: Sequence[torch.Tensor]) -> Source:
    members = tuple(tensors[index] for index, _ in stored.members)
    name = str(stored.name[1])
    return Source(offset, stored.num_bytes, _bytes_of(stored, tensors), members, name)


def _bytes_of(stored: _Stored, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor whose bytes are stored: a part's own, or all bytes that several overlap in."""
    index, delta = stored.members[0]
    tensor = tensors[index]
    if tensor.numel() * tensor.dtype.itemsize == stored.num_bytes:
        return tensor
    start = tensor.storage_offset() * tensor.dtype.itemsize - delta
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage(), start, (stored.num_bytes,), (1,))


def copy_bytes(target: torch.Tensor, source: Source, start: int, stop: int) -> None:
    """Copy the bytes [start, stop) of *source* into *target*."""
    if isinstance(source.data, memoryview):
        target.numpy()[:] = source.data[start:stop]
        return
    tensor = source.data.detach()
    bent = tensor.is_conj() or tensor.is_neg()
    if stop - start == source.num_bytes and (bent or not tensor.is_contiguous()):
        # The kernel gathers the strides on its way: still one copy.
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return
    # A piece of a tensor (chunked save) is addressed by bytes, which needs them in a row.
    flat = byte_view(tensor.resolve_conj().resolve_neg().contiguous())
    is_alone = stop - start < PARALLEL_BYTES or torch.get_num_threads() == 1
    if flat.device.type == "cpu" and is_alone:
        # Not by numpy(): that would leave the storage unable to be resized for ever.
        ctypes.memmove(target.data_ptr(), flat.data_ptr() + start, stop - start)
    else:
        target.copy_(flat[start:stop])
