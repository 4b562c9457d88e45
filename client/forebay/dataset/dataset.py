"""One version of a dataset, or a selection of it, to read from: map-style, small, picklable."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay.dataset.cache import shard_cache
from forebay.dataset.layers import Reader, parse_schema, reader_of
from forebay.dataset.schema import Column, Schema
from forebay.dataset.stored_rows import StoredRows
from forebay.transfer import current_endpoint
from forebay_wire.errors import InvalidRequest
from forebay_wire.ids import check_name
from forebay_wire.lazy import lazy
from forebay_wire.manifest import DatasetManifest, SelectionManifest
from forebay_wire.protocol import DataEndpoint
from forebay_wire.selection import Ring, base_of, rule_of

if TYPE_CHECKING:
    from forebay._channel import RpcChannel
    from forebay.dataset.read_plan import ReadPlan
    from forebay.dataset.reading import OrderOptions, Reading
    from forebay.dataset.statistics import ColumnStatistics
    from forebay.dataset.verify import Verified
    from forebay.transfer import Transfer
    from forebay_wire.v1 import datasets_pb2


class Control(Protocol):
    """What a dataset needs the client for: what changes or waits for the catalog, and plans."""

    channel: RpcChannel

    @property
    def transfer(self) -> Transfer: ...

    def describe_dataset(self, name: str) -> datasets_pb2.Dataset: ...

    def read_manifest(self, manifest: str) -> bytes: ...

    def define_splits(
        self, name: str, version: int, shares: Mapping[str, float], seed: int
    ) -> None: ...

    def define_folds(
        self,
        name: str,
        version: int,
        k: int,
        seed: int = 0,
        prefix: str = "fold",
        *,
        within: str = "",
    ) -> None: ...

    def wait_version(self, name: str, version: int, durability: str, timeout: float) -> None: ...


class Dataset:
    """A version (or a split of it), immutable. Thread-safe, fork-safe, and picklable.

    A pickle carries the manifests and the daemon's address for bytes, no connection; each process
    opens its own. ``dataset[i]`` is a dict of numpy values, in the order of the selection.

    ``forebay.DataLoader`` and ``forebay.StreamingDataset`` tell the daemon by themselves what they
    read next. Whoever reads rows in an order of its own does so with :meth:`plan`.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        manifest_id: str,
        endpoint: DataEndpoint,
        *,
        selection: SelectionManifest | None = None,
        selection_id: str = "",
        control: Control | None = None,
    ) -> None:
        self.manifest = manifest
        self.manifest_id = manifest_id
        self.endpoint = endpoint
        self.selection = selection
        self.selection_id = selection_id
        self._control = control
        self._open: tuple[int, Reader] | None = None
        self._open_rows: tuple[int, StoredRows] | None = None
        self._totals: dict[str, int] = {}
        self._rule = None if selection is None else rule_of(selection)
        # Of 100,000 shards this takes milliseconds: here, so that a loader starts without.
        self.num_bytes = manifest.num_bytes
        """Bytes of all shards of the version."""
        self._num_version_rows = int(self.shard_starts[-1])

    # What it is.

    @property
    def name(self) -> str:
        return self.manifest.dataset

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def split(self) -> str | None:
        """Name of the selection; None for the whole version."""
        return None if self.selection is None else self.selection.name

    @property
    def identity(self) -> str:
        """Names exactly these samples in this order: manifest ids of version and selection."""
        return f"{self.manifest_id}/{self.selection_id}"

    @property
    def num_rows(self) -> int:
        """Samples, of the selection if there is one."""
        return self._num_version_rows if self.selection is None else self.selection.num_rows

    @lazy
    def shard_starts(self) -> NDArray[np.int64]:
        """The version's row that each shard begins with and, last, the number of all rows."""
        shards = self.manifest.shards
        starts = np.zeros(len(shards) + 1, dtype=np.int64)
        rows = np.fromiter((shard.num_rows for shard in shards), np.int64, len(shards))
        np.cumsum(rows, out=starts[1:])
        return starts

    @lazy
    def schema(self) -> Schema:
        """The columns; ``schema.arrow`` is the Arrow schema."""
        return parse_schema(self.manifest.schema, f"dataset {self.name!r} v{self.version}")

    def columns(self, names: Sequence[str] | None = None) -> tuple[Column, ...]:
        """The columns called *names*, or all."""
        if names is None:
            return self.schema.columns
        return tuple(self.schema[name] for name in names)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        split = "" if self.selection is None else f" split {self.selection.name}"
        return f"<Dataset {self.name} v{self.version}{split}: {self.num_rows} rows, {self.schema}>"

    # Reading.

    def rows_at(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the version (the ids of samples) that stand at *indices* of the selection."""
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= self.num_rows):
            raise IndexError(
                f"rows {indices.min()} to {indices.max()} are outside dataset {self.name!r} of "
                f"{self.num_rows} rows"
            )
        if self._rule is None:
            return indices
        base, places = base_of(self._rule, indices)
        if isinstance(base, Ring):
            return base.rows(self.manifest_id, self._num_version_rows, places)
        return self._stored_rows.at(places)

    def stored_rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of the version at *places* of the list that its selection stands on."""
        return self._stored_rows.at(places)

    def read(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Columns of *rows of the version* (see :meth:`rows_at`), in that order.

        Numbers and arrays as one array ``(len(rows), *shape)``, others as lists; every byte is
        verified before its first use. Raises IntegrityError, DaemonUnavailable.
        """
        wanted = self.columns(columns)
        return self._reader.read(rows, wanted) if wanted else {}

    def read_flat(
        self,
        rows: NDArray[np.int64],
        columns: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """As :meth:`read`; lists of numbers come end to end, as ``forebay.dataset.lists.Lists``."""
        from forebay.dataset import lists

        wanted = self.columns(columns)
        return lists.read_flat(self._reader, rows, wanted) if wanted else {}

    def list_lengths(self, rows: NDArray[np.int64], column: str) -> NDArray[np.int64]:
        """How many elements the lists of *column* have in *rows of the version*."""
        from forebay.dataset import lists

        found = lists.check_list(self.schema[column])
        return lists.lengths(self._reader.of(found), rows, found)

    def list_pieces(
        self,
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        sizes: NDArray[np.int64],
        column: str,
    ) -> NDArray[Any]:
        """Elements [start, start + size) of the list in each of *rows of the version*, one after
        the other in one array."""
        from forebay.dataset import lists

        found = lists.check_list(self.schema[column])
        return lists.pieces(self._reader.of(found), rows, starts, sizes, found)

    def total_length(self, column: str) -> int:
        """Elements of all lists of *column*, of the selection if there is one: by
        :meth:`statistics`, so all of them are read once. Of 2^52 and more it is rounded."""
        from forebay.dataset import lists

        lists.check_list(self.schema[column])
        found = self._totals.get(column)
        if found is None:
            lengths = self.statistics([column])[column]
            found = round(Fraction(lengths.mean or 0) * lengths.num_values)
            self._totals[column] = found
        return found

    def arranged(self, options: OrderOptions) -> Reading:
        """What a loader reads of it, in the order that its *options* say."""
        from forebay.dataset.reading import DatasetReading

        return DatasetReading(self, options)

    def value(self, row: int, column: str) -> memoryview | None:
        """The value of *row of the version* in a column of bytes or text (as UTF-8), over mapped
        memory and without a copy; None where it is missing. Raises like :meth:`read`."""
        if not 0 <= row < self._num_version_rows:
            raise IndexError(f"row {row} is outside the {self._num_version_rows} of {self.name!r}")
        wanted = self.schema[column]
        if wanted.kind not in ("binary", "string"):
            raise InvalidRequest(f"column {column!r} holds {wanted.text}, not bytes or text")
        return self._reader.of(wanted).value(row, wanted)

    def take(
        self, indices: Sequence[int] | NDArray[np.int64], columns: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Samples at *indices* (of the selection) as one batch of numpy arrays and lists."""
        wanted = np.asarray(indices, dtype=np.int64)
        return self.read(self.rows_at(np.where(wanted < 0, wanted + len(self), wanted)), columns)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample at *index* of the selection: numpy values, text, bytes, arrays."""
        index = operator.index(index)
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(
                f"row {index} is outside dataset {self.name!r} of {self.num_rows} rows"
            )
        index %= self.num_rows
        row = index if self._rule is None else int(self.rows_at(np.array([index]))[0])
        return self._reader.sample(row, self.schema.columns)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Samples at *indices*: what torch's map-style fetcher calls for a whole batch."""
        batch = self.take(indices)
        return [
            {name: values[position] for name, values in batch.items()}
            for position in range(len(indices))
        ]

    def iter_batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows of the version in order, a record batch at a time, over mapped memory; not for
        a split. Of *columns* only the shards that hold them are read."""
        if self.selection is not None:
            raise InvalidRequest(
                f"split {self.selection.name!r} is no sequence of record batches: use table()"
            )
        return self._reader.iterate(self.columns(columns))

    def table(self) -> pa.Table:
        """All rows as an Arrow table, in order; without a copy for a whole version."""
        batches = self._reader.iterate(self.schema.columns)
        table = pa.Table.from_batches(batches, schema=self.schema.arrow)
        if self.selection is None:
            return table
        return table.take(pa.array(self.rows_at(np.arange(len(self), dtype=np.int64))))

    def verify(self, progress: Callable[[int, int], object] = lambda done, total: None) -> Verified:
        """Read every byte of the version and compare it with its digests; see ``damaged`` of what
        is returned. *progress* is told how many bytes are done, and of how many."""
        from forebay.dataset.verify import verify

        return verify(self, progress)

    def statistics(
        self,
        columns: Sequence[str] | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
        *,
        along: Mapping[str, int] | None = None,
    ) -> dict[str, ColumnStatistics]:
        """Counts, extremes, mean and deviation of each column of this version or split; of text,
        bytes and lists those of their lengths.

            dataset.statistics(["image"], along={"image": -1})["image"].channels[0].mean

        Computed once, in one pass over all rows, a record batch at a time, and kept by the daemon
        for as long as the version is there: whoever asks next has them at once. *progress* is told
        how many rows are done, and of how many. *along*: column of arrays to a dimension of one
        sample; ``channels`` has the figures of each entry along it.

        Whole numbers are summed exactly; floats in float64, in the order of the version. A copy
        that came by pickle has no connection: it computes them and keeps nothing.
        """
        from forebay.dataset.kept_statistics import statistics

        return statistics(self, self._control, columns, along or {}, progress)

    def recompute_statistics(
        self,
        columns: Sequence[str] | None = None,
        progress: Callable[[int, int], object] = lambda done, total: None,
        *,
        along: Mapping[str, int] | None = None,
    ) -> dict[str, ColumnStatistics]:
        """As :meth:`statistics`, but all rows are read in any case, and what is kept is replaced:
        for a check, or after damage."""
        from forebay.dataset.kept_statistics import recompute

        return recompute(self, self._client(), columns, along or {}, progress)

    def followed(self) -> tuple[Dataset, ...]:
        """The datasets that a loader moves on with ``follow="latest"``: this one."""
        return (self,)

    def moved_to(self, datasets: Sequence[Dataset]) -> Dataset:
        """What is read instead of this one: the one of *datasets*."""
        (moved,) = datasets
        return moved

    def of_version(
        self,
        manifest: DatasetManifest,
        manifest_id: str,
        selection: SelectionManifest | None,
        selection_id: str,
    ) -> Dataset:
        """Another version of it, or a selection of that."""
        return Dataset(
            manifest,
            manifest_id,
            self.endpoint,
            selection=selection,
            selection_id=selection_id,
            control=self._control,
        )

    def whole(self) -> Dataset:
        """The version that this is a split of."""
        return Dataset(self.manifest, self.manifest_id, self.endpoint, control=self._control)

    # What needs the client.

    def define_selection(
        self,
        name: str,
        *,
        filter: Any = None,
        rows: Any = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Choose rows of this version, or of this split, for ever, to be read with ``split=name``;
        how many they are.

            dataset.define_selection("large", filter=pc.field("length") >= 512)
            dataset.define_selection("checked", rows=[3, 17, 4])

        *filter* is a pyarrow expression, or a list like ``[("length", ">=", 512)]``; rows of which
        it is null are left out. *rows* are numbers of rows of the version, each once (those of a
        batch's ``_ids``). Rows are kept in the order of the version. A filter is computed here, a
        record batch at a time, over the columns that it names; *progress* is told how many rows
        are done, and of how many.

        Repeating the call is a no-op. Raises AlreadyExists if the name has another definition,
        InvalidRequest for an expression that cannot be computed, rows that do not exist (in
        the split), and a selection that would be empty.
        """
        from forebay.dataset import selections  # loads Arrow's engine

        control = self._client()
        check_name("selection", name)
        if (filter is None) == (rows is None):
            raise InvalidRequest("define_selection takes exactly one of filter and rows")
        if rows is not None:
            return selections.define_rows(self, control, name, rows)
        return selections.define_filter(self, control, name, filter, progress)

    def define_buckets(
        self,
        value: Any,
        boundaries: Sequence[float],
        *,
        prefix: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> dict[str, int]:
        """Share this version, or split, out by a number, such as a length; rows of each bucket by
        name.

        *value* is a column or a pyarrow expression (``pc.list_value_length(pc.field("tokens"))``).
        n ascending *boundaries* make n + 1 selections: ``bucket0`` is what lies below the first,
        ``bucket1`` from the first on and below the second, and so on; of a split
        ``train-bucket0``, unless *prefix* says otherwise. All are defined, or none.
        Otherwise as :meth:`define_selection`; rows without a value, and empty buckets, are refused.
        """
        from forebay.dataset import selections

        control = self._client()
        names = prefix or self._prefix("bucket")
        return selections.define_buckets(self, control, value, boundaries, names, progress)

    def define_folds(
        self, k: int, seed: int = 0, *, prefix: str | None = None
    ) -> list[tuple[str, str]]:
        """Define k folds of this version, or of this split, for cross-validation; the names of the
        training and the test part of each: ``[("fold0-train", "fold0-test"), …]``, of a split
        ``"train-fold0-train"`` and so on.

        The test parts share out all rows, at random by *seed*, and their sizes differ by one at
        most. Repeating the call is a no-op; folds that choose other rows under the same names raise
        AlreadyExists: other folds take another *prefix*.
        """
        names, within = prefix or self._prefix("fold"), self.split or ""
        self._client().define_folds(self.name, self.version, k, seed, names, within=within)
        return [(f"{names}{fold}-train", f"{names}{fold}-test") for fold in range(k)]

    def add_columns(
        self,
        function: Callable[[dict[str, Any]], Mapping[str, Any]],
        schema: Mapping[str, Any] | pa.Schema | Schema | None = None,
        *,
        columns: Sequence[str] | None = None,
        replace: bool = False,
        batch_rows: int = 1 << 12,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> int:
        """Compute columns of every row from others, and make them a version; its number.

            dataset.add_columns(lambda rows: {"length": [len(t) for t in rows["text"]]})

        *function* gets *columns* (default: all) of *batch_rows* rows after each other, as
        :meth:`take` gives them, and returns the new columns: name to array, tensor or list, one
        value a row. This version has to be the newest; the rest as ``Client.write_columns``.
        *progress* is told how many rows are done, and of how many.
        """
        from forebay.dataset.write_columns import compute_columns

        if self.selection is not None:
            raise InvalidRequest(
                f"columns have a value for every row of a version, and this is its split "
                f"{self.selection.name!r}: call add_columns on client.dataset({self.name!r})"
            )
        control = self._client()
        return compute_columns(
            control,
            self,
            function,
            schema=schema,
            columns=columns,
            replace=replace,
            batch_rows=batch_rows,
            progress=progress,
        )

    def define_splits(self, shares: Mapping[str, float], seed: int = 0) -> None:
        """Define splits of this version: name to fraction, disjoint, chosen at random by *seed*.

        Repeating the call is a no-op; shares that select other rows raise AlreadyExists. Not for a
        split: :meth:`define_folds` shares that out.
        """
        control = self._client()
        if self.selection is not None:
            raise InvalidRequest(
                f"define_splits shares out all rows of a version, and this is its split "
                f"{self.split!r}: define_folds(k) shares out the rows of a split"
            )
        control.define_splits(self.name, self.version, shares, seed)

    def wait(self, durability: str = "remote", timeout: float = 60.0) -> None:
        """Wait until this version is *durability* ("local", "remote"), or DeadlineExceeded."""
        self._client().wait_version(self.name, self.version, durability, timeout)

    def plan(
        self,
        indices: Iterable[int],
        *,
        name: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> ReadPlan:
        """Tell the daemon that the samples at *indices* will be read, in this order, so that it
        fetches them before their turn; returned when it knows the first of them.

            with dataset.plan(indices) as plan:
                for number, index in enumerate(indices):
                    use(dataset[index])
                    plan.advance(number + 1)

        *indices* count like those of ``dataset[i]``. They are taken from the iterable as reading
        advances, some thousands ahead, so it may be endless; from an iterator, which can be read
        only once, ``for index in plan`` takes them as well. *name* is what ``forebay status``
        shows, and *columns* those that are read, if not all. Each process that reads has a plan of
        its own, of what it reads itself; with workers it belongs to the process that has the
        client.

        Raises IndexError for a row that the dataset does not have, NotFound if the dataset was
        deleted, DaemonUnavailable.
        """
        from forebay.dataset.read_plan import ReadPlan  # loads the calls, which workers need not

        return ReadPlan.start(self, self._client().channel, indices, name, columns)

    def _prefix(self, what: str) -> str:
        """Of the names of selections that share this version, or split, out."""
        return what if self.selection is None else f"{self.selection.name}-{what}"

    def _whole(self, what: str) -> Control:
        if self.selection is not None:
            raise InvalidRequest(
                f"{what} chooses among all rows of a version, and this is its split "
                f"{self.selection.name!r}: call it on client.dataset({self.name!r}, "
                f"{self.version})"
            )
        return self._client()

    @property
    def control(self) -> Control:
        """The client's connection; InvalidRequest in a copy that came by pickle."""
        return self._client()

    def _client(self) -> Control:
        if self._control is None:
            raise InvalidRequest(
                f"this copy of dataset {self.name!r} came by pickle and has no connection: call it "
                "in the process that called client.dataset()"
            )
        return self._control

    # One reader a process.

    @property
    def _reader(self) -> Reader:
        pid = os.getpid()
        if self._open is None or self._open[0] != pid:
            reader = reader_of(self.manifest, self.schema, shard_cache(self.endpoint))
            self._open = (pid, reader)
            return reader
        return self._open[1]

    @property
    def _stored_rows(self) -> StoredRows:
        pid = os.getpid()
        if self._open_rows is None or self._open_rows[0] != pid:
            assert self.selection is not None, "it has a rule"
            cache = shard_cache(self.endpoint)
            found = StoredRows(self.selection, self._num_version_rows, cache)
            self._open_rows = (pid, found)
            return found
        return self._open_rows[1]

    def __getstate__(self) -> dict[str, Any]:
        endpoint = current_endpoint(self.endpoint)  # the daemon may have been restarted since
        nothing = {"_control": None, "_open": None, "_open_rows": None}
        state = {**self.__dict__, "endpoint": endpoint, **nothing}
        for name in ("schema", "shard_starts"):  # rebuilt from the manifest
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
