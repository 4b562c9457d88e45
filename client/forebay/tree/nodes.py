"""What the tree is made of. Everything here is immutable: it follows from one manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from blake3 import blake3


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one blob (or origin)."""

    blob: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that is no run of its bytes: the elements [offsets, offsets + sizes)."""

    piece: Piece
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """A file that is the concatenation of *pieces*; none of them is empty."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Boxes:
    """A file that is a tensor of *shape*, row-major, put together from parts that interleave."""

    shape: tuple[int, ...]
    item_bytes: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A file that is a few bytes of a manifest."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ManifestText:
    """A file that is the JSON of a whole manifest."""

    manifest: str


Content = Pieces | Boxes | Text | ManifestText


@dataclass(frozen=True, slots=True)
class File:
    """One file."""

    num_bytes: int
    key: str
    """64 hexadecimal digits: equal keys, equal bytes."""
    content: Content
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What is known about it beside its size: for people, and for readers of raw tensors."""


Folder = dict[str, "File | Folder"]


def blob_file(blob: str, num_bytes: int, notes: Mapping[str, Any]) -> File:
    """All of a blob."""
    pieces = (Piece(blob, 0, num_bytes),) if num_bytes else ()
    return File(num_bytes, blob, Pieces(pieces), {"blob": blob, **notes})


def pieces_file(pieces: Sequence[Piece], notes: Mapping[str, Any]) -> File:
    """The concatenation of *pieces*."""
    used = tuple(piece for piece in pieces if piece.num_bytes)
    key = _key([[piece.blob, piece.offset, piece.num_bytes] for piece in used])
    return File(sum(piece.num_bytes for piece in used), key, Pieces(used), notes)


def boxes_file(
    shape: tuple[int, ...], item_bytes: int, boxes: Sequence[Box], notes: Mapping[str, Any]
) -> File:
    """A tensor whose parts, which cover it exactly once, interleave."""
    parts = [
        [box.piece.blob, box.piece.offset, box.piece.num_bytes, box.offsets, box.sizes]
        for box in boxes
    ]
    num_bytes = sum(box.piece.num_bytes for box in boxes)
    content = Boxes(shape, item_bytes, tuple(boxes))
    return File(num_bytes, _key([shape, item_bytes, parts]), content, notes)


def text_file(data: bytes, notes: Mapping[str, Any]) -> File:
    """The bytes themselves."""
    return File(len(data), blake3(data).hexdigest(), Text(data), notes)


def manifest_file(manifest: str, num_bytes: int) -> File:
    """The JSON of a manifest of that id."""
    return File(num_bytes, manifest, ManifestText(manifest))


def file_name(key: str | int) -> str:
    """*key* as the name of a file or folder: what has a meaning in paths or patterns is escaped."""
    text = quote(str(key), safe=" +,=@", errors="surrogatepass")
    return {"": "%", ".": "%2E", "..": "%2E%2E"}.get(text, text)


def put(root: Folder, names: Sequence[str], file: File) -> None:
    """Hang *file* into *root*; where something has its name already it gets a number."""
    folder = root
    for name in names[:-1]:
        folder = _folder(folder, name)
    folder[_numbered(folder, names[-1])] = file


def _folder(parent: Folder, wanted: str) -> Folder:
    name, number = wanted, 2
    while isinstance(found := parent.setdefault(name, {}), File):
        name, number = f"{wanted}~{number}", number + 1
    return found


def _numbered(parent: Folder, wanted: str) -> str:
    name, number = wanted, 2
    while name in parent:
        name, number = f"{wanted}~{number}", number + 1
    return name


def _key(value: Any) -> str:
    return blake3(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
