"""Blobs without datasets or checkpoints around them: stored, found on disk, damaged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from forebay.client import Client
from forebay.methods import Blobs
from forebay.transfer.blob import copy
from forebay_wire.segments import even_cuts
from forebay_wire.v1 import blobs_pb2


def store_blob(client: Client, data: bytes, cuts: Sequence[int] | None = None) -> str:
    """Upload *data* as one blob, cut as given or into 4 MiB; its id.

    It is durable, and garbage: it goes when its session's lease ends, in minutes.
    """
    session = client.channel.call(
        Blobs.BeginUpload,
        blobs_pb2.BeginUploadRequest(
            total_bytes=len(data), slot_bytes=max(1, len(data)), owner="test"
        ),
    )
    with client.transfer.upload_slot(
        session.session, session.slot_bytes, session.put_ticket
    ) as slot:
        if data:
            copy(slot.buffer[: len(data)], memoryview(data))
        slot.flush(len(data))
        sealed = client.channel.call(
            Blobs.Seal,
            blobs_pb2.SealRequest(
                session=session.session,
                num_bytes=len(data),
                cuts=even_cuts(len(data)) if cuts is None else cuts,
            ),
        )
    return sealed.blob


def replica_files(data_folder: Path, tier: str = "ssd") -> list[Path]:
    """The files of a directory tier that hold blobs."""
    return sorted(path for path in (data_folder / tier / "files").rglob("*") if path.is_file())


def flip_bit(path: Path, offset: int) -> None:
    """Damage one bit of a file, at byte *offset* (negative: from its end)."""
    path.chmod(0o600)
    with path.open("r+b", buffering=0) as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        position = file.tell()
        (byte,) = file.read(1)
        os.pwrite(file.fileno(), bytes([byte ^ 4]), position)


def truncate(path: Path, num_bytes: int) -> None:
    """Cut a file to *num_bytes*."""
    path.chmod(0o600)
    os.truncate(path, num_bytes)
