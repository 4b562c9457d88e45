"""What tests run in other processes: importable there, whatever started them."""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import sys
import time
from typing import TYPE_CHECKING

from forebay.transfer import make_transfer
from forebay_wire.protocol import DataEndpoint

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from forebay.fs import ForebayFile, ForebayFileSystem


def read_blob(endpoint: DataEndpoint, blob: str, sha256: str) -> None:
    """Read a blob twice as a DataLoader worker would; raises if its bytes are not those."""
    [opened] = make_transfer(endpoint).open([blob])
    buffer = bytearray(opened.num_bytes)
    opened.read_into(0, buffer)
    for found in (buffer, opened.map()):
        if hashlib.sha256(found).hexdigest() != sha256:
            raise AssertionError(f"other bytes came for blob {blob}")
    opened.close()
    if mp.get_start_method() != "fork" and "grpc" in sys.modules:
        raise AssertionError("reading loaded gRPC")


def read_file(fs: ForebayFileSystem, file: ForebayFile, sha256: str) -> None:
    """Read a file of ``forebay://`` that came here open, and again by its path."""
    for found in (file.read(), fs.cat_file(file.path)):
        if hashlib.sha256(found).hexdigest() != sha256:
            raise AssertionError(f"other bytes came for {file!r}")


def connect_at(folder: str, start_unix: float, answers: Queue[str]) -> None:
    """Connect to a data folder at a moment that several processes agreed on; tells whose daemon."""
    from forebay.client import connect

    time.sleep(max(0.0, start_unix - time.time()))
    with connect(folder, timeout=60) as client:
        answers.put(client.endpoint.incarnation)
        client.datasets()
