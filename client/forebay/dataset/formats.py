"""Which reader opens a shard: by the format that its manifest names."""

from __future__ import annotations

import json

from forebay.dataset.schema import Schema
from forebay.dataset.shard import Bytes, ShardReader
from forebay.dataset.zarr_file import ZarrFileReader
from forebay_wire.errors import InvalidRequest


def open_shard(
    blob: Bytes, schema: Schema, batch_rows: tuple[int, ...], where: str, format: str
) -> ShardReader:
    """A reader of *blob*, in *format* (empty: an Arrow IPC file; else a name, a colon, and as JSON
    what the file does not tell of itself). InvalidRequest for one that is not known here."""
    if not format:
        return ShardReader(blob, schema, batch_rows, where)
    name, _, detail = format.partition(":")
    if name == "parquet":
        from forebay.dataset.parquet_shard import ParquetReader  # loads Arrow's Parquet

        return ParquetReader(blob, schema, batch_rows, where)
    if name == "zarr":
        return ZarrFileReader(blob, schema, batch_rows, where, json.loads(detail))
    from forebay.dataset.sample_shards import MdsReader, TarReader

    if name == "mds":
        return MdsReader(blob, schema, batch_rows, where, json.loads(detail))
    if name == "webdataset":
        return TarReader(blob, schema, batch_rows, where, json.loads(detail))
    raise InvalidRequest(
        f"{where} is in the format {name!r}, which this version of forebay cannot read: update it"
    )
