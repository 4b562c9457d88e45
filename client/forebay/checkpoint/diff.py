"""How two generations differ, tensor by tensor: from fingerprints, or (exactly) from their bytes.

Needs no torch. Fingerprints say without reading data whether a tensor is unchanged (exactly, by
digest) and about how far it moved (see ``forebay_wire.fingerprint``); the sketches compare only
where both generations have the tensor in the same boxes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from forebay.checkpoint.contents import Contents, TensorInfo
from forebay.checkpoint.tensor_bytes import TensorReader, blocks, raw_bytes
from forebay_wire.dtypes import Floats, kind_of
from forebay_wire.fingerprint import Fingerprint, change, combine, relative
from forebay_wire.manifest import PackRef

Fingerprints = Mapping[int, Sequence[Fingerprint]]
"""Rank to those of its pack's tensors, in the order of the description."""
Progress = Callable[[int, int], object]

UNCHANGED = "unchanged"
CHANGED = "changed"
ADDED = "only in B"
REMOVED = "only in A"
RETYPED = "other dtype"
RESHAPED = "other shape"
UNKNOWN = "not known"


@dataclass(frozen=True)
class Side:
    """One of the two tensors."""

    dtype: str
    shape: tuple[int, ...]
    norm: float | None = None
    num_nan: int | None = None
    num_inf: int | None = None


@dataclass(frozen=True)
class TensorChange:
    """What became of one tensor from A to B."""

    name: str
    status: str
    a: Side | None
    b: Side | None
    relative_change: float | None = None
    """Norm of the difference over the norm in A; None: not known."""
    difference_norm: float | None = None
    max_abs: float | None = None
    """Largest difference of two elements; only where the bytes were read."""
    is_exact: bool = True
    """False: an estimate."""
    note: str = ""


@dataclass(frozen=True)
class Diff:
    """All tensors of both, the furthest apart first, and what else differs."""

    tensors: list[TensorChange]
    objects: dict[str, str] = field(default_factory=dict)
    """Name of what is no tensor to what became of it; unchanged ones are left out."""

    @property
    def is_equal(self) -> bool:
        return not self.objects and all(one.status == UNCHANGED for one in self.tensors)


def compare(
    a: Contents,
    b: Contents,
    fingerprints_a: Fingerprints | None,
    fingerprints_b: Fingerprints | None,
) -> Diff:
    """From fingerprints; None: not known."""

    def one(name: str) -> TensorChange:
        side_a = _side(a.tensors.get(name), fingerprints_a)
        side_b = _side(b.tensors.get(name), fingerprints_b)
        status = _structure(side_a, side_b)
        found = TensorChange(name, status or UNKNOWN, side_a, side_b)
        if status is not None:
            return found
        if fingerprints_a is None or fingerprints_b is None:
            return replace(found, note="no fingerprints: --exact reads it")
        parts_a, parts_b = a.tensors[name].parts, b.tensors[name].parts
        if [part.box for part in parts_a] != [part.box for part in parts_b]:
            return replace(found, note="sharded otherwise: --exact reads it")
        pairs = [
            (fingerprints_a[one.rank][one.index], fingerprints_b[other.rank][other.index])
            for one, other in zip(parts_a, parts_b, strict=True)
        ]
        moved = change([one for one, _ in pairs], [other for _, other in pairs])
        if moved is None:
            return replace(found, note="it changed, how far is not known: --exact reads it")
        return replace(
            found,
            status=UNCHANGED if _are_equal(pairs) else CHANGED,
            relative_change=moved.relative,
            difference_norm=moved.norm,
            is_exact=moved.is_exact,
        )

    return _sorted([one(name) for name in _names(a, b)], dict(_objects(a, b)))


def _are_equal(pairs: Sequence[tuple[Fingerprint, Fingerprint]]) -> bool:
    """Bit by bit: what moved by nothing may still be another NaN, or a minus zero."""
    return all(one.digest == other.digest for one, other in pairs)


def compare_exactly(
    a: TensorReader, b: TensorReader, progress: Progress = lambda done, total: None
) -> Diff:
    """By reading both; memory is a few blocks, whatever the sharding.

    *progress* is told how many bytes are done, and of how many.
    """
    names = _names(a.contents, b.contents)
    shared = [name for name in names if name in a.contents.tensors and name in b.contents.tensors]
    total = sum(a.contents.tensors[name].num_bytes for name in shared)
    found, done = [], 0
    for name in names:
        info_a, info_b = a.contents.tensors.get(name), b.contents.tensors.get(name)
        status = _structure(_side(info_a, None), _side(info_b, None))
        if info_a is None or info_b is None or status == RESHAPED:
            found.append(
                TensorChange(name, status or UNKNOWN, _side(info_a, None), _side(info_b, None))
            )
        else:
            found.append(_read_both(a, info_a, b, info_b, status))
        if info_a is not None and info_b is not None:
            done += info_a.num_bytes
            progress(done, total)
    objects = dict(_objects(a.contents, b.contents, lambda *one: _same_bytes(a, b, *one)))
    return _sorted(found, objects)


@dataclass
class _Sum:
    """Figures that add up block by block."""

    norm: float = 0.0
    num_nan: int = 0
    num_inf: int = 0

    def add(self, values: Floats) -> None:
        finite = np.isfinite(values)
        num_nan = int(np.count_nonzero(np.isnan(values)))
        self.num_nan += num_nan
        self.num_inf += int(values.size - np.count_nonzero(finite)) - num_nan
        self.norm = math.hypot(self.norm, _norm(values[finite]))

    def side(self, info: TensorInfo) -> Side:
        return Side(info.dtype, info.shape, self.norm, self.num_nan, self.num_inf)


def _read_both(
    a: TensorReader, info_a: TensorInfo, b: TensorReader, info_b: TensorInfo, status: str | None
) -> TensorChange:
    kind_a, kind_b = kind_of(info_a.dtype), kind_of(info_b.dtype)
    comparable = (
        kind_a is not None
        and kind_b is not None
        and kind_a.values_per_item == kind_b.values_per_item
    )
    sum_a, sum_b, norm, largest, is_equal = _Sum(), _Sum(), 0.0, 0.0, status is None
    for block in blocks(info_a.shape, max(info_a.item_bytes, info_b.item_bytes)):
        raw_a, raw_b = (
            np.frombuffer(raw_bytes(reader.read(info, block)), np.uint8)
            for reader, info in ((a, info_a), (b, info_b))
        )
        same = info_a.dtype == info_b.dtype and np.array_equal(raw_a, raw_b)
        is_equal &= same
        if kind_a is None or kind_b is None or not comparable:
            continue
        values_a = kind_a.decode(raw_a)
        values_b = values_a if same else kind_b.decode(raw_b)
        sum_a.add(values_a)
        sum_b.add(values_b)
        if not same:
            apart = _difference(values_a, values_b)
            norm = math.hypot(norm, _norm(apart))
            largest = max(largest, float(np.abs(apart).max(initial=0.0)))
    found = TensorChange(
        info_a.name,
        status or (UNCHANGED if is_equal else CHANGED),
        sum_a.side(info_a),
        sum_b.side(info_b),
    )
    if not comparable:
        sides = Side(info_a.dtype, info_a.shape), Side(info_b.dtype, info_b.shape)
        return replace(found, a=sides[0], b=sides[1], note="values of this dtype are not known")
    return replace(
        found,
        relative_change=relative(norm, sum_a.norm),
        difference_norm=norm,
        max_abs=largest,
    )


def _difference(a: Floats, b: Floats) -> Floats:
    """b - a in float64: zero where both are NaN or the same infinity, else infinite where one of
    them is not finite."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        found = wide_b - wide_a
    alike = (wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))
    return np.where(alike, 0.0, np.where(np.isnan(found), np.inf, found))


def _norm(values: Floats) -> float:
    if not values.size:
        return 0.0
    largest = float(np.abs(values).max())
    if largest == 0 or math.isinf(largest):
        return largest
    scaled = values.astype(np.float64) / largest
    return largest * math.sqrt(float(np.square(scaled, out=scaled).sum()))


def _names(a: Contents, b: Contents) -> list[str]:
    return list(dict.fromkeys([*a.tensors, *b.tensors]))


def _side(info: TensorInfo | None, fingerprints: Fingerprints | None) -> Side | None:
    if info is None:
        return None
    if fingerprints is None:
        return Side(info.dtype, info.shape)
    whole = combine(fingerprints[part.rank][part.index] for part in info.parts)
    if not whole.has_figures:
        return Side(info.dtype, info.shape)
    return Side(info.dtype, info.shape, whole.norm, whole.num_nan, whole.num_inf)


def _structure(a: Side | None, b: Side | None) -> str | None:
    """What differs before any value does; None: nothing."""
    if a is None or b is None:
        return ADDED if a is None else REMOVED
    if a.shape != b.shape:
        return RESHAPED
    return RETYPED if a.dtype != b.dtype else None


_ORDER = {REMOVED: 0, ADDED: 1, RESHAPED: 2, RETYPED: 3, CHANGED: 4, UNKNOWN: 4, UNCHANGED: 5}


def _sorted(found: list[TensorChange], objects: dict[str, str]) -> Diff:
    def key(one: TensorChange) -> tuple[int, float, str]:
        size = one.relative_change
        return _ORDER[one.status], -(math.inf if size is None else size), one.name

    return Diff(sorted(found, key=key), objects)


Reference = tuple[int, int]
"""Offset and length in a pack."""
SameBytes = Callable[[PackRef, Reference, PackRef, Reference], bool | None]
"""Whether two values that lie in packs are equal; None: not known."""


def _objects(
    a: Contents, b: Contents, same: SameBytes = lambda *_: None
) -> Iterator[tuple[str, str]]:
    """What became of what is no tensor, where it is not unchanged."""
    for name in dict.fromkeys([*a.objects, *b.objects]):
        if name not in a.objects:
            yield name, ADDED
        elif name not in b.objects:
            yield name, REMOVED
        elif (status := _object(*a.objects[name], *b.objects[name], same)) != UNCHANGED:
            yield name, status


def _object(json_a: Any, pack_a: PackRef, json_b: Any, pack_b: PackRef, same: SameBytes) -> str:
    references_a: list[Reference] = []
    references_b: list[Reference] = []
    if _plain(json_a, references_a) != _plain(json_b, references_b):
        return CHANGED
    answers = [
        (pack_a.blob == pack_b.blob and one == other) or same(pack_a, one, pack_b, other)
        for one, other in zip(references_a, references_b, strict=True)
    ]
    if False in answers:
        return CHANGED
    return UNKNOWN if None in answers else UNCHANGED


def _plain(json: Any, references: list[Reference]) -> Any:
    """An encoded value without the places of its bytes in the pack, which go to *references* (see
    ``docs/formats/generation.md``)."""
    if isinstance(json, list):
        return [_plain(one, references) for one in json]
    if not isinstance(json, dict):
        return json
    found = {}
    for key, value in json.items():
        tail = value[-1] if key in ("$array", "$tensor") and isinstance(value, list) else value
        if key in ("$array", "$tensor", "$bytes", "$bytearray") and isinstance(tail, list):
            references.append((tail[0], tail[1]))
            found[key] = [*(value[:-1] if tail is not value else ()), tail[1]]
        else:
            found[key] = _plain(value, references)
    return found


def _same_bytes(
    a: TensorReader, b: TensorReader, pack_a: PackRef, at: Reference, pack_b: PackRef, to: Reference
) -> bool:
    return a.read_bytes(pack_a.rank, *at) == b.read_bytes(pack_b.rank, *to)
