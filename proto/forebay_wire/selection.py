"""Which rows of a version a selection chooses: the rules that its manifest may carry.

Two kinds of rules name positions of one keyed permutation of all rows and store no row at all
(:class:`Ring`). The third is a stored list of row numbers (:class:`Stored`). The fourth names
positions of a keyed permutation of another selection's rows (:class:`Nested`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.manifest import SelectionManifest
from forebay_wire.order import split_key, split_rows
from forebay_wire.permutation import derive_key, permute, unpermute

SPLIT: Final = "split"
"""One of the shares of a version."""
FOLD: Final = "fold"
"""The training or the test part of one of k folds."""
FOLD_WITHIN: Final = "fold_within"
"""The same of the rows of another selection."""
STORED: Final = "stored"
"""A list of rows, in the blobs of the manifest."""

ROWS: Final = "rows"
"""Encoding: the row numbers, ascending."""
RUNS: Final = "runs"
"""Encoding: of each run of consecutive rows its first position and its first row."""

MAX_DEPTH: Final = 8
"""Selections one within the other."""

ROW: Final = "row"
POSITION: Final = "position"
"""Columns of the blobs of a stored selection."""


@dataclass(frozen=True)
class Ring:
    """The rows permute(start), permute(start + 1), … of all rows under *seed*; behind the last
    position comes the first."""

    seed: int
    start: int
    of: str = ""
    """Manifest id of the version that it was defined of, whose rows the version has; empty: its
    own."""

    def rows(
        self, dataset_manifest: str, num_version_rows: int, places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The rows of the version at these places of the selection."""
        positions = places + self.start
        positions -= np.where(positions >= num_version_rows, num_version_rows, 0)
        return split_rows(self.of or dataset_manifest, num_version_rows, self.seed, positions)

    def places(
        self, dataset_manifest: str, num_version_rows: int, rows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Where *rows* of the version stand; behind the end of the selection if they do not."""
        key = split_key(self.of or dataset_manifest, self.seed)
        positions = unpermute(key, num_version_rows, rows) - self.start
        return np.where(positions < 0, positions + num_version_rows, positions)


@dataclass(frozen=True)
class Stored:
    """Rows in the order of the version, of which shard s has ``counts[s]``."""

    counts: tuple[int, ...]

    @lazy
    def ends(self) -> NDArray[np.int64]:
        """The place after the last one of each shard."""
        return np.cumsum(np.array(self.counts, dtype=np.int64))

    def shards(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards in which the rows at these places of the selection lie."""
        return np.searchsorted(self.ends, places, side="right")


@dataclass(frozen=True)
class Nested:
    """What stands at permute(start), permute(start + 1), … of another selection, under *seed*;
    behind the last position comes the first."""

    parent: Rule
    num_rows: int
    """Of the other selection."""
    of: str
    """Its manifest id, when this one was defined."""
    seed: int
    start: int

    @lazy
    def _key(self) -> bytes:
        return derive_key("fold", self.of, self.seed)

    def parents(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of the other selection that these places are."""
        positions = places + self.start
        positions -= np.where(positions >= self.num_rows, self.num_rows, 0)
        return permute(self._key, self.num_rows, positions)

    def places(self, parents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The inverse; behind the end of this selection for what is not in it."""
        positions = unpermute(self._key, self.num_rows, parents) - self.start
        return np.where(positions < 0, positions + self.num_rows, positions)


Rule = Ring | Stored | Nested


def base_of(rule: Rule, places: NDArray[np.int64]) -> tuple[Ring | Stored, NDArray[np.int64]]:
    """What *rule* stands on, and the places there that *places* are."""
    while isinstance(rule, Nested):
        places = rule.parents(places)
        rule = rule.parent
    return rule, places


def counts_of(rule: Rule) -> tuple[int, ...] | None:
    """Rows of each shard of the version that are chosen, or among which is chosen; None: any."""
    base, _ = base_of(rule, np.empty(0, dtype=np.int64))
    return base.counts if isinstance(base, Stored) else None


def stored_rule(rule: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a rule that stands on stored rows, the part that says how they are stored."""
    return stored_rule(rule["parent"]) if rule["kind"] == FOLD_WITHIN else rule


def rule_of(selection: SelectionManifest) -> Rule:
    """How *selection* chooses. InvalidRequest for a kind that this build does not know."""
    found = _parsed_rule(selection.rule)
    if found is None:
        raise InvalidRequest(
            f"split {selection.name!r} of dataset {selection.dataset!r} follows a rule of kind "
            f"{selection.rule.get('kind')!r} that this build does not know: upgrade Forebay"
        )
    return found


def _parsed_rule(rule: Mapping[str, Any], depth: int = 0) -> Rule | None:
    if rule.get("kind") in (SPLIT, FOLD):
        return Ring(int(rule["seed"]), int(rule["start"]), rule.get("of", ""))
    if rule.get("kind") == STORED and rule.get("encoding") in (ROWS, RUNS):
        return Stored(tuple(rule["counts"]))
    if rule.get("kind") == FOLD_WITHIN and depth < MAX_DEPTH:
        parent = _parsed_rule(rule["parent"], depth + 1)
        numbers = (int(rule[name]) for name in ("seed", "start"))
        if parent is not None:
            return Nested(parent, int(rule["parent_rows"]), rule["of"], *numbers)
    return None


def carried(
    selection: SelectionManifest, manifest: str, version: int, changed: Collection[str]
) -> SelectionManifest | None:
    """*selection* of a *version* that has the same rows, whose manifest is *manifest*. None if
    nobody knows whether it would choose the same: it depends on *changed* columns."""
    rule = _carried_rule(selection.rule, selection.dataset_manifest, changed)
    if rule is None:
        return None
    return replace(selection, version=version, dataset_manifest=manifest, rule=rule)


def _carried_rule(
    rule: Mapping[str, Any], before: str, changed: Collection[str]
) -> dict[str, Any] | None:
    if rule.get("kind") in (SPLIT, FOLD):
        return {"of": before, **rule}
    if rule.get("kind") == STORED:
        definition = rule["definition"]
        columns = definition.get("columns", [] if definition["kind"] == "rows" else None)
        if columns is None or any(name in changed for name in columns):
            return None
        return dict(rule)
    if rule.get("kind") == FOLD_WITHIN:
        parent = _carried_rule(rule["parent"], before, changed)
        return None if parent is None else {**rule, "parent": parent}
    return None


def describe_rule(rule: Mapping[str, Any]) -> str:
    """How the rows were chosen, for people."""
    kind = rule.get("kind")
    if kind == SPLIT:
        return f"split, seed {rule['seed']}"
    if kind == FOLD:
        fold = f"fold {rule['fold']} of {rule['num_folds']}"
        return f"{rule['part']} part of {fold}, seed {rule['seed']}"
    if kind == FOLD_WITHIN:
        fold = f"fold {rule['fold']} of {rule['num_folds']}"
        return f"{rule['part']} part of {fold} within {rule['within']}, seed {rule['seed']}"
    if kind == STORED:
        return describe_definition(rule["definition"])
    return f"rule of kind {kind!r}"


def describe_definition(definition: Mapping[str, Any]) -> str:
    """What a stored selection was computed from, for people."""
    within = f" within {definition['within']}" if definition.get("within") else ""
    if definition["kind"] == "filter":
        return f"filter {definition['text']}{within}"
    if definition["kind"] == "bucket":
        low, high = definition["low"], definition["high"]
        left = "" if low is None else f"{low} <= "
        right = "" if high is None else f" < {high}"
        return f"bucket {left}{definition['text']}{right}{within}"
    return f"list of rows{within}"
