"""WebDataset: tar files whose members of one key, side by side, are one sample.

The layout is that of https://github.com/webdataset/webdataset: the key is a member's path up to the
first dot of its last part, what follows is the column.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np

from forebay.dataset.schema import Schema
from forebay.importers.files import File, open_file
from forebay.importers.piece import Block, Options
from forebay.importers.samples import Sample, blocks, parse_json
from forebay_wire.errors import InvalidRequest

KEY: Final = "key"
"""The column of samples' keys."""

TEXT: Final = ("txt", "text", "transcript")
NUMBERS: Final = ("cls", "cls2", "class", "count", "index", "inx", "id")
IMAGES: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm")


@dataclass(frozen=True)
class TarPiece:
    """A tar file, compressed or not."""

    file: File

    @property
    def name(self) -> str:
        return self.file.path

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    @property
    def stamp(self) -> str:
        return self.file.stamp

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        raw = {name for name, kind in options.types.items() if kind in ("binary", "image")}
        text = {name for name, kind in options.types.items() if kind == "string"}
        if schema is not None:
            raw |= {one.name for one in schema.columns if one.kind == "binary"}
            text |= {one.name for one in schema.columns if one.kind == "string"}
        with open_file(self.file.path) as file:
            samples = _decoded(_samples(file, self.name), raw, text, self.name)
            yield from blocks(samples, schema, options, self.name, _Hints())


class _Hints(dict[str, Any]):
    """Images are bytes that the schema calls so."""

    def get(self, name: str, default: Any = None) -> Any:
        return "image" if kind_of(name) in IMAGES else default

    def keys(self) -> Any:
        return ()


def kind_of(column: str) -> str:
    """The last extension: ``seg.png`` is a ``png``."""
    return column.rpartition(".")[2].lower()


def split_name(path: str) -> tuple[str, str]:
    """Key and column of a member; no column if its name has no extension."""
    folder, slash, base = path.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension


def _samples(file: IO[bytes], where: str) -> Iterator[tuple[str, dict[str, bytes], int]]:
    """Key, members and position of each sample."""
    key, members = "", dict[str, bytes]()
    position = 0
    try:
        with tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                if not member.isfile() or member.name.rpartition("/")[2].startswith("."):
                    continue
                found, extension = split_name(member.name)
                if not extension or (found.startswith("__") and found.endswith("__")):
                    continue
                if found != key and members:
                    yield key, members, position
                    members = {}
                key = found
                if extension in members:
                    raise InvalidRequest(f"{where}, sample {key}: {extension!r} is there twice")
                content = archive.extractfile(member)
                assert content is not None, "it is a file"
                members[extension] = content.read()
                position = 0 if file.closed else file.tell()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{where} cannot be read as webdataset: {error}") from error
    if members:
        yield key, members, position


def _decoded(
    samples: Iterator[tuple[str, dict[str, bytes], int]],
    raw: set[str],
    text: set[str],
    where: str,
) -> Iterator[Sample]:
    for key, members, position in samples:
        columns: dict[str, Any] = {KEY: key}
        for name, data in members.items():
            if name in raw:
                columns[name] = data
            elif name in text:
                columns[name] = _text(data, f"{where}, sample {key}, column {name!r}")
            else:
                columns[name] = decode(name, data, f"{where}, sample {key}, column {name!r}")
        yield key, columns, position


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
