"""Opens a blob that lies in pieces of local files: one descriptor for each."""

from __future__ import annotations

import contextlib
import os

from forebay_server.model.encodings import RAW
from forebay_server.model.extents import EXTENT, HEADER, ObjectBlob
from forebay_server.serve.opened import OpenedBlob
from forebay_server.serve.promote import Place
from forebay_server.tier.store import Tier
from forebay_wire.errors import IntegrityError


def open_pieces(tier: Tier, place: Place) -> OpenedBlob:
    """The blob at *place* in *tier*, with its list proven and all files there, of their sizes."""
    descriptors: list[int] = []
    with contextlib.ExitStack() as undo:
        reader = tier.read(tier.blob_name(place.file))
        undo.callback(reader.close)
        data = bytearray(reader.size_bytes)
        reader.read_into(0, data)
        found = ObjectBlob.decode(data, reader.where, place.blob)
        numbers: dict[str, int] = {}
        for one in found.extents:
            if one.file in numbers:
                continue
            source = tier.read(tier.blob_name(one.file))
            undo.callback(source.close)
            if source.size_bytes != one.file_bytes or one.encoding != RAW or one.layer:
                raise IntegrityError(
                    f"blob {place.blob} has a piece in a file of {source.size_bytes} bytes instead "
                    f"of {one.file_bytes} ({source.where}); it is damaged"
                )
            numbers[one.file] = len(descriptors)
            descriptors.append(source.detach())
            undo.callback(os.close, descriptors[-1])
        table = reader.detach()
        undo.pop_all()
    return OpenedBlob(
        blob=place.blob,
        length=place.num_bytes,
        tier=place.tier,
        fd=descriptors[0],
        table_offset=HEADER.size + len(found.extents) * EXTENT.size,
        table_length=len(found.table.encoded),
        table_fd=table,
        more_fds=tuple(descriptors[1:]),
        pieces=tuple(
            (one.blob_offset, numbers[one.file], one.file_offset, one.num_bytes)
            for one in found.extents
        ),
    )
