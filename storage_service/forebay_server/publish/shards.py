"""What a commit names: sealed shards, each with the session that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_datasets import blob_sizes
from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import check_id, check_random_name
from forebay_wire.limits import MIB, check_limit
from forebay_wire.manifest import ShardRef

FORMATS: Final = ("parquet", "mds", "webdataset", "zarr")
"""Of origins that are no Arrow IPC files."""
MAX_FORMAT_BYTES: Final = 1 * MIB
"""Of a format with what the file does not tell of itself."""


@dataclass(frozen=True)
class ShardCommit:
    """A sealed shard, with the session that holds it; without one a registered origin."""

    session: str
    blob: str
    num_bytes: int
    num_rows: int
    batch_rows: tuple[int, ...]
    format: str = ""
    """Of an origin; empty: an Arrow IPC file."""

    def check(self) -> ShardRef:
        """What the manifest says of it; :class:`InvalidRequest` if it contradicts itself."""
        if self.session:
            check_random_name("session", self.session)
        check_id("blob", self.blob)
        if sum(self.batch_rows) != self.num_rows or not all(self.batch_rows):
            raise InvalidRequest(
                f"shard {self.blob}: record batches of {sum(self.batch_rows)} rows in all, each "
                f"with at least one, cannot make {self.num_rows} rows"
            )
        check_limit("bytes of a format", len(self.format), MAX_FORMAT_BYTES, "cut the file")
        if self.format and (self.session or self.format.partition(":")[0] not in FORMATS):
            raise InvalidRequest(
                f"shard {self.blob}: format {self.format[:40]!r} is not one of an origin: "
                f"{', '.join(FORMATS)}"
            )
        return ShardRef(
            self.blob, self.num_bytes, self.num_rows, self.batch_rows, format=self.format
        )


def check_sizes(connection: Connection, shards: Sequence[ShardCommit]) -> None:
    """Refuse a shard whose blob has another size than the commit says."""
    sizes = blob_sizes(connection, [shard.blob for shard in shards])
    for shard in shards:
        size = sizes.get(shard.blob)
        if size is not None and size != shard.num_bytes:
            raise InvalidRequest(
                f"shard {shard.blob} has {size} bytes, the commit says {shard.num_bytes}"
            )
