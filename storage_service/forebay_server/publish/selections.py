"""Selections: what each rule makes of a version, and what of it is there already."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from forebay_server.catalog import queries_datasets as queries
from forebay_server.catalog.engine import Connection
from forebay_server.catalog.queries_datasets import SelectionInfo, VersionInfo
from forebay_server.model import splits as model
from forebay_server.publish.shards import ShardCommit
from forebay_wire.errors import AlreadyExists, IntegrityError, InvalidRequest
from forebay_wire.ids import check_id, check_name
from forebay_wire.limits import KIB, check_limit
from forebay_wire.manifest import SelectionManifest, parse
from forebay_wire.selection import (
    FOLD,
    FOLD_WITHIN,
    MAX_DEPTH,
    ROWS,
    RUNS,
    SPLIT,
    STORED,
    carried,
    describe_rule,
)

MAX_SELECTIONS: Final = 1000
"""Of one version."""

MAX_DEFINITION_BYTES: Final = 64 * KIB

SAME: Final = {
    SPLIT: ("kind", "seed", "start", "stop"),
    FOLD: ("kind", "seed", "start", "stop"),
    FOLD_WITHIN: ("kind", "seed", "start", "stop", "within"),
    STORED: ("kind", "digest"),
}
"""What has to agree of two rules that choose the same rows, besides their number."""


@dataclass(frozen=True)
class NewSelection:
    """Rows of a version that lie in sealed blobs, as a client describes them."""

    name: str
    num_rows: int
    encoding: str
    shards: tuple[ShardCommit, ...]
    counts: tuple[int, ...]
    """Rows chosen of each shard of the version."""
    digest: str
    """Of the row numbers: BLAKE3 of them as u64, in hex."""
    definition_json: str


def splits(
    of: VersionInfo, fractions: Mapping[str, float], seed: int, rows_of: str
) -> list[SelectionManifest]:
    """The manifests of splits of a version, whose rows are those of *rows_of*: name to fraction."""
    for name in fractions:
        check_name("split", name)
    check_limit("splits", len(fractions), MAX_SELECTIONS, "define fewer")
    _check_seed(seed)
    return [
        _selection(
            of,
            name,
            stop - start,
            {"kind": SPLIT, "seed": seed, "start": start, "stop": stop, **_rows_of(rows_of)},
        )
        for name, (start, stop) in model.split_bounds(of.num_rows, fractions).items()
    ]


def folds(
    of: VersionInfo, num_folds: int, seed: int, prefix: str, rows_of: str
) -> list[SelectionManifest]:
    """The manifests of both parts of each fold of a version, whose rows are those of *rows_of*."""
    check_name("fold", prefix)
    check_limit("folds", num_folds, MAX_SELECTIONS // 2, "define fewer")
    _check_seed(seed)
    return [
        _selection(
            of,
            check_name("fold", f"{prefix}{one.fold}-{one.part}"),
            one.stop - one.start,
            {"kind": FOLD, "seed": seed, "num_folds": num_folds, **vars(one), **_rows_of(rows_of)},
        )
        for one in model.folds(of.num_rows, num_folds)
    ]


def _rows_of(manifest: str) -> dict[str, str]:
    """What a rule says of an earlier version with the same rows; nothing if there is none."""
    return {"of": manifest} if manifest else {}


def folds_within(
    of: VersionInfo,
    within: tuple[SelectionInfo, bytes],
    num_folds: int,
    seed: int,
    prefix: str,
) -> list[SelectionManifest]:
    """The same of the rows of a selection of the version."""
    info, data = within
    parent = _parsed(info, data)
    what = {
        "kind": FOLD_WITHIN,
        "within": info.name,
        "of": info.manifest,
        "parent": parent.rule,
        "parent_rows": parent.num_rows,
    }
    if _depth(parent.rule) >= MAX_DEPTH:
        raise InvalidRequest(f"{MAX_DEPTH} selections are within one another already: stop there")
    check_name("fold", prefix)
    check_limit("folds", num_folds, MAX_SELECTIONS // 2, "define fewer")
    _check_seed(seed)
    made = [
        _selection(
            of,
            check_name("fold", f"{prefix}{one.fold}-{one.part}"),
            one.stop - one.start,
            {**what, "seed": seed, "num_folds": num_folds, **vars(one)},
        )
        for one in model.folds(parent.num_rows, num_folds)
    ]
    return [replace(one, shards=parent.shards) for one in made]


def _depth(rule: Mapping[str, Any]) -> int:
    return 1 + (_depth(rule["parent"]) if rule["kind"] == FOLD_WITHIN else 0)


def stored(of: VersionInfo, new: NewSelection) -> SelectionManifest:
    """The manifest of a stored selection; :class:`InvalidRequest` if it contradicts itself."""
    check_name("selection", new.name)
    check_id("digest", new.digest)
    what = f"selection {new.name}"
    if new.encoding not in (ROWS, RUNS):
        raise InvalidRequest(f"{what}: {new.encoding!r} is no encoding of rows")
    if not 0 < new.num_rows <= of.num_rows:
        raise InvalidRequest(f"{what}: {new.num_rows} of {of.num_rows} rows; at least one")
    if len(new.counts) != of.num_shards or sum(new.counts) != new.num_rows:
        raise InvalidRequest(
            f"{what}: {sum(new.counts)} rows of {len(new.counts)} shards are not {new.num_rows} of "
            f"{of.num_shards}"
        )
    if not new.shards or not all(shard.session for shard in new.shards):
        raise InvalidRequest(f"{what}: its rows have to be sealed in upload sessions")
    return _selection(
        of,
        new.name,
        new.num_rows,
        {
            "kind": STORED,
            "encoding": new.encoding,
            "counts": list(new.counts),
            "digest": new.digest,
            "definition": _definition(new),
        },
        new.shards,
    )


def carry_over(
    connection: Connection, base: VersionInfo, made: VersionInfo, changed: Collection[str]
) -> None:
    """Give *made*, which has the rows of *base*, its selections too: those that do not depend on
    *changed* columns. In the transaction that makes it."""
    for info, data in queries.find_selection_manifests(connection, base.dataset, base.version):
        one = carried(_parsed(info, data), made.manifest, made.version, changed)
        if one is None:
            continue
        manifest_id, encoded = one.encode()
        queries.insert_selection(connection, one, manifest_id, encoded)
        queries.enqueue_flush(connection, manifest_id)


def missing(
    of: VersionInfo,
    there: Sequence[tuple[SelectionInfo, bytes]],
    wanted: Sequence[SelectionManifest],
) -> list[SelectionManifest]:
    """Those of *wanted* that are not *there* yet. :class:`AlreadyExists` for a name that chooses
    other rows, and for splits beside other splits."""
    found = {info.name: _parsed(info, data) for info, data in there}
    new = [one for one in wanted if one.name not in found]
    same = [one for one in wanted if one.name in found and _is_same(found[one.name], one)]
    split = {one.name: one for one in found.values() if one.rule["kind"] == SPLIT}
    if (
        split
        and any(one.rule["kind"] == SPLIT for one in wanted)
        and (new or len(same) < len(split))
    ):
        raise AlreadyExists(_other_splits(of, list(split.values())))
    for one in wanted:
        if one.name in found and one not in same:
            raise AlreadyExists(_differs(of, found[one.name], one))
    if len({one.name for one in wanted}) != len(wanted):
        raise InvalidRequest("two selections have the same name")
    check_limit(
        "selections of a version", len(found) + len(new), MAX_SELECTIONS, "delete the dataset"
    )
    return new


def _is_same(one: SelectionManifest, other: SelectionManifest) -> bool:
    if one.num_rows != other.num_rows or one.rule["kind"] != other.rule["kind"]:
        return False
    if one.rule["kind"] == STORED and _text(one) != _text(other):
        return False
    return all(one.rule[key] == other.rule[key] for key in SAME[one.rule["kind"]])


def _text(one: SelectionManifest) -> str:
    return describe_rule(one.rule)


def _differs(of: VersionInfo, known: SelectionManifest, wanted: SelectionManifest) -> str:
    return (
        f"version {of.version} of dataset {of.dataset} has a selection {known.name} already: "
        f"{known.num_rows} rows by {_text(known)}; asked for: {wanted.num_rows} rows by "
        f"{_text(wanted)}. Selections never change: take another name"
    )


def _other_splits(of: VersionInfo, existing: Sequence[SelectionManifest]) -> str:
    shares = ", ".join(f"{one.name} ({one.num_rows} rows, {_text(one)})" for one in existing)
    return (
        f"version {of.version} of dataset {of.dataset} has other splits already: {shares}; they "
        "never change: use them, or append or create another version to split anew"
    )


def _selection(
    of: VersionInfo,
    name: str,
    num_rows: int,
    rule: dict[str, Any],
    shards: Sequence[ShardCommit] = (),
) -> SelectionManifest:
    return SelectionManifest(
        dataset=of.dataset,
        version=of.version,
        dataset_manifest=of.manifest,
        name=name,
        num_rows=num_rows,
        rule=rule,
        shards=tuple(shard.check() for shard in shards),
    )


def _definition(new: NewSelection) -> dict[str, Any]:
    check_limit(
        "bytes of a definition", len(new.definition_json), MAX_DEFINITION_BYTES, "shorten it"
    )
    try:
        value = json.loads(new.definition_json)
        describe_rule({"kind": STORED, "definition": value})
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"selection {new.name}: its definition is none: {error}") from error
    assert isinstance(value, dict), "described above"
    return value


def _check_seed(seed: int) -> None:
    if not math.isfinite(seed) or not -(1 << 63) <= seed < 1 << 63:
        raise InvalidRequest(f"seed {seed} does not fit 64 bits")


def _parsed(info: SelectionInfo, data: bytes) -> SelectionManifest:
    manifest = parse(data, f"selection {info.name}, manifest {info.manifest}", info.manifest)
    if not isinstance(manifest, SelectionManifest):
        raise IntegrityError(f"manifest {info.manifest} is not one of a selection")
    return manifest
