"""The extent list of a blob: which files hold its bytes, with its segment table.

In the object tier every blob has one under its id, so that it can be found, checked and read
without the catalog; in the landing tiers those that share pieces with others have one in a small
file. Byte table: ``docs/formats/blob-extents.md``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from blake3 import blake3

from forebay_server.model.encodings import CODES, NUMBERS, PIECES, RAW, name_of
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import SegmentTable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

MAGIC: Final = b"FBEXTENT"
VERSION: Final = 4
VERSION_WITHOUT_LAYERS: Final = 3
"""Of lists that need no more than that: what is older reads them, too."""
HEADER: Final = struct.Struct("<8sIIIIQ32s")
"""magic, version u32, encoding u32, num_extents u32, reserved u32 (0), table_length u64,
BLAKE3 of everything else (32 bytes)."""
DIGEST_OFFSET: Final = 32

EXTENT: Final = struct.Struct("<QQQQ16sII")
"""blob_offset u64, file_offset u64, num_bytes u64, file_bytes u64, file (16 bytes), encoding u32,
layer u32."""


@dataclass(frozen=True)
class ObjectExtent:
    """A consecutive piece of a blob in one file."""

    blob_offset: int
    file_offset: int
    """Of the plain bytes, where the file is encoded."""
    num_bytes: int
    """Of the blob, however many that are in the file."""
    file_bytes: int
    """Size in bytes of the whole file, for a check that needs no reading."""
    file: str
    """The file's random name (32 hex digits)."""
    encoding: str = RAW
    """How the file as a whole lies there."""
    layer: int = 0
    """0: one of those that cover the blob; above: these bytes are XORed to what those of the layers
    below say of the same range."""


@dataclass(frozen=True)
class ObjectBlob:
    """Where one tier keeps one blob."""

    table: SegmentTable
    extents: tuple[ObjectExtent, ...]
    encoding: str = RAW
    """How the bytes lie: ``pieces``, or that of the one file that holds them all."""

    def encode(self) -> bytes:
        """The bytes that lie under the blob's id."""
        body = b"".join(
            EXTENT.pack(
                one.blob_offset, one.file_offset, one.num_bytes, one.file_bytes,
                bytes.fromhex(one.file), CODES[one.encoding], one.layer,
            )
            for one in self.extents
        )  # fmt: skip
        table = self.table.encoded
        body += table
        code = NUMBERS[self.encoding]
        version = VERSION if self.has_layers else VERSION_WITHOUT_LAYERS
        head = HEADER.pack(MAGIC, version, code, len(self.extents), 0, len(table), bytes(32))
        head = head[:DIGEST_OFFSET]
        return head + blake3(head + body).digest() + body

    @property
    def has_layers(self) -> bool:
        """Whether some of it lies as differences from other segments."""
        return any(one.layer for one in self.extents)

    def single(self, where: str) -> ObjectExtent:
        """The only extent: a whole blob file. :class:`IntegrityError` if it lies in pieces."""
        if self.encoding == PIECES:
            raise IntegrityError(f"blob {self.table.blob_id} lies in pieces ({where})")
        return self.extents[0]

    @classmethod
    def decode(cls, data: Buffer, where: str, blob: str | None) -> ObjectBlob:
        """What *data* says about *blob*, if that is given; :class:`IntegrityError` unless it is
        exactly that."""
        view = memoryview(data).cast("B")
        if len(view) < HEADER.size:
            raise IntegrityError(f"extent list of blob {blob} is cut short ({where})")
        magic, version, code, count, reserved, table_length, digest = HEADER.unpack_from(view)
        if magic != MAGIC or version not in (VERSION, VERSION_WITHOUT_LAYERS) or reserved:
            raise IntegrityError(f"no extent list of version {VERSION} for blob {blob} ({where})")
        body = view[HEADER.size :]
        found = blake3(view[:DIGEST_OFFSET]).update(body).digest()
        if len(body) != count * EXTENT.size + table_length or found != digest:
            raise IntegrityError(
                f"extent list of blob {blob} does not match its digest ({where}); it is damaged"
            )
        encoding = name_of(code)
        if encoding is None:
            raise IntegrityError(
                f"blob {blob} is stored in encoding number {code} ({where}), which this Forebay "
                "does not know: upgrade it"
            )
        table = SegmentTable.decode(body[count * EXTENT.size :], where, blob)
        extents = tuple(
            ObjectExtent(start, offset, length, size, name.hex(), name_of(way) or "unknown", layer)
            for start, offset, length, size, name, way, layer in EXTENT.iter_unpack(
                body[: count * EXTENT.size]
            )
        )
        lowest = sum(one.layer == 0 for one in extents)
        _check_cover(extents[:lowest], encoding, table.total_bytes, blob, where)
        if lowest < len(extents):
            _check_layers(extents[lowest:], version, encoding, table, blob, where)
        return cls(table, extents, encoding)


def _check_cover(
    extents: tuple[ObjectExtent, ...],
    encoding: str,
    total_bytes: int,
    blob: str | None,
    where: str,
) -> None:
    if encoding != PIECES and (len(extents) != 1 or extents[0].file_offset):
        raise IntegrityError(f"extents of blob {blob}: pieces of what is no such list ({where})")
    position = 0
    for one in extents:
        if one.encoding not in CODES or encoding not in (PIECES, one.encoding):
            raise IntegrityError(
                f"extents of blob {blob}: file {one.file} is {one.encoding} ({where}), which this "
                "Forebay does not know there: upgrade it"
            )
        if one.blob_offset != position or _reaches_too_far(one):
            raise IntegrityError(f"extents of blob {blob} leave a gap or reach too far ({where})")
        position += one.num_bytes
    if not extents or position != total_bytes:
        raise IntegrityError(
            f"extents of blob {blob} do not cover its {total_bytes} bytes ({where})"
        )


def _check_layers(
    extents: tuple[ObjectExtent, ...],
    version: int,
    encoding: str,
    table: SegmentTable,
    blob: str | None,
    where: str,
) -> None:
    """*extents*, those behind the ones that cover the blob, are whole segments, each on the layer
    below."""
    offsets = table.offsets
    num_layers = np.ones(table.num_segments, dtype=np.int64)
    is_sound = version == VERSION and encoding == PIECES
    for one in extents:
        start, stop = one.blob_offset, one.blob_offset + one.num_bytes
        first, last = np.searchsorted(offsets, (start, min(stop, table.total_bytes))).tolist()
        is_sound = (
            is_sound
            and first < last
            and (offsets[first], offsets[last]) == (start, stop)
            and bool(np.all(num_layers[first:last] == one.layer))
            and one.encoding in CODES
            and not _reaches_too_far(one)
        )
        num_layers[first:last] += 1
    if not is_sound:
        raise IntegrityError(
            f"extents of blob {blob} do not lie on each other as whole segments ({where}); they "
            "are damaged, or written by a newer Forebay"
        )


def _reaches_too_far(one: ObjectExtent) -> bool:
    return one.encoding == RAW and one.file_offset + one.num_bytes > one.file_bytes
