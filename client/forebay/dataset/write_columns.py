"""Columns added to a version, or in the place of others: a new version, the rest of which stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from forebay.dataset.rows import make_store
from forebay.dataset.schema import Column, Schema, as_numpy
from forebay.dataset.write import BATCH_BYTES, COMMIT_SECONDS, SHARD_BYTES, DatasetWriter
from forebay.methods import Datasets
from forebay_wire.errors import AlreadyExists, InvalidRequest, SchemaMismatch
from forebay_wire.ids import new_random_name
from forebay_wire.v1 import datasets_pb2

if TYPE_CHECKING:
    from forebay.dataset.dataset import Control, Dataset
    from forebay.dataset.uploads import Channel
    from forebay.transfer import Transfer

BLOCK_ROWS: Final = 1 << 12
"""Rows that a function gets at a time, unless told otherwise."""


class ColumnsWriter(DatasetWriter):
    """Writes some columns for every row of the newest version, in the order of its rows; leaving
    the ``with`` block commits a version that has these and the other columns, where they are.

    As :class:`DatasetWriter` otherwise: an exception inside the block leaves nothing, on return the
    version is durable on the daemon's node and visible. Conflict at the commit if somebody else
    made a version meanwhile. Splits and other selections of the version stay with it (see
    ``docs/importing.md``).
    """

    def __init__(
        self,
        channel: Channel,
        transfer: Transfer,
        base: Dataset,
        *,
        schema: Mapping[str, Any] | pa.Schema | Schema | None = None,
        replace: bool = False,
        shard_bytes: int = SHARD_BYTES,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        """*schema*: of the written columns alone; *replace*: some of them may be there already,
        and are replaced."""
        refuse_store(base)
        self._base = base
        self._may_replace = replace
        super().__init__(
            channel,
            transfer,
            base.name,
            schema=schema,
            base_version=base.version,
            base_shards=base.manifest.num_shards,
            base_manifest=base.manifest_id,
            shard_bytes=shard_bytes,
            batch_bytes=batch_bytes,
        )

    def write(self, **columns: Any) -> None:
        """The values of the next row: see :meth:`DatasetWriter.write`."""
        self._check_rows(self.num_rows + 1)
        super().write(**columns)

    def write_table(self, table: pa.Table | pa.RecordBatch) -> None:
        """Those of the next rows: see :meth:`DatasetWriter.write_table`."""
        self._check_rows(self.num_rows + getattr(table, "num_rows", 0))
        super().write_table(table)

    def _check_rows(self, num_rows: int, least: int = 0) -> None:
        base = self._base.manifest
        if not least <= num_rows <= base.num_rows:
            raise InvalidRequest(
                f"columns of dataset {self.name!r} v{base.version} have one value for each of its "
                f"{base.num_rows} rows, in order; {num_rows} were written"
            )

    def _infer(self, sample: Mapping[str, Any]) -> Schema:
        return inferred(self._base.schema, sample)

    def _inferred(self, schema: Schema) -> Schema:
        there = self._base.schema
        names = there.names
        return Schema(tuple(there[c.name] if c.name in names else c for c in schema.columns))

    def _checked(self, schema: Schema) -> Schema:
        check_columns(self._base.schema, schema, self.name, replace=self._may_replace)
        return schema

    def _commit_request(self, schema: Schema) -> datasets_pb2.CommitVersionRequest:
        self._check_rows(self.num_rows, self._base.manifest.num_rows)
        request = super()._commit_request(schema)
        put_beside(request, self._base.schema, schema)
        return request


def refuse_store(base: Dataset) -> None:
    """InvalidRequest for a zarr store, whose keys and values are no samples."""
    if base.manifest.metadata.get("zarr") and base.schema.names == ["key", "value"]:
        raise InvalidRequest(
            f"dataset {base.name!r} is a zarr store: set its arrays in a session of "
            "forebay.zarr.ForebayStore"
        )


def inferred(base: Schema, sample: Mapping[str, Any]) -> Schema:
    """The columns of a *sample* for which no schema was given: the type that a column has in *base*
    stays."""
    fresh = {name: value for name, value in sample.items() if name not in base.names}
    found = Schema.infer(fresh) if fresh else Schema(())
    return Schema(tuple(base[name] if name in base.names else found[name] for name in sample))


def check_columns(base: Schema, new: Schema, dataset: str, *, replace: bool) -> None:
    """AlreadyExists if *dataset* has some of the *new* columns, unless these *replace* them."""
    there = [name for name in new.names if name in base.names]
    if there and not replace:
        raise AlreadyExists(
            f"dataset {dataset!r} has {', '.join(map(repr, there))} already: replace=True (on the "
            "command line --replace) makes a version with other values"
        )


def put_beside(request: datasets_pb2.CommitVersionRequest, base: Schema, new: Schema) -> None:
    """Have *request*, whose shards have *new* columns, make a version that has those of *base* too:
    new ones in the place of those of the same name, else at the end."""
    added = {column.name: column for column in new.columns}
    kept = [added.pop(column.name, column) for column in base.columns]
    both = Schema((*kept, *added.values()))
    request.schema = both.arrow.serialize().to_pybytes()
    request.columns.columns.extend(new.names)
    request.columns.schema = new.arrow.serialize().to_pybytes()


def drop_columns(control: Control, base: Dataset, names: Sequence[str]) -> int:
    """See :meth:`forebay.Client.drop_columns`."""
    refuse_store(base)
    names = [names] if isinstance(names, str) else list(names)
    gone = {base.schema[name].name for name in names}
    kept = tuple(column for column in base.schema.columns if column.name not in gone)
    if not kept:
        raise InvalidRequest(
            f"dataset {base.name!r} would have no column left: delete it, or keep one"
        )
    request = datasets_pb2.CommitVersionRequest(
        dataset=base.name,
        base_version=base.version,
        base_manifest=base.manifest_id,
        schema=Schema(kept).arrow.serialize().to_pybytes(),
        request=new_random_name(),
        columns=datasets_pb2.NewColumns(dropped=names),
    )
    return control.channel.call(Datasets.CommitVersion, request, timeout=COMMIT_SECONDS).version


Function = Callable[[dict[str, Any]], Mapping[str, Any]]


def compute_columns(
    control: Control,
    base: Dataset,
    function: Function,
    *,
    schema: Mapping[str, Any] | pa.Schema | Schema | None,
    columns: Sequence[str] | None,
    replace: bool,
    batch_rows: int,
    progress: Callable[[int, int], object],
) -> int:
    """See :meth:`forebay.Dataset.add_columns`."""
    total = base.num_rows
    if batch_rows < 1:
        raise InvalidRequest(f"batch_rows={batch_rows}: at least 1")
    if not total and schema is None:
        raise InvalidRequest(
            f"dataset {base.name!r} v{base.version} has no rows to tell types by: "
            "add_columns(schema=...)"
        )
    with ColumnsWriter(
        control.channel, control.transfer, base, schema=schema, replace=replace
    ) as writer:
        name = f"{base.name} v{base.version}, new columns"
        planned = base.plan(range(total), name=name, columns=columns)
        with planned if total else nullcontext() as plan:
            for start in range(0, total, batch_rows):
                rows = np.arange(start, min(start + batch_rows, total), dtype=np.int64)
                made = function(base.read(rows, columns))
                writer.write_table(_table(made, len(rows), writer.schema, base.schema))
                if plan is not None:
                    plan.advance(int(rows[-1]) + 1)
                progress(int(rows[-1]) + 1, total)
    assert writer.version is not None, "the block has ended"
    return writer.version


def _table(made: Mapping[str, Any], num_rows: int, schema: Schema | None, base: Schema) -> pa.Table:
    """What a function gave for *num_rows* rows, as a table."""
    if not isinstance(made, Mapping) or not made:
        raise SchemaMismatch(
            f"the function gave {type(made).__name__}: a dict of column names to values is expected"
        )
    for name, values in made.items():
        count = len(values) if hasattr(values, "__len__") and not isinstance(values, str) else "no"
        if count != num_rows:
            raise SchemaMismatch(
                f"column {name!r}: the function gave {count} values for {num_rows} rows"
            )
    wanted = schema or inferred(base, {name: values[0] for name, values in made.items()})
    if set(made) != set(wanted.names):
        raise SchemaMismatch(
            f"the function gave columns {', '.join(made)}; expected: {', '.join(wanted.names)}"
        )
    arrays = [_array(made[column.name], column) for column in wanted.columns]
    return pa.Table.from_arrays(arrays, schema=wanted.arrow)


def _array(values: Any, column: Column) -> pa.Array:
    """*values*, one a row, as they lie in a record batch."""
    try:
        if column.dtype is None or column.kind == "list":
            return pa.array([as_numpy(value) for value in values], type=column.arrow_type)
        if isinstance(values, (list, tuple)):
            return _array_of_values(values, column)
        found = np.asarray(as_numpy(values))
        if found.shape[1:] != column.shape or not np.can_cast(found.dtype, column.dtype, "safe"):
            raise TypeError(f"{found.dtype} of shape {found.shape[1:]}")
        elements = pa.array(found.astype(column.dtype, copy=False).reshape(-1))
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise SchemaMismatch(
            f"column {column.name!r}: the function's values are not {column.text} ({error}): "
            "convert them there, or give the column another type, add_columns(schema=...)"
        ) from error
    if column.kind == "scalar":
        return elements
    size = int(np.prod(column.shape))
    return pa.ExtensionArray.from_storage(
        column.arrow_type, pa.FixedSizeListArray.from_arrays(elements, size)
    )


def _array_of_values(values: Sequence[Any], column: Column) -> pa.Array:
    """Python's numbers, or arrays, one by one: as a writer takes them."""
    store = make_store(column, len(values))
    for row, value in enumerate(values):
        store.put(row, store.convert(value)[0])
    return store.arrow(len(values))
