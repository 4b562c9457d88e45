"""The object tier's extent lists: whether one says what the catalog says, and writing it anew."""

from __future__ import annotations

from forebay_server.model.encodings import PIECES
from forebay_server.model.extents import ObjectBlob, ObjectExtent
from forebay_server.move.collect import BLOBS
from forebay_server.tier.encode import open_plain
from forebay_server.tier.store import Tier
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import IntegrityError, NotFound


def list_problem(tier: Tier, blob: str, file: str, encoding: str) -> str:
    """What is wrong with the extent list of a *blob* that the catalog knows to lie in *file*; empty
    if nothing is. Blocks."""
    where = f"tier {tier.name}, file {BLOBS}{blob}"
    try:
        found = ObjectBlob.decode(tier.get(BLOBS + blob), where, blob)
    except (IntegrityError, NotFound) as error:
        return error.message
    files = list(dict.fromkeys(one.file for one in found.extents))
    if encoding == PIECES and found.encoding == PIECES and file in files:
        return ""  # its pieces were just read
    if files != [file] or found.encoding != encoding:
        return f"it names {', '.join(files)} ({found.encoding}), the catalog {file} ({encoding})"
    return ""


def rewrite_list(tier: Tier, blob: str, file: str, encoding: str) -> None:
    """Write the extent list of *blob* anew from its file, of which every byte is checked first.

    Blocks. :class:`IntegrityError` or :class:`NotFound` if the file is no good: nothing is changed
    then.
    """
    if encoding == PIECES:
        raise IntegrityError(f"the list of blob {blob} is lost, and with it where its pieces lie")
    stored_bytes = tier.head(tier.blob_name(file))
    with open_plain(tier, file, encoding, blob, stored_bytes=stored_bytes) as reader:
        table = verify_file(reader, blob)
    assert stored_bytes is not None, "it was just read"
    extent = ObjectExtent(0, 0, table.total_bytes, stored_bytes, file, encoding)
    data = ObjectBlob(table, (extent,), encoding).encode()
    tier.delete(BLOBS + blob)
    tier.put(BLOBS + blob, data)
