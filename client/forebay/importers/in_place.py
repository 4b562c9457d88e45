"""Files of samples that are read where they lie: their batches, and their schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from forebay.dataset.tar_layout import sample_starts
from forebay.importers.files import File, exists, join, list_all, look, open_file, read_file
from forebay.importers.mds import INDEX, MdsPiece, mds_pieces
from forebay.importers.piece import Piece
from forebay.importers.tar import TarPiece
from forebay.zarr_codecs import METADATA_NAMES, check_metadata
from forebay.zarr_version import format_of
from forebay_wire.errors import InvalidRequest, OriginChanged
from forebay_wire.limits import MAX_SHARDS_PER_VERSION, MIB, check_limit
from forebay_wire.zarr_keys import is_key

BATCH_BYTES: Final = 2 * MIB
MAX_BATCH_ROWS: Final = 65_536

READERS: Final = 16
"""Files of metadata that are read at a time, before a store is taken in."""

ROOT_NAMES: Final = ("zarr.json", ".zgroup", ".zarray")
"""One of which the root of a zarr store has."""


@dataclass(frozen=True)
class Placed:
    """One file, and how it is read."""

    url: str
    num_bytes: int
    batch_rows: tuple[int, ...]
    format: str
    """With what the file does not tell of itself, as a manifest has it."""
    piece: Piece | None
    """The same file, to be imported: what its schema is inferred from. None: it is known."""


def is_mds(path: str) -> bool:
    """Whether *path* looks like a folder of MDS shards."""
    return "." not in path.rstrip("/").rpartition("/")[2] and exists(path, INDEX)


def place_mds(folder: str) -> list[Placed]:
    """The shards of a folder. InvalidRequest for compressed ones."""
    return [_mds(piece) for piece in mds_pieces(look(join(folder, INDEX)), folder)]


def _mds(piece: MdsPiece) -> Placed:
    if piece.compression:
        raise InvalidRequest(
            f"{piece.path} is compressed ({piece.compression}), so it cannot be read in place: "
            "import it (forebay dataset import)"
        )
    if not piece.num_rows:
        raise InvalidRequest(f"{piece.path} has no samples: leave it out of the index")
    rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * piece.num_rows // max(1, piece.raw_bytes)))
    counts = [min(rows, piece.num_rows - start) for start in range(0, piece.num_rows, rows)]
    columns = [[one.name, one.encoding, one.size] for one in piece.columns]
    text = json.dumps(columns, separators=(",", ":"))
    return Placed(piece.path, piece.num_bytes, tuple(counts), f"mds:{text}", piece)


def place_tar(path: str) -> Placed:
    """A tar file; the heads of all its members are read. OriginChanged if it changes meanwhile."""
    before = look(path)
    with open_file(path) as file:
        starts, counts = _batches(list(sample_starts(file, path)))
    if look(path) != before:
        raise OriginChanged(f"{path} was changed while its samples were looked for: try again")
    if not counts:
        raise InvalidRequest(f"{path} has no samples")
    text = json.dumps(starts, separators=(",", ":"))
    piece = TarPiece(File(path, before.num_bytes, before.stamp))
    return Placed(path, before.num_bytes, tuple(counts), f"webdataset:{text}", piece)


def is_zarr(path: str) -> bool:
    """Whether *path* looks like the root of a zarr store."""
    return any(exists(path, name) for name in ROOT_NAMES)


def place_zarr(root: str) -> list[Placed]:
    """The files of a zarr store, by key; those that are none of its are left out.

    InvalidRequest if there is no store, or an array of it takes unpickling."""
    files = {key: file for key, file in list_all(root) if is_key(key)}
    if not any(name in files for name in ROOT_NAMES):
        raise InvalidRequest(
            f"{root} is no zarr store: there is no {', no '.join(ROOT_NAMES)} in it"
        )
    check_limit(
        "files of a zarr store",
        len(files),
        MAX_SHARDS_PER_VERSION,
        "write it with shards of zarr, or larger chunks, or import it (forebay dataset import)",
    )
    told = [key for key in files if key.rpartition("/")[2] in METADATA_NAMES]
    with ThreadPoolExecutor(READERS, thread_name_prefix="forebay-zarr") as pool:
        values = pool.map(read_file, [files[key].path for key in told])
        for key, value in zip(told, values, strict=True):
            check_metadata(key, value, root)
    return [
        Placed(file.path, file.num_bytes, (1,), format_of(key), None) for key, file in files.items()
    ]


def _batches(starts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where batches begin (and the last one ends), and how many samples each has."""
    borders: list[int] = []
    counts: list[int] = []
    for start in starts[:-1]:
        if not borders or start - borders[-1] >= BATCH_BYTES or counts[-1] >= MAX_BATCH_ROWS:
            borders.append(start)
            counts.append(0)
        counts[-1] += 1
    return [*borders, *starts[-1:]], counts


def place(paths: Sequence[str], kind: str) -> Iterator[Placed]:
    """The files at *paths*, in order: folders of MDS shards, zarr stores, or tar files."""
    for path in paths:
        if kind == "mds":
            yield from place_mds(path)
        elif kind == "zarr":
            yield from place_zarr(path)
        else:
            yield place_tar(path)
