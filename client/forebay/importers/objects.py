"""What a user hands over to be imported: paths, or tables that are in memory already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from forebay.dataset.schema import Schema
from forebay.importers.files import as_path
from forebay.importers.formats import features_of, find_source
from forebay.importers.piece import Block, Options, Source
from forebay.importers.tables import media_bytes
from forebay_wire.errors import InvalidRequest

BATCH_ROWS: Final = 16_384


def source_of(given: Any, kind: str | None) -> Source:
    """The source that *given* stands for. InvalidRequest for what is none."""
    if isinstance(given, (str, os.PathLike)):
        return find_source([as_path(given)], kind)
    if isinstance(given, pa.Table):
        return Source.of("table", [TablePiece(given)])
    if isinstance(given, pa.RecordBatchReader):
        return Source.of("batches", [BatchesPiece(given)])
    if hasattr(given, "with_format") and hasattr(given, "features"):
        return _hugging_face(given)
    if isinstance(given, Mapping):
        raise InvalidRequest(
            f"this holds several tables ({', '.join(map(str, given))}): import one of them, each "
            "as a dataset or, with append=True, as a version"
        )
    if isinstance(given, Sequence) and given and _are_paths(given):
        return find_source([as_path(one) for one in given], kind)
    if isinstance(given, Iterable):
        return Source.of("batches", [BatchesPiece(given)])
    raise InvalidRequest(
        f"{type(given).__name__} cannot be imported: give paths, a datasets.Dataset, a "
        "pyarrow.Table, or record batches"
    )


def _are_paths(given: Sequence[Any]) -> bool:
    return all(isinstance(one, (str, os.PathLike)) for one in given)


def _hugging_face(dataset: Any) -> Source:
    """A ``datasets.Dataset``, in the order that it has."""
    features = dataset.features.to_dict() if dataset.features is not None else {}
    media, classes = features_of(features)
    piece = HuggingFacePiece(dataset, media)
    return Source.of("huggingface", [piece], **({"classes": classes} if classes else {}))


@dataclass(frozen=True)
class HuggingFacePiece:
    """The rows of a ``datasets.Dataset``, with its selection and shuffling applied."""

    dataset: Any
    media: tuple[str, ...]
    name: str = "datasets.Dataset"
    can_travel = False

    @property
    def num_bytes(self) -> int:
        return int(getattr(self.dataset, "num_rows", 0) or 0)

    @property
    def stamp(self) -> str:
        """``datasets`` keeps a digest of all that made it."""
        return str(getattr(self.dataset, "_fingerprint", "") or "")

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        done = 0
        for table in self.dataset.with_format("arrow").iter(batch_size=1000):
            for batch in pa.table(table).combine_chunks().to_batches():
                done += batch.num_rows
                yield Block(media_bytes(batch, self.media, self.name), done)


@dataclass(frozen=True)
class TablePiece:
    """An Arrow table."""

    table: pa.Table
    name: str = "pyarrow.Table"
    stamp: str = ""
    can_travel = False

    @property
    def num_bytes(self) -> int:
        return int(self.table.nbytes)

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        done = 0
        for batch in self.table.to_batches(max_chunksize=BATCH_ROWS):
            done += batch.num_rows
            yield Block(batch, self.num_bytes * done // self.table.num_rows)
        if not self.table.num_rows:
            yield Block(
                self.table.to_batches()[0] if self.table.to_batches() else _empty(self.table), 0
            )


def _empty(table: pa.Table) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=table.schema)


class BatchesPiece:
    """Record batches or tables that can be taken once: the first ones are kept for the second
    reading, which is the one that counts."""

    name = "record batches"
    stamp = ""
    num_bytes = 0
    can_travel = False

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = iter(batches)
        self._first: list[pa.RecordBatch] = []

    def read(self, schema: Schema | None, options: Options) -> Iterator[Block]:
        if schema is None:
            self._first = list(self._more())
            yield from (Block(batch, 0) for batch in self._first)
            return
        while self._first:
            yield Block(self._first.pop(0), 0)
        while batches := list(self._more()):
            yield from (Block(batch, 0) for batch in batches)

    def _more(self) -> Iterator[pa.RecordBatch]:
        """Of the next one that comes."""
        for one in self._batches:
            if isinstance(one, pa.RecordBatch):
                yield one
            elif isinstance(one, pa.Table):
                yield from one.to_batches() or [_empty(one)]
            else:
                raise InvalidRequest(
                    f"record batches or tables of pyarrow can be imported, not {type(one).__name__}"
                )
            return
