"""WebDataset: members of a tar file whose names share a key, side by side, are one sample.

The layout is that of https://github.com/webdataset/webdataset: the key is a member's path up to the
first dot of its last part, what follows is the column.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np

from forebay.dataset.mds_layout import parse_json
from forebay_wire.errors import InvalidRequest

KEY: Final = "key"
"""The column of samples' keys."""

TEXT: Final = ("txt", "text", "transcript")
NUMBERS: Final = ("cls", "cls2", "class", "count", "index", "inx", "id")
IMAGES: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm")


def kind_of(column: str) -> str:
    """The last extension: ``seg.png`` is a ``png``."""
    return column.rpartition(".")[2].lower()


def image_hint(column: str) -> str | None:
    """``image`` for columns of images; they are bytes that the schema calls so."""
    return "image" if kind_of(column) in IMAGES else None


def split_name(path: str) -> tuple[str, str]:
    """Key and column of a member; no column if its name has no extension."""
    folder, slash, base = path.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension


@dataclass(frozen=True)
class TarSample:
    """The members of one key."""

    key: str
    members: dict[str, bytes]
    """Content by column."""
    stop: int
    """How far the file was read with it."""


def _key_of(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and column of a member; no column if it is none."""
    if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
        return "", ""
    key, column = split_name(member.name)
    is_note = key.startswith("__") and key.endswith("__")
    return (key, column) if column and not is_note else ("", "")


def samples(file: IO[bytes], where: str) -> Iterator[TarSample]:
    """The samples of a tar file, compressed or not, read from its front.

    InvalidRequest for what is none, and for a column that a sample has twice.
    """
    current = ""
    members: dict[str, bytes] = {}
    stop = 0
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                key, column = _key_of(member)
                if not column:
                    continue
                if key != current and members:
                    yield TarSample(current, members, stop)
                    members = {}
                current = key
                if column in members:
                    raise InvalidRequest(f"{where}, sample {key}: {column!r} is there twice")
                content = archive.extractfile(member)
                assert content is not None, "it is a file"
                members[column] = content.read()
                stop = 0 if file.closed else file.tell()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{where} cannot be read as webdataset: {error}") from error
    if members:
        yield TarSample(current, members, stop)


def sample_starts(file: IO[bytes], where: str) -> Iterator[int]:
    """Where each sample of an uncompressed tar file begins, and last where the last one ends; only
    heads of members are read. InvalidRequest as of :func:`samples`."""
    current, stop = "", 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                key, column = _key_of(member)
                if not column:
                    continue
                if key != current or not stop:
                    yield member.offset
                current = key
                stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                archive.members = []  # type: ignore[attr-defined]  # else it keeps every head
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(
            f"{where} cannot be read in place as webdataset: {error}; import it if it is compressed"
        ) from error
    if stop:
        yield stop


def columns_of(sample: TarSample, raw: Set[str], text: Set[str], where: str) -> dict[str, Any]:
    """The columns of a sample: as *raw* bytes, as *text*, or by their extensions."""
    columns: dict[str, Any] = {KEY: sample.key}
    for name, data in sample.members.items():
        place = f"{where}, sample {sample.key}, column {name!r}"
        if name in raw:
            columns[name] = data
        elif name in text:
            columns[name] = _text(data, place)
        else:
            columns[name] = decode(name, data, place)
    return columns


def decode(name: str, data: bytes, where: str) -> Any:
    """What a member holds, by its extension; what is not known stays bytes."""
    kind = kind_of(name)
    if kind in TEXT:
        return _text(data, where)
    if kind == "json":
        return parse_json(data, where)
    if kind in NUMBERS:
        try:
            return int(data)
        except ValueError as error:
            raise InvalidRequest(f"{where} is no whole number: {data[:40]!r}") from error
    if kind == "npy":
        try:
            return np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InvalidRequest(f"{where} is no npy array: {error}") from error
    return data


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{where} is no UTF-8 ({error}): keep its bytes with --type COLUMN=binary"
        ) from error
