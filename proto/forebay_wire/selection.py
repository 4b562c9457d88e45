"""Which rows of a version a selection chooses: the rules that its manifest may carry.

Two kinds of rules name positions of one keyed permutation of all rows and store no row at all
(:class:`Ring`). The third is a stored list of row numbers (:class:`Stored`).
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
from forebay_wire.order import split_rows

SPLIT: Final = "split"
"""One of the shares of a version."""
FOLD: Final = "fold"
"""The training or the test part of one of k folds."""
STORED: Final = "stored"
"""A list of rows, in the blobs of the manifest."""

ROWS: Final = "rows"
"""Encoding: the row numbers, ascending."""
RUNS: Final = "runs"
"""Encoding: of each run of consecutive rows its first position and its first row."""

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


@dataclass(frozen=True)
class Stored:
    """Rows in the order of the version, of which shard s has ``counts[s]``."""

    counts: tuple[int, ...]

    @lazy
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum(np.array(self.counts, dtype=np.int64))

    def shards(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shards in which the rows at these places of the selection lie."""
        return np.searchsorted(self._ends, places, side="right")


Rule = Ring | Stored


def rule_of(selection: SelectionManifest) -> Rule:
    """How *selection* chooses. InvalidRequest for a kind that this build does not know."""
    rule = selection.rule
    if rule.get("kind") in (SPLIT, FOLD):
        return Ring(int(rule["seed"]), int(rule["start"]), rule.get("of", ""))
    if rule.get("kind") == STORED and rule.get("encoding") in (ROWS, RUNS):
        return Stored(tuple(rule["counts"]))
    raise InvalidRequest(
        f"split {selection.name!r} of dataset {selection.dataset!r} follows a rule of kind "
        f"{rule.get('kind')!r} that this build does not know: upgrade Forebay"
    )


def carried(
    selection: SelectionManifest, manifest: str, version: int, changed: Collection[str]
) -> SelectionManifest | None:
    """*selection* of a *version* that has the same rows, whose manifest is *manifest*. None if
    nobody knows whether it would choose the same: it depends on *changed* columns."""
    rule = dict(selection.rule)
    if rule.get("kind") in (SPLIT, FOLD):
        rule.setdefault("of", selection.dataset_manifest)
    elif rule.get("kind") == STORED:
        columns = rule["definition"].get("columns")
        if rule["definition"]["kind"] != "rows" and (
            columns is None or any(name in changed for name in columns)
        ):
            return None
    else:
        return None
    return replace(selection, version=version, dataset_manifest=manifest, rule=rule)


def describe_rule(rule: Mapping[str, Any]) -> str:
    """How the rows were chosen, for people."""
    kind = rule.get("kind")
    if kind == SPLIT:
        return f"split, seed {rule['seed']}"
    if kind == FOLD:
        fold = f"fold {rule['fold']} of {rule['num_folds']}"
        return f"{rule['part']} part of {fold}, seed {rule['seed']}"
    if kind == STORED:
        return describe_definition(rule["definition"])
    return f"rule of kind {kind!r}"


def describe_definition(definition: Mapping[str, Any]) -> str:
    """What a stored selection was computed from, for people."""
    if definition["kind"] == "filter":
        return f"filter {definition['text']}"
    if definition["kind"] == "bucket":
        low, high = definition["low"], definition["high"]
        left = "" if low is None else f"{low} <= "
        right = "" if high is None else f" < {high}"
        return f"bucket {left}{definition['text']}{right}"
    return "list of rows"
