"""A generation opened to look into: its values are read, and verified, when they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from forebay.checkpoint.choice import near
from forebay.checkpoint.flatten import nest
from forebay.checkpoint.manifest import SavedState
from forebay.checkpoint.objects import decode
from forebay.checkpoint.read import PackReader
from forebay.checkpoint.service import CheckpointService, Client
from forebay_wire.closing import Closing
from forebay_wire.errors import InvalidRequest, NotFound
from forebay_wire.ids import GenerationId

Index = int | slice | Any


def open(
    client: Client,
    run: str,
    selector: str | int = "latest",
    *,
    durability: str = "local",
    timeout: float = 600.0,
) -> Opened:
    """The generation of *run* that *selector* (``latest``, ``STEP``, ``ATTEMPT/STEP``) means.

    Nothing is read but its manifest. *durability* as for ``Checkpointer.restore``. NotFound if
    there is none. Close it, or use it in a ``with``.
    """
    service = CheckpointService(client, run)
    return open_generation(service, named(selector), durability, timeout)


def named(selector: str | int) -> str:
    """*selector* as text; InvalidRequest for one that names nothing."""
    if isinstance(selector, bool) or not isinstance(selector, str | int) or selector == "":
        raise InvalidRequest(
            f"selector {selector!r} names no generation: give 'latest', 'best', a step, "
            "'ATTEMPT/STEP' or a tag"
        )
    return str(selector)


def open_generation(
    service: CheckpointService, selector: str, durability: str, timeout: float
) -> Opened:
    """See :func:`open`."""
    found = service.resolve(selector, durability, (), timeout)
    generation = GenerationId(found.run, found.attempt, found.step)
    saved = SavedState.of(service.manifest(found.manifest, generation))
    return Opened(generation, saved, PackReader(service.transfer, saved, keeps_open=True))


class Opened(Closing, Mapping[str, "LazyTensor"]):
    """Saved name to tensor, none of them read yet. Thread-safe; one read at a time."""

    def __init__(self, generation: GenerationId, saved: SavedState, reader: PackReader) -> None:
        self.generation = generation
        self.manifest = saved.manifest
        self.metrics: Mapping[str, float] = saved.manifest.metrics
        self._saved = saved
        self._reader: PackReader | None = reader
        self._lock = threading.Lock()
        self._tensors = {
            name: LazyTensor(self, name, item.properties.dtype, torch.Size(item.size))
            for name, item in saved.metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            kind = "an object: read it by object()" if name in self._saved.objects else "no tensor"
            raise KeyError(
                f"{name} is {kind} of generation {self.generation}; {near(name, self._tensors)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def objects(self) -> list[str]:
        """The names of what is no tensor: see :meth:`object`."""
        return sorted(self._saved.objects)

    def object(self, name: str) -> Any:
        """The value that was saved as *name*, with the tensors inside it. NotFound."""
        stored = self._saved.objects.get(name)
        if stored is None:
            raise NotFound(
                f"generation {self.generation} has no object {name!r}, only "
                f"{', '.join(self.objects[:20]) or 'tensors'}"
            )
        tensors = _WhenAsked(self)
        return decode(
            stored.json, lambda at, size: self._read_bytes(stored.pack, at, size), tensors
        )

    def state_dict(self, prefix: str = "") -> dict[str | int, Any]:
        """Everything below *prefix* (``"model"``), nested as it was saved; two names of one tensor
        share it again. NotFound if there is nothing below it."""
        start = tuple(prefix.split(".")) if prefix else ()
        shared: dict[object, torch.Tensor] = {}
        values = []
        for name, path in self._saved.structure.items():
            if tuple(map(str, path[: len(start)])) != start or len(path) == len(start):
                continue
            if name not in self._tensors:
                values.append((path[len(start) :], self.object(name)))
                continue
            memory = self._saved.memory_of(name)
            if memory is None or memory not in shared:
                tensor = self._tensors[name].read()
                shared[memory if memory is not None else name] = tensor
            else:
                tensor = shared[memory]
            values.append((path[len(start) :], tensor))
        if start and not values:
            raise NotFound(
                f"generation {self.generation} has nothing below {prefix!r}; "
                f"{near(prefix, self._saved.structure)}"
            )
        return nest(values)

    @property
    def bytes_read(self) -> int:
        """Bytes asked of the packs so far."""
        return self._reader.bytes_read if self._reader is not None else 0

    def close(self) -> None:
        """Let go of it; what was read stays. Idempotent."""
        with self._lock:
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def __repr__(self) -> str:
        return f"<generation {self.generation}: {len(self)} tensors, {len(self.objects)} objects>"

    def _read_box(self, name: str, offsets: list[int], target: torch.Tensor) -> None:
        """Fill *target* with the box of its shape that begins at *offsets*."""
        whole = self._saved.metadata.state_dict_metadata[name]
        assert isinstance(whole, TensorStorageMetadata)
        items = []
        for chunk in whole.chunks:
            first = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            stops = zip(offsets, target.shape, chunk.offsets, chunk.sizes, strict=True)
            last = [min(a + n, b + m) for a, n, b, m in stops]
            lengths = [stop - start for start, stop in zip(first, last, strict=True)]
            if all(length > 0 for length in lengths):
                index = MetadataIndex(name, chunk.offsets)
                at, inside = (
                    torch.Size(start - base for start, base in zip(first, begin, strict=True))
                    for begin in (offsets, chunk.offsets)
                )
                items.append(
                    ReadItem(LoadItemType.TENSOR, index, at, index, inside, torch.Size(lengths))
                )
        with self._lock:
            self._opened().read(items, _Into(target))

    def _read_bytes(self, pack: Any, offset: int, num_bytes: int) -> bytes:
        with self._lock:
            return self._opened().read_bytes(pack, offset, num_bytes)

    def _opened(self) -> PackReader:
        if self._reader is None:
            raise InvalidRequest(f"generation {self.generation} is closed: open it again")
        return self._reader


@dataclass(frozen=True)
class LazyTensor:
    """A saved tensor, whole however many ranks saved it. ``tensor[10:20]`` reads those rows."""

    opened: Opened
    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """All of it: into *out* (same shape and dtype, any device and strides), or a new one."""
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype)
        elif (out.shape, out.dtype) != (self.shape, self.dtype):
            raise InvalidRequest(
                f"{self.name} is {self.dtype}{list(self.shape)}, out= is "
                f"{out.dtype}{list(out.shape)}: nothing is cast"
            )
        self.opened._read_box(self.name, [0] * len(self.shape), out.detach())
        return out

    def __getitem__(self, index: Index) -> torch.Tensor:
        """What torch's indexing with integers, slices and ``...`` gives; only the part between
        the ends of the slices is read."""
        keys = _keys(self.name, index, len(self.shape))
        offsets: list[int] = []
        lengths: list[int] = []
        rest: list[int | slice] = []
        for key, size in zip(keys, self.shape, strict=True):
            if isinstance(key, slice):
                start, stop, step = key.indices(size)
                if step < 1:
                    raise InvalidRequest(f"{self.name}[{index!r}]: steps below 1 are not read")
                offsets.append(min(start, size))
                lengths.append(max(0, stop - start))
                rest.append(slice(None, None, step))
            else:
                at = key + size if key < 0 else key
                if not 0 <= at < size:
                    raise IndexError(f"{self.name}: {key} is outside a dimension of {size}")
                offsets.append(at)
                lengths.append(1)
                rest.append(0)
        box = torch.empty(lengths, dtype=self.dtype)
        if box.numel():
            self.opened._read_box(self.name, offsets, box)
        return box[tuple(rest)]

    def __repr__(self) -> str:
        return f"<{self.name}: {self.dtype}{list(self.shape)}, not read>"


class _Into:
    """As much of a load planner as one box needs."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self._target
        for dimension, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dimension, offset, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


class _WhenAsked(Mapping[str, torch.Tensor]):
    """The tensors inside an object, each read when it is decoded, once."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._read: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._read:
            self._read[name] = self._opened[name].read()
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)


def _keys(name: str, index: Index, num_dimensions: int) -> list[int | slice]:
    keys = list(index) if isinstance(index, tuple) else [index]
    if any(
        isinstance(key, bool) or not isinstance(key, int | slice) for key in keys if key is not ...
    ):
        raise InvalidRequest(f"{name}[{index!r}]: use integers and slices, or read() it all first")
    missing = num_dimensions - sum(key is not ... for key in keys)
    if missing < 0 or sum(key is ... for key in keys) > 1:
        raise IndexError(f"{name} has {num_dimensions} dimensions and not those of [{index!r}]")
    place = next((at for at, key in enumerate(keys) if key is ...), len(keys))
    return [*keys[:place], *[slice(None)] * missing, *keys[place + 1 :]]
