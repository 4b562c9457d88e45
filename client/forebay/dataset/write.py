"""Writing a version of a dataset: samples into record batches, shards, and one commit."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa

from forebay.dataset.rows import RowBuffer
from forebay.dataset.schema import Schema
from forebay.dataset.shard import ShardBuilder, ShardContent, largest_sample
from forebay.dataset.tables import conform
from forebay.dataset.uploads import Channel, Upload, Uploads
from forebay.methods import Datasets
from forebay.transfer import Transfer
from forebay_wire.errors import (
    AlreadyExists,
    ForebayError,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    SampleTooLarge,
    SchemaMismatch,
)
from forebay_wire.failpoints import failpoint
from forebay_wire.ids import check_name, new_random_name
from forebay_wire.lazy import lazy
from forebay_wire.limits import KIB, MAX_COMMIT_BYTES, MAX_SHARDS_PER_VERSION, MIB, check_limit
from forebay_wire.v1 import datasets_pb2

SHARD_BYTES: Final = 64 * MIB
BATCH_BYTES: Final = 2 * MIB
NUM_SEALING: Final = 3
"""Shards that are sealed at a time: while one is synced and another one's room is being allocated,
the disk writes the third."""

LEAST_SHARD_BYTES: Final = 4 * MIB
"""Where room is short, shards get as small as this before a writer is refused."""

SMALLEST_SHARD_BYTES: Final = 64 * KIB
COMMIT_SECONDS: Final = 120.0

SHARD_COMMIT_BYTES: Final = 136
BATCH_COMMIT_BYTES: Final = 5
"""The most that a shard, and a record batch of it, adds to the message of a commit."""


class DatasetWriter:
    """Writes one version of a dataset; leaving the ``with`` block commits it, all or nothing.

    An exception inside the block leaves nothing. On return from the block the version is durable on
    the daemon's node (``local``) and visible, and :attr:`version` is its number. Not thread-safe.
    """

    def __init__(
        self,
        channel: Channel,
        transfer: Transfer,
        name: str,
        *,
        schema: Mapping[str, Any] | pa.Schema | Schema | None = None,
        base_version: int = 0,
        base_shards: int = 0,
        base_manifest: str = "",
        shard_bytes: int = SHARD_BYTES,
        batch_bytes: int = BATCH_BYTES,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """*base_version* 0 creates the dataset, n appends to version n, which must be the newest
        and has *base_shards* shards, and with *base_manifest* that manifest.

        A shard is at most *shard_bytes* and so is a sample; record batches, the unit of random
        reads, have about *batch_bytes*. *metadata* is the caller's own JSON object
        (default: that of the base version).
        """
        self.name = check_name("dataset", name)
        self.version: int | None = None
        """Number of the committed version; None before."""
        self.num_rows = 0
        """Samples written so far."""
        self._channel = channel
        self._uploads = Uploads(channel, transfer, f"dataset {name}")
        self._schema = None if schema is None else self._checked(Schema.of(schema))
        self._base_version = base_version
        self._base_manifest = base_manifest
        self._num_shards = base_shards
        self._commit_bytes = 0
        self._shard_bytes = _check_bytes("shard_bytes", shard_bytes, SMALLEST_SHARD_BYTES)
        self._batch_bytes = _check_bytes("batch_bytes", batch_bytes, 1)
        self._metadata_json = "" if metadata is None else json.dumps(dict(metadata))
        self._request = new_random_name()
        self._rows: RowBuffer | None = None
        self._tables: list[pa.Table] = []
        self._shard: tuple[Upload, ShardBuilder] | None = None
        self._sealer = ThreadPoolExecutor(NUM_SEALING, thread_name_prefix="forebay-seal")
        self._sealing: deque[Future[datasets_pb2.ShardCommit]] = deque()
        self._commits: list[datasets_pb2.ShardCommit] = []
        self._ended = False

    @property
    def schema(self) -> Schema | None:
        """The schema: given, of the base version, or inferred from what came first."""
        return self._schema

    def __enter__(self) -> Self:
        if self._base_version == 0:
            self._check_name_is_free()  # the commit decides; this spares a long upload
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    def write(self, **columns: Any) -> None:
        """Add one sample; its values are copied.

        Raises :class:`SchemaMismatch` naming sample, column, what came and what was expected, and
        :class:`SampleTooLarge`; the sample is then not part of the dataset, the others still are.
        """
        self._check_open()
        number = self.num_rows + 1
        if self._rows is None:
            self._rows = self._make_row_buffer(columns)
        self._flush_tables()
        values, num_bytes = self._rows.convert(columns, number)
        if num_bytes > self._largest_sample:
            raise self._too_large(f"sample number {number}", num_bytes, self._shard_bytes)
        if self._rows.num_rows and self._rows.num_bytes + num_bytes > self._batch_bytes:
            self._flush_rows()
        self._rows.add(values, num_bytes)
        self.num_rows += 1

    def write_table(self, table: pa.Table | pa.RecordBatch) -> None:
        """Add the rows of an Arrow table (or record batch) in order, by column, not by sample.

        The table must not change afterwards. Raises :class:`SchemaMismatch` naming the column.
        """
        self._check_open()
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        if not isinstance(table, pa.Table):
            raise SchemaMismatch(f"write_table takes a pyarrow.Table, not {type(table).__name__}")
        if self._schema is None:
            self._schema = self._checked(self._inferred(Schema.from_arrow(table.schema)))
        fitting = conform(table, self._schema)
        self._flush_rows()
        self._tables.append(fitting)
        self.num_rows += table.num_rows
        if sum(pending.nbytes for pending in self._tables) >= self._batch_bytes:
            self._flush_tables()

    def commit(self) -> int:
        """Make everything written one version, visible and durable, and return its number.

        Idempotent. Raises AlreadyExists for a name that is taken, Conflict if somebody else
        appended first; then nothing is left of this version.
        """
        if self.version is not None:
            return self.version
        self._check_open()
        try:
            self.version = self._commit()
        finally:
            self.abort()
        return self.version

    def abort(self) -> None:
        """End without a version; what was uploaded is dropped. Idempotent, nothing after commit."""
        if self._ended:
            return
        self._ended = True
        if self._shard is not None:
            self._shard[1].close()
        self._sealer.shutdown(wait=True, cancel_futures=True)
        self._uploads.end(committed=self.version is not None)

    def _seal_all(self) -> None:
        """All that was written is durable, in sessions that live until :meth:`abort`."""
        self._flush_rows()
        self._flush_tables()
        self._finish_shard()
        self._await_sealing(0)
        self._uploads.check()

    def _commit(self) -> int:
        self._seal_all()
        if self._schema is None:
            raise InvalidRequest(
                f"dataset {self.name!r}: no sample was written and no schema given; write at least "
                "one sample, or create_dataset(schema=...)"
            )
        failpoint("client.write.before_commit")
        request = self._commit_request(self._schema)
        return self._channel.call(Datasets.CommitVersion, request, timeout=COMMIT_SECONDS).version

    def _commit_request(self, schema: Schema) -> datasets_pb2.CommitVersionRequest:
        return datasets_pb2.CommitVersionRequest(
            dataset=self.name,
            base_version=self._base_version,
            schema=schema.arrow.serialize().to_pybytes(),
            shards=self._commits,
            request=self._request,
            metadata_json=self._metadata_json,
            base_manifest=self._base_manifest,
        )

    def _infer(self, sample: Mapping[str, Any]) -> Schema:
        """The schema of the first sample, where none was given."""
        return Schema.infer(sample)

    def _inferred(self, schema: Schema) -> Schema:
        """The schema to write tables of *schema* with, where none was given."""
        return schema

    def _checked(self, schema: Schema) -> Schema:
        """*schema* if samples of it can be written here."""
        return schema

    # From rows and tables to record batches.

    def _make_row_buffer(self, sample: Mapping[str, Any]) -> RowBuffer:
        if self._schema is None:
            self._schema = self._checked(self._infer(sample))
        return RowBuffer(self._schema, self._batch_bytes)

    def _flush_rows(self) -> None:
        if self._rows is not None and self._rows.num_rows:
            self._write_batch(self._rows.batch())
            self._rows.clear()

    def _flush_tables(self) -> None:
        if not self._tables:
            return
        tables, self._tables = self._tables, []
        for batch in _record_batches(pa.concat_tables(tables), self._batch_bytes):
            self._write_batch(batch)

    def _write_batch(self, batch: pa.RecordBatch) -> None:
        """Put *batch* into the shard, or into the next one, or in halves if it fits none."""
        if (
            self._shard is not None
            and self._shard[1].num_batches
            and not self._shard[1].fits(batch)
        ):
            self._finish_shard()
        if self._shard is None:
            self._shard = self._begin_shard()
        upload, builder = self._shard
        if builder.fits(batch):
            builder.write(batch)
            self._uploads.land(upload, builder.settled_bytes, builder.settled_cuts)
        elif batch.num_rows > 1:
            half = batch.num_rows // 2
            self._write_batch(batch.slice(0, half))
            self._write_batch(batch.slice(half))
        else:
            raise self._too_large("a sample", batch.nbytes, upload.slot.buffer.nbytes)

    # From record batches to shards.

    def _begin_shard(self) -> tuple[Upload, ShardBuilder]:
        assert self._schema is not None
        least = max(LEAST_SHARD_BYTES, 2 * self._batch_bytes)
        upload = self._uploads.begin(self._shard_bytes, min(least, self._shard_bytes))
        return upload, ShardBuilder(upload.slot.buffer, self._schema.arrow)

    def _finish_shard(self) -> None:
        """Hand the shard to the sealing threads, once one of them has nothing to do."""
        if self._shard is None:
            return
        upload, builder = self._shard
        self._shard = None
        content = builder.finish()
        self._count_shard(content)
        self._await_sealing(NUM_SEALING - 1)
        self._sealing.append(self._sealer.submit(self._seal, upload, content))

    def _count_shard(self, content: ShardContent) -> None:
        """Refuse a shard that no commit could name before it is uploaded."""
        self._num_shards += 1
        advice = f"write larger shards than shard_bytes={self._shard_bytes}"
        check_limit("shards of a version", self._num_shards, MAX_SHARDS_PER_VERSION, advice)
        self._commit_bytes += SHARD_COMMIT_BYTES + BATCH_COMMIT_BYTES * len(content.batch_rows)
        check_limit(
            "bytes of a commit's list of shards and record batches",
            self._commit_bytes,
            MAX_COMMIT_BYTES - 2 * MIB,  # for schema and metadata
            f"{advice}, or append the rest as another version",
        )

    def _await_sealing(self, num_left: int) -> None:
        """Until only the last *num_left* shards are being sealed; the others are in order."""
        while len(self._sealing) > num_left:
            self._commits.append(self._sealing.popleft().result())

    def _seal(self, upload: Upload, content: ShardContent) -> datasets_pb2.ShardCommit:
        """In a sealing thread."""
        sealed = self._uploads.seal(upload, content.num_bytes, content.cuts)
        failpoint("client.write.after_shard")
        return datasets_pb2.ShardCommit(
            session=upload.session,
            blob=sealed.blob,
            num_bytes=content.num_bytes,
            num_rows=content.num_rows,
            batch_rows=content.batch_rows,
        )

    # Limits.

    def _check_name_is_free(self) -> None:
        try:
            self._channel.call(Datasets.GetDataset, datasets_pb2.GetDatasetRequest(name=self.name))
        except NotFound:
            return
        raise AlreadyExists(
            f"dataset {self.name!r} exists: append_dataset({self.name!r}) adds a version, "
            f"delete_dataset({self.name!r}) makes room for a new one"
        )

    def _check_open(self) -> None:
        if self._ended:
            raise InvalidRequest(
                f"this writer of dataset {self.name!r} has ended; append_dataset() starts a new one"
            )

    @lazy
    def _largest_sample(self) -> int:
        assert self._schema is not None
        return largest_sample(self._shard_bytes, self._schema.arrow)

    def _too_large(self, what: str, num_bytes: int, room: int) -> ForebayError:
        if room < self._largest_sample:
            return ResourceExhausted(
                f"{what} of dataset {self.name!r} has {num_bytes} bytes; the daemon had shared "
                f"memory for a shard of {room} bytes, not for shard_bytes={self._shard_bytes}: "
                "write smaller shards, or raise the daemon's ram limit"
            )
        return SampleTooLarge(
            f"{what} of dataset {self.name!r} has {num_bytes} bytes, and a shard of shard_bytes="
            f"{self._shard_bytes} holds no sample above {self._largest_sample}: raise shard_bytes"
        )


def _record_batches(table: pa.Table, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    """*table* in record batches of about *batch_bytes*, contiguous in memory."""
    rows = max(1, batch_bytes * table.num_rows // max(table.nbytes, 1))
    for start in range(0, table.num_rows, rows):
        yield from table.slice(start, rows).combine_chunks().to_batches()


def _check_bytes(name: str, value: int, smallest: int) -> int:
    if value < smallest:
        raise InvalidRequest(f"{name}={value}: at least {smallest} bytes")
    return value
