"""Mosaic Streaming's MDS: an ``index.json`` and shards of samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import xxhash

from forebay.dataset.mds_layout import MdsColumn, MdsSamples, hint
from forebay.dataset.schema import Schema
from forebay.importers.compressed import decompress
from forebay.importers.files import File, join, read_file
from forebay.importers.piece import Block, Options
from forebay.importers.samples import Sample, blocks
from forebay_wire.errors import IntegrityError, InvalidRequest

INDEX: Final = "index.json"


@dataclass(frozen=True)
class MdsPiece:
    """One shard."""

    path: str
    num_bytes: int
    stamp: str
    columns: tuple[MdsColumn, ...]
    num_rows: int
    raw_bytes: int
    """Bytes of the shard when it is not compressed."""
    compression: str
    hashes: tuple[tuple[str, str], ...]
    """Of the file: algorithm and hexadecimal digest."""

    @property
    def name(self) -> str:
        return self.path

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        data = read_file(self.path)
        check_hashes(data, self.hashes, self.path)
        if self.compression:
            data = decompress(data, self.compression, self.raw_bytes, self.path)
        if schema is None:
            kinds: Mapping[str, Any] = options.types
        else:
            kinds = {
                one.name: one.text for one in schema.columns if one.kind in ("binary", "string")
            }
        try:
            samples = self._samples(memoryview(data), kinds)
            hints = {one.name: kind for one in self.columns if (kind := hint(one.encoding))}
            yield from blocks(samples, schema, options, self.path, hints.get)
        except (ValueError, IndexError, KeyError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{self.path} cannot be read as mds: {error}") from error

    def _samples(self, data: memoryview, kinds: Mapping[str, Any]) -> Iterator[Sample]:
        count = int(np.frombuffer(data, "<u4", 1)[0])
        if count != self.num_rows:
            raise InvalidRequest(f"{self.path} has {count} samples, the index says {self.num_rows}")
        offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
        samples = MdsSamples(self.columns, kinds, self.path)
        for row in range(count):
            start, stop = offsets[row], offsets[row + 1]
            if not start <= stop <= len(data):
                raise InvalidRequest(f"{self.path}, sample {row} lies outside of it")
            values = samples.take_apart(data[start:stop], row)
            yield str(row), values, self.num_bytes * (row + 1) // count


def mds_pieces(index: File, folder: str) -> list[MdsPiece]:
    """The shards that an index names."""
    try:
        return [
            _piece(shard, folder, index.stamp)
            for shard in json.loads(read_file(index.path))["shards"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{index.path} is no index of MDS shards: {error!r}") from error


def _piece(shard: Mapping[str, Any], folder: str, stamp: str) -> MdsPiece:
    if shard.get("format") != "mds":
        raise InvalidRequest(
            f"{folder} has shards of format {shard.get('format')!r}: only mds is read; its csv "
            "and json shards can be imported as csv and jsonl files"
        )
    stored = shard["zip_data"] or shard["raw_data"]
    columns = zip(
        shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True
    )
    return MdsPiece(
        path=join(folder, stored["basename"]),
        num_bytes=int(stored["bytes"]),
        stamp=stamp,
        columns=tuple(MdsColumn(*one) for one in columns),
        num_rows=int(shard["samples"]),
        raw_bytes=int(shard["raw_data"]["bytes"]),
        compression=str(shard["compression"] or "") if shard["zip_data"] else "",
        hashes=tuple(sorted(stored["hashes"].items())),
    )


def check_hashes(data: bytes, hashes: tuple[tuple[str, str], ...], where: str) -> None:
    """IntegrityError unless *data* has the digests that are known here."""
    for algorithm, expected in hashes:
        make: Any = getattr(xxhash, algorithm, None) if algorithm.startswith("xx") else None
        if make is None and algorithm in hashlib.algorithms_guaranteed:
            make = partial(hashlib.new, algorithm, usedforsecurity=False)
        if make is None or algorithm.startswith("shake"):
            continue
        found = make(data=data) if algorithm in hashlib.algorithms_guaranteed else make(data)
        if found.hexdigest() != expected:
            raise IntegrityError(f"{where} is damaged: its {algorithm} is not what the index says")
