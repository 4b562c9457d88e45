"""Packed windows in an order: what a loader reads of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from forebay.dataset.advice import PlanFit
from forebay.dataset.holes import Hole
from forebay.dataset.lists import check_list
from forebay.dataset.plan import PlanNews
from forebay.dataset.reading import (
    ListSamples,
    Numbers,
    OrderOptions,
    PlanParameters,
    Reading,
    Reporter,
)
from forebay.dataset.schema import Column
from forebay.dataset.states import check_state, whole_numbers
from forebay_wire.errors import InvalidRequest, SchemaMismatch
from forebay_wire.order import LastBatch
from forebay_wire.packing import (
    MAX_GROUPS,
    NO_WINDOW,
    OFFSET_BITS,
    WindowCut,
    best_fit,
    group_of,
    pieces,
    place_of,
)

if TYPE_CHECKING:
    from forebay.dataset.packing import Packed

STATE_FORMAT: Final = 1
STATE_FORMAT_BEST: Final = 2
"""Of fit="best"."""

KEPT_DOCUMENTS: Final = 1 << 20
"""Documents of the groups that are kept laid out: 16 MiB."""

KEPT_EPOCHS: Final = 2


class PackedReading:
    """Packed windows in an order. A position is a place: group · 2^32 + token."""

    def __init__(self, packed: Packed, options: OrderOptions) -> None:
        if options.lanes not in (None, 1):
            raise InvalidRequest("packed windows have no lanes: leave lanes= out")
        if options.columns is not None and set(options.columns) != set(packed.packed_columns):
            raise InvalidRequest(
                f"packed windows have the column {packed.column!r} alone, and those packed beside "
                "it: leave columns= out"
            )
        self.packed_columns = tuple(
            check_list(column) for column in packed.samples.columns(packed.packed_columns)
        )
        self.column, *others = self.packed_columns
        for what, token in (("separator", packed.separator), ("pad", packed.pad)):
            _check_token(what, token, self.column.dtype)
        for column in others:
            _check_token(f"beside {column.name!r}:", packed.beside[column.name], column.dtype)
        own = replace(options, lanes=1 if options.shuffle == "block" else None)
        self.packed = packed
        self.inner: Reading = packed.samples.arranged(replace(own, columns=packed.packed_columns))
        self._epochs: dict[int, PackedSamples] = {}

    has_lanes = False
    can_mask = False
    columns: tuple[Column, ...] = ()

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def title(self) -> str:
        return f"{self.inner.title} packed by {self.packed.length}"

    @property
    def row_bytes(self) -> float:
        sizes = [one.dtype.itemsize for one in self.packed_columns if one.dtype is not None]
        return self.packed.length * (sum(sizes) + 9)  # document, position, mask

    def check(self, global_batch_size: int, last_batch: LastBatch) -> None:
        pass  # nobody knows how many windows there are

    def epoch(self, epoch: int, lanes: int) -> PackedSamples:
        del lanes
        found = self._epochs.get(epoch)
        if found is None:
            inner = cast(ListSamples, self.inner.epoch(epoch, 1))
            found = PackedSamples(self.packed, inner, self.packed_columns)
            recent = sorted(self._epochs.items())[-KEPT_EPOCHS + 1 :]
            self._epochs = {**dict(recent), epoch: found}
        return found

    def cut(
        self, epoch: int, position: int, global_batch_size: int, last_batch: LastBatch, lanes: int
    ) -> WindowCut:
        groups = self.epoch(epoch, lanes)
        return WindowCut(groups, self.packed.packing, global_batch_size, last_batch, position)

    # Where reading stands.

    def state(self, epoch: int, position: int, lanes: int) -> dict[str, Any]:
        del lanes
        group, offset = group_of(position)
        first = min(group * self.packed.group_samples, self._num_samples)
        return {
            **self._own_state(),
            "epoch": epoch,
            "group": group,
            "offset": offset,
            "samples": self.inner.state(epoch, first, 1),
        }

    def restored(self, state: Mapping[str, Any], lanes: int | None) -> tuple[int, int, int]:
        del lanes
        check_state(state, self._own_state())
        epoch, group, offset = whole_numbers(state, "epoch", "group", "offset")
        samples = state.get("samples")
        if not isinstance(samples, Mapping):
            raise InvalidRequest("loader state lacks 'samples': it is not complete")
        first = min(group * self.packed.group_samples, self._num_samples)
        if self.inner.restored(samples, 1)[:2] != (epoch, first) or offset >> OFFSET_BITS:
            raise InvalidRequest(
                f"the state stands at token {offset} of group {group} of epoch {epoch}, and its "
                "samples elsewhere: pass what state_dict() returned"
            )
        return epoch, place_of(group, offset), 1

    def _own_state(self) -> dict[str, Any]:
        packed = self.packed
        own = {
            "format": STATE_FORMAT,
            "kind": "packed",
            "column": packed.column,
            "group_samples": packed.group_samples,
            "separator": packed.separator,
        }
        if packed.packing.fit != "best":
            return own
        # The order of a group's tokens depends on these.
        of_layout = {"fit": "best", "length": packed.length, "tail": packed.packing.tail}
        return {**own, "format": STATE_FORMAT_BEST, **of_layout}

    @property
    def _num_samples(self) -> int:
        return len(self.packed.samples)

    def reporter(self, loader: str, parameters: PlanParameters) -> Reporter:
        """The plan of the samples: each rank looks at all those of a group."""
        own = PlanParameters(
            self.packed.group_samples, "keep", 0, 1, 1, num_epochs=parameters.num_epochs
        )
        inner = self.inner.reporter(f"{loader}, packed by {self.packed.length}", own)
        return PackedReporter(inner, self.packed.group_samples, self._num_samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}


@dataclass(frozen=True)
class Group:
    """The stream of one group, piece by piece."""

    rows: Numbers
    """Of each piece's document."""
    ends: Numbers
    """Where pieces end in the stream."""
    starts: Numbers | None = None
    """Their first tokens, counted from their documents' starts; None: pieces are documents."""
    borders: Numbers | None = None
    """Where windows end, if that was decided for the group as a whole."""


class PackedSamples:
    """One epoch of packed windows. Rows are places."""

    def __init__(self, packed: Packed, inner: ListSamples, columns: Sequence[Column]) -> None:
        self._packed = packed
        self._inner = inner
        self._columns = columns
        self._groups: dict[int, Group] = {}
        if self.num_groups > MAX_GROUPS:
            raise InvalidRequest(
                f"{self.num_groups} groups; allowed: {MAX_GROUPS}: make group_samples larger"
            )

    @property
    def num_samples(self) -> int:
        """Documents of the epoch: how many windows they make shows as they are read."""
        return self._inner.num_samples

    @property
    def epoch(self) -> int:
        return self._inner.epoch

    @property
    def num_groups(self) -> int:
        return -(-self._inner.num_samples // self._packed.group_samples)

    def ends(self, group: int) -> Numbers:
        """Where the documents of a group, or their pieces, end in its stream."""
        return self._group(group).ends

    def borders(self, group: int) -> Numbers | None:
        """Where windows end in it, if the group as a whole decides that."""
        return self._group(group).borders

    def _group(self, number: int) -> Group:
        found = self._groups.get(number)
        if found is None:
            found = self._lay_out(number)
            kept = max(1, KEPT_DOCUMENTS // self._packed.group_samples)
            recent = list(self._groups.items())[-kept:]
            self._groups = {**dict(recent), number: found}
        return found

    def _lay_out(self, number: int) -> Group:
        """The stream of a group, of the documents that hold anything."""
        size, packing = self._packed.group_samples, self._packed.packing
        stop = min((number + 1) * size, self._inner.num_samples)
        rows = self._inner.rows(np.arange(number * size, stop, dtype=np.int64))
        lengths = self._inner.list_lengths(rows, self._packed.column)
        for name in self._packed.beside:
            self._check_lengths(name, rows, lengths)
        rows, lengths = rows[lengths > 0], lengths[lengths > 0]
        lengths = lengths + (self._packed.separator is not None)
        if int(lengths.sum()) >> OFFSET_BITS:
            raise InvalidRequest("a group of 2^32 tokens or more: make group_samples smaller")
        if packing.fit != "best":
            return Group(rows, np.cumsum(lengths))
        made = best_fit(lengths, packing.width, packing.tail)
        return Group(rows[made.documents], np.cumsum(made.sizes), made.starts, made.borders)

    def _check_lengths(self, name: str, rows: Numbers, lengths: Numbers) -> None:
        others = self._inner.list_lengths(rows, name)
        wrong = np.flatnonzero(others != lengths)
        if len(wrong):
            first = wrong[0]
            where = ", ".join(
                f"{key.strip('_')} {values[0]}"
                for key, values in self._inner.ids(rows[first : first + 1]).items()
            )
            raise SchemaMismatch(
                f"column {name!r} is packed beside {self._packed.column!r}, and in row ({where}) "
                f"it has {others[first]} elements for {lengths[first]} tokens: they must be as many"
            )

    def rows(self, positions: Numbers) -> Numbers:
        return positions

    def read(self, rows: Numbers, columns: Sequence[str] | None) -> dict[str, Any]:
        del columns
        width = self._packed.length
        documents, starts, sizes, windows = self._pieces(rows)
        filled = np.bincount(windows, weights=sizes, minlength=len(rows)).astype(np.int64)
        mask = np.arange(width) < filled[:, None]
        ends = np.cumsum(sizes)
        first = np.searchsorted(windows, windows)  # of the window's pieces
        return {
            **self._values(documents, starts, sizes, mask),
            "_documents": _spread(mask, np.repeat(np.arange(len(windows)) - first, sizes)),
            "_positions": _spread(
                mask, np.arange(int(sizes.sum())) - np.repeat(ends - sizes, sizes), outside=0
            ),
            "_mask": mask,
        }

    def _values(
        self, rows: Numbers, starts: Numbers, sizes: Numbers, mask: NDArray[np.bool_]
    ) -> dict[str, NDArray[Any]]:
        """Of each column the windows' elements, from pieces of *rows* in their order."""
        packed = self._packed
        own, is_token = sizes, None
        if packed.separator is not None:
            lengths = self._inner.list_lengths(rows, packed.column)
            own = np.minimum(sizes, lengths - starts)  # without the separator at the end
            is_token = np.ones(int(sizes.sum()), dtype=np.bool_)
            is_token[np.cumsum(sizes)[own < sizes] - 1] = False
        found = {}
        for column in self._columns:
            pad = packed.beside.get(column.name, packed.pad)
            between = packed.beside.get(column.name, packed.separator or 0)
            flat = self._inner.list_pieces(rows, starts, own, column.name)
            if is_token is not None:
                read, flat = flat, np.full(len(is_token), between, dtype=column.dtype)
                flat[is_token] = read
            found[column.name] = _spread(mask, flat, column.dtype, pad)
        return found

    def _pieces(self, places: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Of each piece, window by window: its row, its first token there, its tokens, and its
        window. An empty window has none."""
        groups, offsets = places >> OFFSET_BITS, places & ((1 << OFFSET_BITS) - 1)
        parts = []
        for group in np.unique(groups[places != NO_WINDOW]).tolist():
            target = np.flatnonzero(groups == group)
            made = self._group(group)
            starts = offsets[target]
            stops = self._packed.packing.stops(made.ends, starts, made.borders)
            found = pieces(made.ends, starts, stops)
            within = (
                found.starts
                if made.starts is None
                else (found.starts + made.starts[found.documents])
            )
            rows = made.rows[found.documents]
            parts.append((rows, within, found.sizes, target[found.windows]))
        if not parts:
            parts = [(np.empty(0, dtype=np.int64),) * 4]
        documents, first, sizes, windows = (
            np.concatenate(part) for part in zip(*parts, strict=True)
        )
        order = np.argsort(windows, kind="stable")
        return documents[order], first[order], sizes[order], windows[order]

    def read_masked(
        self, rows: Numbers, columns: Sequence[str] | None
    ) -> tuple[dict[str, Any], list[Hole]]:
        raise InvalidRequest("packed windows have no holes")

    def ids(self, rows: Numbers) -> dict[str, Numbers]:
        documents, _, sizes, windows = self._pieces(rows)
        filled = np.bincount(windows, weights=sizes, minlength=len(rows)).astype(np.int64)
        mask = np.arange(self._packed.length) < filled[:, None]
        return {
            name: _spread(mask, np.repeat(ids, sizes), np.int64)
            for name, ids in self._inner.ids(documents).items()
        }


def _spread(
    mask: NDArray[np.bool_], values: NDArray[Any], dtype: Any = np.int32, outside: float = -1
) -> NDArray[Any]:
    """*values* where *mask* is True, one after the other."""
    if len(values) == mask.size:
        whole: NDArray[Any] = values.astype(dtype).reshape(mask.shape)
        return whole
    found = np.full(mask.shape, outside, dtype=dtype)
    found[mask] = values
    return found


def _check_token(what: str, token: float | None, dtype: np.dtype[Any] | None) -> None:
    if token is None or dtype is None or dtype.kind not in "iu":
        return
    bounds = np.iinfo(dtype)
    if not bounds.min <= token <= bounds.max or token != int(token):
        raise InvalidRequest(f"{what}={token} is no {dtype}: {bounds.min} to {bounds.max}")


class PackedReporter:
    """The plan of the samples that windows are packed from, told as if it were the windows'."""

    def __init__(self, inner: Reporter, group_samples: int, num_samples: int) -> None:
        self._inner = inner
        self._sizes = (group_samples, num_samples)

    @property
    def plan(self) -> str:
        return self._inner.plan

    @property
    def news(self) -> PlanNews:
        return self._inner.news

    def account(self, account: Callable[[PlanFit], dict[str, Any]]) -> None:
        self._inner.account(account)

    def stand(self, epoch: int, position: int) -> None:
        group_samples, num_samples = self._sizes
        self._inner.stand(epoch, min(group_of(position)[0] * group_samples, num_samples))

    def end(self) -> None:
        self._inner.end()
