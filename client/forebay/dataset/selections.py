"""Stored selections of a dataset version: filters, lists of rows, buckets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.acero as acero
import pyarrow.compute as pc
from blake3 import blake3
from numpy.typing import NDArray

from forebay.dataset.layers import cell_starts
from forebay.dataset.members import Members, chosen
from forebay.dataset.select import BLOCK_ROWS, Chosen, RowsBuilder
from forebay.methods import Datasets
from forebay_wire.errors import AlreadyExists, IntegrityError, InvalidRequest
from forebay_wire.ids import check_name
from forebay_wire.manifest import SelectionManifest, parse
from forebay_wire.selection import STORED, describe_definition, describe_rule, stored_rule
from forebay_wire.v1 import datasets_pb2

if TYPE_CHECKING:
    from forebay.dataset.dataset import Control, Dataset

Progress = Callable[[int, int], object]
"""Told how many rows were looked at, and of how many."""

Definition = Mapping[str, Any]

DEFINE_SECONDS: Final = 120.0
MAX_TEXT: Final = 2000
"""Characters of an expression that are kept."""

SHORTENED: Final = "..."
"""In the text of an expression that does not show all of it."""


def define_filter(
    of: Dataset, control: Control, name: str, filter: Any, progress: Progress | None
) -> int:
    """See :meth:`forebay.Dataset.define_selection`; the number of rows."""
    what = f"selection {name!r} of dataset {of.name!r} v{of.version}"
    expression = _as_expression(filter, what)
    kind = _evaluate(of.schema.arrow.empty_table(), expression, of, what).type
    if not pa.types.is_boolean(kind):
        raise InvalidRequest(f"{what}: {expression} is {kind}, a filter has to be true or false")
    columns = _columns_of(expression, of)
    definition = {"kind": "filter", "text": _text_of(expression), **_among(of, columns)}

    def choose(values: pa.ChunkedArray) -> list[NDArray[np.int64]]:
        return [np.from_dlpack(pc.indices_nonzero(values)).astype(np.int64)]

    return _define(of, control, {name: definition}, expression, choose, progress)[name]


def define_rows(of: Dataset, control: Control, name: str, rows: Any) -> int:
    """See :meth:`forebay.Dataset.define_selection`; the number of rows."""
    what = f"selection {name!r} of dataset {of.name!r} v{of.version}"
    ordered = _ordered(rows, of, what)
    among = _among(of, ())
    definition = {"kind": "rows", **(among if among["columns"] else _within(of))}
    digest = blake3()
    for start in range(0, len(ordered), BLOCK_ROWS):
        digest.update(ordered[start : start + BLOCK_ROWS].astype("<u8").tobytes())
    known = _known(of, control, [name]).get(name)
    if known is not None and known.rule.get("digest") == digest.hexdigest():
        _check_same(known, definition)
        return known.num_rows
    builder = RowsBuilder(control, of.whole(), name)
    try:
        builder.add(ordered)
        return _commit(of, control, [builder.finish(json.dumps(definition))])[name]
    finally:
        builder.abort()


def define_buckets(
    of: Dataset,
    control: Control,
    value: Any,
    boundaries: Sequence[float],
    prefix: str,
    progress: Progress | None,
) -> dict[str, int]:
    """See :meth:`forebay.Dataset.define_buckets`."""
    what = f"buckets of dataset {of.name!r} v{of.version}"
    expression = pc.field(value) if isinstance(value, str) else value
    if not isinstance(expression, pc.Expression):
        raise InvalidRequest(f"{what}: {value!r} is neither a column nor a pyarrow expression")
    kind = _evaluate(of.schema.arrow.empty_table(), expression, of, what).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise InvalidRequest(
            f"{what}: {expression} is {kind}, not a number; of text take pc.utf8_length, of lists "
            "pc.list_value_length"
        )
    edges = _check_boundaries(boundaries, what)
    both = {"text": _text_of(expression), **_among(of, _columns_of(expression, of))}
    wanted = {
        f"{prefix}{number}": {"kind": "bucket", **both, "low": low, "high": high}
        for number, (low, high) in enumerate(zip([None, *edges], [*edges, None], strict=True))
    }
    found = np.array(edges)

    def choose(values: pa.ChunkedArray) -> list[NDArray[np.int64]]:
        numbers = _as_numbers(values, expression, what)
        buckets = np.searchsorted(found, numbers, side="right")
        return [np.flatnonzero(buckets == number) for number in range(len(wanted))]

    return _define(of, control, wanted, expression, choose, progress)


# Computing.


def _define(
    of: Dataset,
    control: Control,
    wanted: Mapping[str, Definition],
    expression: pc.Expression,
    choose: Callable[[pa.ChunkedArray], list[NDArray[np.int64]]],
    progress: Progress | None,
) -> dict[str, int]:
    """Look at all rows (of the split) once and make *wanted*, unless it is there; rows of each by
    name.

    *choose* gives the places, among some values, of the rows of each of *wanted*.
    """
    known = _known(of, control, list(wanted))
    for name, definition in wanted.items():
        check_name("selection", name)
        if name in known:
            _check_same(known[name], definition)
    if len(known) == len(wanted) and not any(map(_is_shortened, wanted.values())):
        return {name: known[name].num_rows for name in wanted}
    what = f"{'selection' if len(wanted) == 1 else 'buckets'} of dataset {of.name!r} v{of.version}"
    whole = of.whole()
    columns = _columns_of(expression, of)
    builders = {name: RowsBuilder(control, whole, name) for name in wanted}
    try:
        looked = 0
        for rows, table in chosen(of, _tables(whole, columns or of.schema.names[:1])):
            found = choose(_evaluate(table, expression, of, what))
            for builder, places in zip(builders.values(), found, strict=True):
                builder.add(rows[places])
            looked += len(rows)
            if progress is not None:
                progress(looked, of.num_rows)
        if looked != of.num_rows:
            raise IntegrityError(f"{what}: {looked} of {of.num_rows} rows were found")
        _check_not_empty(builders, wanted, of)
        made = [builders[name].finish(json.dumps(wanted[name])) for name in wanted]
        return _commit(of, control, made)
    finally:
        for builder in builders.values():
            builder.abort()


def _commit(of: Dataset, control: Control, made: Sequence[Chosen]) -> dict[str, int]:
    request = datasets_pb2.DefineSelectionsRequest(
        dataset=of.name, version=of.version, selections=[one.message for one in made]
    )
    answer = control.channel.call(Datasets.DefineSelections, request, timeout=DEFINE_SECONDS)
    names = {one.message.name for one in made}
    return {
        one.name: one.num_rows
        for one in answer.selections
        if one.version == of.version and one.name in names
    }


def _tables(of: Dataset, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The version's rows, some at a time; the daemon knows which shards come next."""
    starts = cell_starts(of.manifest, columns)[:-1].tolist()
    name = f"{of.name} v{of.version}, selection"
    with of.plan(starts, name=name, columns=columns) as plan:
        done = place = 0
        for batch in of.iter_batches(columns):
            yield pa.Table.from_batches([batch])
            done += batch.num_rows
            while place < len(starts) and starts[place] < done:
                place += 1
            plan.advance(place)


def _evaluate(
    table: pa.Table, expression: pc.Expression, of: Dataset, what: str
) -> pa.ChunkedArray:
    """*expression* of each row; only the columns that it names are touched."""
    try:
        return _projected(table, expression)
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequest(
            f"{what}: {_text_of(expression)} cannot be computed: {reason}; the columns are "
            f"{of.schema}"
        ) from error


def _projected(table: pa.Table, expression: pc.Expression) -> pa.ChunkedArray:
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
            acero.Declaration("project", acero.ProjectNodeOptions([expression], ["value"])),
        ]
    )
    return plan.to_table(use_threads=False)["value"]


def _columns_of(expression: pc.Expression, of: Dataset) -> list[str]:
    """The columns that *expression* names: those without which it cannot be computed."""
    if "FieldPath(" in re.sub(r'"([^"\\]|\\.)*"', "", str(expression)):
        raise InvalidRequest(
            f"{_text_of(expression)} names columns by number, which may be others in the next "
            "version: name them, as in pc.field('length')"
        )
    found = []
    for name in of.schema.names:
        others = of.schema.arrow.empty_table().drop_columns([name])
        try:
            _projected(others, expression)
        except (pa.ArrowException, TypeError, ValueError, KeyError):
            found.append(name)
    return found


def _as_numbers(values: pa.ChunkedArray, expression: pc.Expression, what: str) -> NDArray[Any]:
    chunks = [np.from_dlpack(chunk.drop_null()) for chunk in values.chunks]
    found: NDArray[Any] = np.concatenate(chunks) if chunks else np.empty(0)
    missing = len(values) - len(found)
    if found.dtype.kind == "f":
        missing += int(np.isnan(found).sum())
    if missing:
        raise InvalidRequest(
            f"{what}: {_text_of(expression)} has no value in some rows, which so belong to no "
            "bucket: give them one with pc.fill_null or pc.if_else"
        )
    return found


# Checks.


def _as_expression(filter: Any, what: str) -> pc.Expression:
    if isinstance(filter, pc.Expression):
        return filter
    from pyarrow.parquet import filters_to_expression

    try:
        return filters_to_expression(filter)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InvalidRequest(
            f"{what}: {filter!r} is no filter ({error}): give a pyarrow expression like "
            "pc.field('length') > 5, or a list like [('length', '>', 5)]"
        ) from error


def _ordered(rows: Any, of: Dataset, what: str) -> NDArray[np.int64]:
    """*rows* in ascending order; InvalidRequest for what is no set of rows of the version."""
    given = np.asarray(rows)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise InvalidRequest(f"{what}: rows are a flat list of whole numbers, not {given.dtype}")
    if not given.size:
        raise InvalidRequest(f"{what} would be empty: give at least one row")
    low, high = int(given.min()), int(given.max())
    num_rows = of.manifest.num_rows
    if low < 0 or high >= num_rows:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"{what}: there is no row {wrong}, rows are 0 to {num_rows - 1}")
    ordered: NDArray[np.int64] = given.astype(np.int64)
    if np.any(ordered[1:] < ordered[:-1]):
        ordered.sort()
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise InvalidRequest(
            f"{what}: row {ordered[twice[0]]} is given twice, and a selection has each row once"
        )
    _check_members(ordered, of, what)
    return ordered


def _check_members(ordered: NDArray[np.int64], of: Dataset, what: str) -> None:
    members = Members(of)
    for start in range(0, len(ordered), BLOCK_ROWS):
        rows = ordered[start : start + BLOCK_ROWS]
        own = members.among(rows)
        if len(own) < len(rows):
            wrong = np.delete(rows, own)[0]
            raise InvalidRequest(
                f"{what}: row {wrong} is not in the split {of.split!r}: rows are those of the "
                "version, as in a batch's _ids"
            )


def _within(of: Dataset) -> dict[str, Any]:
    """What the definition of a selection says of the split that it is made of."""
    return {} if of.split is None else {"within": of.split}


def _among(of: Dataset, columns: Sequence[str]) -> dict[str, Any]:
    """The same, and on which columns it depends: also those that the split depends on."""
    rule = {} if of.selection is None else stored_rule(of.selection.rule)
    before = rule.get("definition", {}).get("columns", [])
    return {"columns": sorted({*columns, *before}), **_within(of)}


def _check_boundaries(boundaries: Sequence[float], what: str) -> list[float]:
    edges = [edge.item() if isinstance(edge, np.generic) else edge for edge in boundaries]
    numbers = all(type(edge) in (int, float) and math.isfinite(edge) for edge in edges)
    if not numbers or not edges or any(a >= b for a, b in pairwise(edges)):
        raise InvalidRequest(f"{what}: {edges} are no boundaries: ascending numbers, at least one")
    return edges


def _check_not_empty(
    builders: Mapping[str, RowsBuilder], wanted: Mapping[str, Definition], of: Dataset
) -> None:
    for name, builder in builders.items():
        if not builder.num_rows:
            raise InvalidRequest(
                f"selection {name!r} of dataset {of.name!r} v{of.version} would be empty: none of "
                f"{of.num_rows} rows is in {describe_definition(wanted[name])}"
            )


def _known(of: Dataset, control: Control, names: Sequence[str]) -> dict[str, SelectionManifest]:
    """Those of *names* that the version has."""
    found: dict[str, SelectionManifest] = {}
    for one in control.describe_dataset(of.name).selections:
        if one.version == of.version and one.name in names:
            where = f"selection {one.name} of dataset {of.name} v{of.version}"
            manifest = parse(control.read_manifest(one.manifest), where, one.manifest)
            assert isinstance(manifest, SelectionManifest), "its row names it"
            found[one.name] = manifest
    return found


def _check_same(known: SelectionManifest, wanted: Definition) -> None:
    if known.rule.get("kind") == STORED and known.rule["definition"] == wanted:
        return
    raise AlreadyExists(
        f"version {known.version} of dataset {known.dataset} has a selection {known.name} already: "
        f"{known.num_rows} rows by {describe_rule(known.rule)}; asked for: "
        f"{describe_definition(wanted)}. Selections never change: take another name"
    )


def _is_shortened(definition: Definition) -> bool:
    return SHORTENED in definition.get("text", "")


def _text_of(expression: pc.Expression) -> str:
    text = " ".join(str(expression).split())
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + SHORTENED
