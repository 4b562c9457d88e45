"""Samples of zarr arrays along their first axis: what a loader is given to read a zarr store.

    samples = forebay.zarr.samples(client.dataset("weather"), ["t2m", "wind"])
    for batch in forebay.DataLoader(samples, global_batch_size=256, shuffle="block"):
        batch["t2m"]                                           # (rows, 721, 1440)

Sample i is element i of each array. What is decoded together is a *band*: the samples that share
their chunks. Bands are decoded once while they are kept, by zarr's own codecs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from zarr.core.chunk_grids import RegularChunkGrid

from forebay.dataset.bands import Band, process_bands
from forebay.dataset.cache import decoded_bytes
from forebay.dataset.dataset import Dataset
from forebay.dataset.gather import as_run
from forebay.dataset.schema import SCALARS, Array, Column, Schema
from forebay.zarr_decode import Decoder
from forebay.zarr_version import Version
from forebay_wire.errors import InvalidRequest
from forebay_wire.lazy import lazy
from forebay_wire.limits import MIB
from forebay_wire.protocol import DataEndpoint

if TYPE_CHECKING:
    from zarr.core.array import AsyncArray

    from forebay.dataset.reading import OrderOptions, Reading

Numbers = NDArray[np.int64]

COLUMN: Final = "data"
"""The column of a single array."""

NAMED: Final = 20
"""Arrays that a message names."""

PORTION: Final = 4
"""Of what may be kept decoded, a read holds the fourth part at a time: other threads read, too."""

AT_ONCE_BYTES: Final = MIB
"""Bands that are decoded in one go: of small ones several, as each go has its price, and no more
than one of large ones, so that other threads take the next."""

TEXT_BYTES: Final = 64
"""About what a short text takes."""


@dataclass(frozen=True)
class SampleArray:
    """One array, as samples are read from it."""

    path: str
    column: Column
    length: int
    band_rows: int
    """Samples that share their chunks: those that are decoded together."""
    stored_rows: int
    """Samples that share their keys: as many, or those of a shard of zarr."""
    cells: tuple[int, ...]
    """How many keys there are along each of the other axes."""
    stored_bytes: int
    """Of all its keys' values, as they are encoded."""

    @property
    def row_bytes(self) -> int:
        """Of a sample, decoded; of text about, and the same to all that read the version: whoever
        must not take more counts the texts themselves."""
        if self.column.dtype is not None:
            return self.column.fixed_bytes
        return max(TEXT_BYTES, self.stored_bytes // self.length)

    @property
    def num_stored(self) -> int:
        """Runs of samples that share their keys."""
        return -(-self.length // self.stored_rows)


class Samples:
    """Elements along the first axis of arrays of one version, which are as long as each other.

    For ``forebay.DataLoader`` and ``forebay.StreamingDataset``, and map-style: ``samples[i]`` is a
    dict of numpy values. Thread-safe, fork-safe, picklable: each process opens its own connection.
    """

    def __init__(
        self, version: Version, arrays: Sequence[str] | Mapping[str, str] | None = None
    ) -> None:
        """*arrays*: paths, which name the columns, or column to path; default: the arrays of the
        root group. InvalidRequest for one that is not there, and for unequal lengths."""
        self._version = version
        self._decoder = Decoder(version)
        self._arrays = self._find(arrays)
        lengths = {one.path: one.length for one in self._arrays.values()}
        if len(set(lengths.values())) > 1:
            named = ", ".join(f"{path!r} has {size}" for path, size in lengths.items())
            raise InvalidRequest(
                f"{self.title}: samples are elements along the first axis, and the arrays are not "
                f"as long as each other: {named}; choose some of them (arrays=)"
            )
        self.num_rows = next(iter(lengths.values()))

    # What it is.

    @property
    def name(self) -> str:
        """Of the dataset."""
        return self._version.dataset.name

    @property
    def version(self) -> int:
        return self._version.number

    @property
    def manifest_id(self) -> str:
        return self._version.manifest

    @property
    def endpoint(self) -> DataEndpoint:
        return self._version.dataset.endpoint

    @property
    def title(self) -> str:
        return f"{self.name} v{self.version}"

    @lazy
    def schema(self) -> Schema:
        return Schema(tuple(one.column for one in self._arrays.values()))

    def columns(self, names: Sequence[str] | None = None) -> tuple[Column, ...]:
        """The columns called *names*, or all."""
        return tuple(one.column for one in self.arrays(names))

    def arrays(self, names: Sequence[str] | None = None) -> tuple[SampleArray, ...]:
        """The arrays of the columns called *names*, or all."""
        if names is None:
            return tuple(self._arrays.values())
        return tuple(self._arrays[self.schema[name].name] for name in names)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return f"<Samples of {self.title}: {self.num_rows}, {self.schema}>"

    # Reading.

    def read(self, rows: Numbers, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Columns of *rows*, in that order: arrays ``(len(rows), *shape)``, text as lists."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_rows:
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} are outside the {self.num_rows} samples of "
                f"{self.title}"
            )
        return {one.column.name: self._read(one, rows) for one in self.arrays(columns)}

    take = read

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(f"row {index} is outside the {self.num_rows} samples of {self.title}")
        batch = self.read(np.array([index % self.num_rows]))
        return {name: values[0] for name, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Samples at *indices*: what torch's map-style fetcher calls for a whole batch."""
        wanted = np.asarray(indices, dtype=np.int64)
        batch = self.read(np.where(wanted < 0, wanted + self.num_rows, wanted))
        return [
            {name: values[place] for name, values in batch.items()} for place in range(len(wanted))
        ]

    def arranged(self, options: OrderOptions) -> Reading:
        """What a loader reads of it, in the order that its *options* say."""
        from forebay.zarr_reading import ZarrReading

        return ZarrReading(self, options)

    def _read(self, array: SampleArray, rows: Numbers) -> Any:
        column = array.column
        is_text = column.dtype is None
        out = np.empty((len(rows), *column.shape), object if is_text else column.dtype)
        numbers, which = np.unique(rows // array.band_rows, return_inverse=True)
        targets = np.argsort(which, kind="stable")
        borders = np.searchsorted(which[targets], np.arange(len(numbers) + 1))
        limit = decoded_bytes(self.endpoint)
        some = max(1, limit // PORTION // (array.band_rows * array.row_bytes))
        if is_text:  # which may take anything, so that one band is held beside those that are kept
            self._prepare(array, process_bands().missing(self._named(array, numbers.tolist())))
            some = 1
        for start in range(0, len(numbers), some):
            portion = numbers[start : start + some].tolist()
            for place, values in enumerate(self._bands(array, portion, limit), start):
                target = targets[borders[place] : borders[place + 1]]
                source = rows[target] - portion[place - start] * array.band_rows
                out[as_run(target)] = values[as_run(source)]
        return out.tolist() if is_text else out

    def _bands(self, array: SampleArray, numbers: list[int], limit: int) -> list[NDArray[Any]]:
        def decode(bands: Sequence[Band]) -> list[NDArray[Any]]:
            starts = [number * array.band_rows for _, _, number in bands]
            runs = [(start, min(start + array.band_rows, array.length)) for start in starts]
            found = self._decoder.rows(array.path, runs)
            if array.column.dtype is not None:
                return found
            return [values.astype(object) for values in found]

        def prepare(missing: Sequence[Band]) -> None:
            self._prepare(array, missing)

        at_once = max(1, AT_ONCE_BYTES // (array.band_rows * array.row_bytes))
        bands = self._named(array, numbers)
        return process_bands().take(bands, decode, prepare, limit, at_once)

    def _named(self, array: SampleArray, numbers: list[int]) -> list[Band]:
        return [(self.manifest_id, array.path, number) for number in numbers]

    def _prepare(self, array: SampleArray, missing: Sequence[Band]) -> None:
        """Open what holds these bands, many at a time."""
        per = array.band_rows
        stored = {number * per // array.stored_rows for _, _, number in missing}
        self._version.open(key for one in sorted(stored) for key in self.keys(array, one))

    def keys(self, array: SampleArray, stored: int) -> list[str]:
        """The keys that hold run number *stored* of an array's samples."""
        metadata = self._decoder.array(array.path).metadata
        start = f"{array.path}/" if array.path else ""
        return [
            start + metadata.encode_chunk_key((stored, *cell))
            for cell in itertools.product(*map(range, array.cells))
        ]

    @property
    def stored(self) -> Version:
        """The version's keys and values."""
        return self._version

    # What there is to read.

    def _find(self, wanted: Sequence[str] | Mapping[str, str] | None) -> dict[str, SampleArray]:
        if isinstance(wanted, str):
            raise InvalidRequest(f"arrays={wanted!r}: give a list of paths, [{wanted!r}]")
        there = self._paths()
        if wanted is None:
            wanted = [path for path in there if "/" not in path]
        paths = wanted if isinstance(wanted, Mapping) else {path or COLUMN: path for path in wanted}
        paths = {name: path.strip("/") for name, path in paths.items()}
        missing = [path for path in paths.values() if path not in there]
        if missing or not paths:
            more = ", …" if len(there) > NAMED else ""
            raise InvalidRequest(
                f"{self.title} has no array {missing[0] if missing else 'to read'!r}: it has "
                f"{', '.join(map(repr, there[:NAMED])) or 'none'}{more}"
            )
        return {name: self._array(name, path) for name, path in paths.items()}

    def _paths(self) -> list[str]:
        """Of all arrays."""
        found = []
        for key in sorted(self._version.places):
            path, _, name = key.rpartition("/")
            if name == ".zarray" or (name == "zarr.json" and self._is_array(key)):
                found.append(path)
        return found

    def _is_array(self, key: str) -> bool:
        try:
            described = json.loads(bytes(self._version.read(key) or b"{}"))
        except ValueError as error:
            raise InvalidRequest(f"{self.title}: {key!r} is no JSON: {error}") from error
        return isinstance(described, dict) and described.get("node_type") == "array"

    def _array(self, name: str, path: str) -> SampleArray:
        array = self._decoder.array(path)
        where = f"array {path!r} of {self.title}"
        if not array.shape or 0 in array.shape:
            raise InvalidRequest(
                f"{where} has the shape {array.shape}, so no samples: leave it out"
            )
        grid = array.metadata.chunk_grid
        if not isinstance(grid, RegularChunkGrid):
            raise InvalidRequest(f"{where} has chunks of a grid that is not regular")
        stored = grid.chunk_shape
        return SampleArray(
            path,
            _column(name, array, where),
            array.shape[0],
            array.chunks[0],
            stored[0],
            tuple(-(-size // part) for size, part in zip(array.shape[1:], stored[1:], strict=True)),
            self._stored_bytes(path) if array.ndim == 1 else 0,
        )

    def _stored_bytes(self, path: str) -> int:
        start = f"{path}/" if path else ""
        places = self._version.places
        return sum(place.size for key, place in places.items() if key.startswith(start))


def _column(name: str, array: AsyncArray[Any], where: str) -> Column:
    dtype = np.dtype(array.dtype)
    if dtype.kind in "UTO" and array.ndim == 1:
        return Schema.of({name: "string"})[name]
    if dtype.name not in SCALARS:
        raise InvalidRequest(
            f"{where} holds {dtype} of {array.ndim} dimensions, which no tensor does: of text "
            f"there may be one dimension, and numbers are {', '.join(SCALARS)}"
        )
    shape = array.shape[1:]
    return Schema.of({name: Array(dtype.name, shape) if shape else dtype.name})[name]


def samples_of(
    dataset: Dataset, arrays: Sequence[str] | Mapping[str, str] | None = None
) -> Samples:
    """The samples of a version of a zarr store."""
    return Samples(Version(dataset), arrays)
