"""Shards of samples, read in place: MDS shards and WebDataset tar files.

The formats know no record batches, so the manifest says where batches begin. Values are those that
an import writes.
"""

from __future__ import annotations

import io
import struct
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from forebay.dataset.decoded_shard import DecodingReader
from forebay.dataset.mds_layout import MdsColumn, MdsSamples
from forebay.dataset.rows import RowBuffer
from forebay.dataset.sample_rows import SampleRows
from forebay.dataset.schema import Schema
from forebay.dataset.shard import Bytes
from forebay.dataset.tar_layout import columns_of, samples
from forebay_wire.errors import IntegrityError, InvalidRequest, SchemaMismatch


class SampleReader(DecodingReader):
    """Batches of samples that are decoded one by one. Thread-safe."""

    @abstractmethod
    def samples(self, index: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Name and columns of each sample of a batch."""

    def decode(self, index: int, schema: Schema) -> pa.RecordBatch:
        rows, buffer = SampleRows(schema), RowBuffer(schema, self.decoded_bytes(index))
        name = ""
        try:
            for number, (key, columns) in enumerate(self.samples(index)):
                name = key
                buffer.add(*buffer.convert(rows.checked(columns), number))
        except SchemaMismatch as error:
            raise SchemaMismatch(f"{self._where}, sample {name}: {error.message}") from error
        except (InvalidRequest, ValueError, struct.error, IndexError, KeyError) as error:
            if isinstance(error, IntegrityError):
                raise
            raise self._damaged(f"batch {index} cannot be read: {error}") from error
        if buffer.num_rows != self._batch_rows[index]:
            raise self._damaged(
                f"batch {index} has {buffer.num_rows} rows, not {self._batch_rows[index]}"
            )
        return buffer.batch()


class MdsReader(SampleReader):
    """An uncompressed MDS shard; *columns* are name, encoding and size of each."""

    def __init__(
        self,
        blob: Bytes,
        schema: Schema,
        batch_rows: tuple[int, ...],
        where: str,
        columns: Sequence[Sequence[Any]],
    ) -> None:
        super().__init__(blob, schema, batch_rows, where)
        kinds = {one.name: one.text for one in schema.columns if one.kind in ("binary", "string")}
        self._samples = MdsSamples([MdsColumn(*one) for one in columns], kinds, where)
        self._starts = np.cumsum([0, *batch_rows]).tolist()

    def _offsets(self, index: int) -> list[int]:
        """Where the samples of a batch begin, and where the last one ends."""
        first, count = self._starts[index], self._batch_rows[index]
        view = self._blob.map(4 + 4 * first, 4 * (count + 1))
        return [int(one) for one in np.frombuffer(view, "<u4")]

    def decoded_bytes(self, index: int) -> int:
        offsets = self._offsets(index)
        return max(1, offsets[-1] - offsets[0])

    def samples(self, index: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        offsets = self._offsets(index)
        data = self._blob.map(offsets[0], offsets[-1] - offsets[0])
        for number in range(self._batch_rows[index]):
            start, stop = offsets[number] - offsets[0], offsets[number + 1] - offsets[0]
            row = self._starts[index] + number
            yield str(row), self._samples.take_apart(data[start:stop], row)


class TarReader(SampleReader):
    """An uncompressed tar file; *starts* is where each batch begins, and last where the last one
    ends."""

    def __init__(
        self,
        blob: Bytes,
        schema: Schema,
        batch_rows: tuple[int, ...],
        where: str,
        starts: Sequence[int],
    ) -> None:
        super().__init__(blob, schema, batch_rows, where)
        self._borders = starts

    def decoded_bytes(self, index: int) -> int:
        return max(1, self._borders[index + 1] - self._borders[index])

    def samples(self, index: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        start = self._borders[index]
        data = self._blob.map(start, self._borders[index + 1] - start)
        end = bytes(2 * tarfile.BLOCKSIZE)  # what ends a tar file
        raw, text = self._schema.of_kind("binary"), self._schema.of_kind("string")
        for sample in samples(io.BytesIO(bytes(data) + end), self._where):
            yield sample.key, columns_of(sample, raw, text, self._where)
