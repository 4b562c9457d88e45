"""Reading all of a dataset version, and comparing it with its digests and its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from forebay.dataset.cache import ShardPlace
from forebay.dataset.formats import open_shard
from forebay.dataset.layers import columns_of, schemas_of
from forebay.transfer import Blob, make_transfer
from forebay_wire.errors import DaemonUnavailable, ForebayError, IntegrityError

if TYPE_CHECKING:
    from forebay.dataset.dataset import Dataset


@dataclass
class Verified:
    """What was read, and what of it is not what it should be."""

    num_shards: int = 0
    num_bytes: int = 0
    num_rows: int = 0
    damaged: dict[int, str] = field(default_factory=dict)
    """Shard to what is wrong with it; those of columns that were added later count on."""


def verify(
    dataset: Dataset, progress: Callable[[int, int], object] = lambda done, total: None
) -> Verified:
    """Read every byte of every shard of the version and compare it with its BLAKE3 digests; parse
    every record batch and count its rows.

    Damage is no error: see ``damaged``; but a daemon that is away is. *progress* is told how many
    bytes are done, and of how many. Where the bytes lie in several tiers, the one that a reader
    gets is checked (``forebay scrub`` checks every copy).
    """
    transfer = make_transfer(dataset.endpoint)
    found = Verified()
    for number, place in enumerate(_places(dataset)):
        try:
            with transfer.open([place.ref.blob], place.context)[0] as blob:
                _check(blob, place, found, lambda done: progress(done, dataset.num_bytes))
            if number < len(dataset.manifest.shards):
                found.num_rows += place.ref.num_rows
        except DaemonUnavailable:
            raise
        except ForebayError as error:
            found.damaged[number] = error.message
        found.num_shards += 1
    return found


def _places(dataset: Dataset) -> Iterator[ShardPlace]:
    """Every shard of the version, those of layers behind the others."""
    manifest = dataset.manifest
    what = f"dataset {dataset.name} v{dataset.version}"
    for layer in [None, *range(len(manifest.layers))]:
        found = manifest.column_shards(layer)
        schema_of = schemas_of(found, what)
        own = len(found.shards) if layer is None else found.num_own
        for number, ref in enumerate(found.shards[:own]):
            name = f"{what}{columns_of(manifest, layer)}, shard {number}"
            yield ShardPlace(ref, schema_of(number), name)


def _check(
    blob: Blob, place: ShardPlace, found: Verified, progress: Callable[[int], object]
) -> None:
    ref = place.ref
    if blob.num_bytes != ref.num_bytes:
        raise IntegrityError(
            f"{place.context} has {blob.num_bytes} bytes, its manifest says {ref.num_bytes}"
        )
    borders = blob.table.offsets.tolist()
    for segment in range(blob.table.num_segments):
        data = blob.map(borders[segment], borders[segment + 1] - borders[segment])
        blob.table.check_identity(segment, data, place.context)
        found.num_bytes += len(data)
        progress(found.num_bytes)
    reader = open_shard(blob, place.schema, ref.batch_rows, place.context, ref.format)
    for index in range(len(ref.batch_rows)):
        reader.record_batch(index).validate()
