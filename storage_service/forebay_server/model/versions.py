"""What the next version of a dataset is made of: rows appended, or columns beside those there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.manifest import DatasetManifest, LayerRef, ShardRef


@dataclass(frozen=True)
class NewColumns:
    """Columns that a version has in other places than its base, or not at all any more."""

    columns: tuple[str, ...]
    """Added or replaced: in the shards that are committed."""
    schema: str
    """Of those shards, base64."""
    dropped: tuple[str, ...] = ()


def appended(base: DatasetManifest, shards: Sequence[ShardRef], schema: str) -> DatasetManifest:
    """*base* with the rows of *shards* after its own; :class:`SchemaMismatch` for other columns.

    They have all columns, also those that *base* reads from layers.
    """
    if base.schema != schema:
        raise SchemaMismatch(
            f"dataset {base.dataset}: the appended shards have another schema than version "
            f"{base.version}; write them with the dataset's own schema"
        )
    schemas = base.shard_schemas
    if schemas and schema not in schemas:
        schemas = (*schemas, schema)
    number = schemas.index(schema) if schemas else 0
    added = tuple(replace(shard, schema=number) for shard in shards)
    return replace(base, shards=base.shards + added, shard_schemas=schemas, rows_of="")


def with_columns(
    base: DatasetManifest, shards: Sequence[ShardRef], schema: str, new: NewColumns
) -> DatasetManifest:
    """*base* with the same rows and other columns, whose shards are *shards*; the rest stays where
    it is. *schema*: of the version that is made. :class:`InvalidRequest` for what fits no row."""
    _check_names(base, new)
    num_rows = sum(shard.num_rows for shard in shards)
    if new.columns and num_rows != base.num_rows:
        raise InvalidRequest(
            f"dataset {base.dataset}: the columns {_names(new.columns)} have {num_rows} rows and "
            f"version {base.version} has {base.num_rows}: write one value for each row, in order"
        )
    if shards and not new.columns:
        raise InvalidRequest(f"dataset {base.dataset}: shards without columns to read from them")
    moved = {*new.columns, *new.dropped}
    layers = []
    for layer in base.layers:
        left = tuple(name for name in layer.columns if name not in moved)
        if left:
            layers.append(replace(layer, columns=left))
    if new.columns:
        layers.append(LayerRef(new.columns, new.schema, tuple(shards), len(base.shards)))
    return replace(
        base,
        schema=schema,
        shard_schemas=base.shard_schemas or (base.schema,),
        layers=tuple(layers),
        rows_of=base.rows_of or base.encode()[0],
    )


def _check_names(base: DatasetManifest, new: NewColumns) -> None:
    names = [*new.columns, *new.dropped]
    if not names:
        raise InvalidRequest(f"dataset {base.dataset}: no column to write and none to drop")
    if len(set(names)) != len(names):
        raise InvalidRequest(f"dataset {base.dataset}: columns repeat in {_names(names)}")


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
