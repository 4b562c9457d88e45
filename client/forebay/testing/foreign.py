"""Encoders of formats of other tools, after the pages of these: for tests that read them."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MdsColumns = Sequence[tuple[str, str, int | None]]
"""Name, encoding and size (None: it varies) of each column."""


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def npy(array: NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def mds_shard(columns: MdsColumns, rows: list[list[bytes]]) -> bytes:
    config = json.dumps({"column_names": [name for name, _, _ in columns]}).encode()
    bodies = []
    for row in rows:
        sizes = [
            len(value) for (_, _, size), value in zip(columns, row, strict=True) if size is None
        ]
        bodies.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(row))
    start = 4 * (len(rows) + 2) + len(config)
    offsets = np.cumsum([start, *map(len, bodies)])
    head = struct.pack(f"<{len(rows) + 2}I", len(rows), *offsets)
    return head + config + b"".join(bodies)


def write_mds(
    folder: Path,
    columns: MdsColumns,
    shards: list[list[list[bytes]]],
    compression: str | None = None,
    compress: Callable[[bytes], bytes] | None = None,
) -> None:
    folder.mkdir()
    index = []
    for number, rows in enumerate(shards):
        data = mds_shard(columns, rows)
        name = f"shard.{number:05d}.mds"
        entry: dict[str, Any] = {
            "column_names": [one[0] for one in columns],
            "column_encodings": [one[1] for one in columns],
            "column_sizes": [one[2] for one in columns],
            "compression": compression,
            "format": "mds",
            "samples": len(rows),
            "raw_data": {"basename": name, "bytes": len(data), "hashes": {}},
            "zip_data": None,
        }
        stored = entry["raw_data"]
        if compress is not None:
            data = compress(data)
            stored = {"basename": name + ".zip", "bytes": len(data)}
            entry["zip_data"] = stored
        stored["hashes"] = {"sha1": hashlib.sha1(data, usedforsecurity=False).hexdigest()}
        (folder / stored["basename"]).write_bytes(data)
        index.append(entry)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": index}))
