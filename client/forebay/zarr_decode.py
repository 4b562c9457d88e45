"""Parts of zarr arrays, decoded by zarr's own pipeline of codecs in the thread that wants them.

zarr does its work in an event loop of its own and in threads of that, which a loader's threads
would wait for: their times would be nobody's, and so would be the plan that they read for. Here
each piece of work has a loop that lives as long as the work, and whose threads are none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.api.asynchronous import open_array
from zarr.core.array import AsyncArray
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.buffer.core import default_buffer_prototype

from forebay.zarr_codecs import METADATA_NAMES, check_metadata
from forebay.zarr_version import Version
from forebay_wire.errors import ForebayError, IntegrityError, InvalidRequest

T = TypeVar("T")

READ_ONLY: Final = "a version of a zarr store never changes: open a session (ForebayStore)"


class _Here(asyncio.SelectorEventLoop):
    """An event loop whose threads are none: it does itself, at once, what they are to do."""

    def run_in_executor(  # type: ignore[override]
        self, executor: object, work: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(work(*args))
        except Exception as error:  # noqa: BLE001 - whoever waits for it gets it
            future.set_exception(error)
        return future


def run_here(work: Coroutine[Any, Any, T]) -> T:
    """What *work* returns, done in this thread (in another one if this one is in an event loop)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="forebay-zarr") as pool:
        return pool.submit(_run, work).result()


def _run(work: Coroutine[Any, Any, T]) -> T:
    loop = _Here()
    try:
        return loop.run_until_complete(work)
    finally:
        if rest := asyncio.all_tasks(loop):  # of work that failed
            for task in rest:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        loop.close()


def bounds(request: ByteRequest | None, size: int) -> tuple[int, int]:
    """The bytes [start, stop) that a *request* means of a value of *size*."""
    if request is None:
        return 0, size
    if isinstance(request, RangeByteRequest):
        return request.start, request.end
    if isinstance(request, OffsetByteRequest):
        return request.offset, size
    if isinstance(request, SuffixByteRequest):
        return max(0, size - request.suffix), size
    raise TypeError(f"Unexpected byte_range, got {request}.")


class VersionStore(Store):
    """A version as zarr sees a store: for :func:`run_here`, as it blocks. Thread-safe."""

    supports_writes: bool = False
    supports_deletes: bool = False
    supports_listing: bool = True

    def __init__(self, version: Version) -> None:
        super().__init__(read_only=True)
        self.version = version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VersionStore) and self.version is other.version

    def __hash__(self) -> int:
        return hash(self.version)

    def __str__(self) -> str:
        dataset = self.version.dataset
        return f"forebay://datasets/{dataset.name}/{dataset.version}"

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        place = self.version.places.get(key)
        if place is None:
            return None
        value = self.version.read(key, *bounds(byte_range, place.size))
        buffer = (prototype or default_buffer_prototype()).buffer
        return buffer.from_array_like(np.frombuffer(value or b"", np.uint8))

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, one) for key, one in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self.version.places

    async def set(self, key: str, value: Buffer) -> None:
        raise InvalidRequest(READ_ONLY)

    async def delete(self, key: str) -> None:
        raise InvalidRequest(READ_ONLY)

    async def list(self) -> AsyncIterator[str]:
        for key in sorted(self.version.places):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        start = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        names = {key[len(start) :].partition("/")[0] async for key in self.list_prefix(start)}
        for name in sorted(names):
            yield name


class Decoder:
    """Decodes parts of the arrays of a version. Thread-safe, and safe to use after a fork."""

    def __init__(self, version: Version) -> None:
        self._store = VersionStore(version)
        self._arrays: dict[str, AsyncArray[Any]] = {}

    def array(self, path: str) -> AsyncArray[Any]:
        """The array at *path*. InvalidRequest if there is none that zarr can read, or it takes
        unpickling."""
        found = self._arrays.get(path)
        if found is None:
            self._check_codecs(path)
            try:
                found = run_here(open_array(store=self._store, path=path, mode="r"))
            except ForebayError:
                raise
            except Exception as error:  # codecs and kinds of data are plug-ins, and raise anything
                raise InvalidRequest(
                    f"{self._store} has no array {path!r} that zarr can open: {error}"
                ) from error
            self._arrays[path] = found
        return found

    def _check_codecs(self, path: str) -> None:
        version = self._store.version
        for name in METADATA_NAMES:
            key = f"{path}/{name}" if path else name
            if (value := version.read(key)) is not None:
                check_metadata(key, bytes(value), str(self._store))

    def rows(self, path: str, runs: Sequence[tuple[int, int]]) -> list[NDArray[Any]]:
        """Rows [start, stop) of an array, for each of *runs*: what was never written is its fill
        value. IntegrityError for bytes that its codecs cannot read."""
        array = self.array(path)

        async def one(start: int, stop: int) -> NDArray[Any]:
            try:
                return np.asarray(await array.getitem(slice(start, stop)))
            except (ForebayError, MemoryError):
                raise
            except Exception as error:  # as above
                raise IntegrityError(
                    f"rows {start} to {stop} of array {path!r} of {self._store} cannot be decoded "
                    f"({type(error).__name__}: {error}): write them again"
                ) from error

        async def all_of_them() -> list[NDArray[Any]]:
            return await asyncio.gather(*(one(*run) for run in runs))

        return run_here(all_of_them())
