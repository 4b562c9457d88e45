"""Wrappers around any tier: what is measured or made slow stays out of the tiers themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from forebay_server.tier.course import doing
from forebay_server.tier.store import FileInfo, RoomPromise, Tier, TierReader, TierSpace, TierWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

Record = Callable[[str, str, int, float, bool], None]
"""``record(tier, operation, bytes, seconds, failed)``; called from any thread, and cheap: opening a
blob for a client waits for it."""


class TierWrapper(Tier):
    """Passes everything on, every call through :meth:`around`: subclasses override that.

    What surrounds each call in production also overrides :meth:`read`, without a generator: it is
    on the way of every blob that is opened.
    """

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name
        self.kind = inner.kind
        self.location = inner.location
        self.is_foreign = inner.is_foreign
        self.caches_only = inner.caches_only
        self.encoding = inner.encoding

    @property
    def health(self) -> str:
        return self.inner.health

    def answers(self) -> bool:
        return self.inner.answers()

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        """Surrounds one call of *operation* (a method's name) on file *name*."""
        yield

    def open(self) -> None:
        with self.around("open", "", 0):
            self.inner.open()

    def close(self) -> None:
        self.inner.close()

    def blob_name(self, file: str) -> str:
        return self.inner.blob_name(file)

    def create(self, name: str, expected_bytes: int) -> TierWriter:
        with self.around("create", name, 0):
            return _Writer(self, name, self.inner.create(name, expected_bytes))

    def reserve(self, num_bytes: int) -> RoomPromise:
        return self.inner.reserve(num_bytes)

    def read(self, name: str) -> TierReader:
        with self.around("read", name, 0):
            return self.surround(name, self.inner.read(name))

    def read_whole(self, name: str, num_bytes: int) -> TierReader:
        with self.around("read", name, 0):
            return self.surround(name, self.inner.read_whole(name, num_bytes))

    def surround(self, name: str, inner: TierReader) -> TierReader:
        """*inner*, its reads through :meth:`around`."""
        return _Reader(self, name, inner)

    def read_medium(self, name: str) -> TierReader:
        with self.around("read_medium", name, 0):
            return self.surround(name, self.inner.read_medium(name))

    def head(self, name: str) -> int | None:
        with self.around("head", name, 0):
            return self.inner.head(name)

    def delete(self, name: str) -> None:
        with self.around("delete", name, 0):
            self.inner.delete(name)

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        with self.around("list", prefix, 0):
            yield from self.inner.list(prefix)

    def space(self) -> TierSpace:
        return self.inner.space()

    def sweep(self) -> None:
        with self.around("sweep", "", 0):
            self.inner.sweep()


class MeteredTier(TierWrapper):
    """Tells *record* how long each call took and how many bytes it moved."""

    def __init__(self, inner: Tier, record: Record) -> None:
        super().__init__(inner)
        self._record = record

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        started = time.perf_counter()
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            self._record(self.name, operation, num_bytes, time.perf_counter() - started, failed)

    def read(self, name: str) -> TierReader:
        started = time.perf_counter()
        found: TierReader | None = None
        try:
            found = self.inner.read(name)
        finally:
            self._record(self.name, "read", 0, time.perf_counter() - started, found is None)
        return self.surround(name, found)


class ThrottledTier(TierWrapper):
    """A slower tier: each call takes *latency_seconds* more, bytes move at *bytes_per_second*."""

    def __init__(self, inner: Tier, latency_seconds: float, bytes_per_second: float) -> None:
        super().__init__(inner)
        self._latency_seconds = latency_seconds
        self._bytes_per_second = bytes_per_second

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        started = time.monotonic()
        yield
        due = started + self._latency_seconds
        time.sleep(max(0.0, due - time.monotonic()))
        due += num_bytes / self._bytes_per_second
        with doing("throttle"):
            time.sleep(max(0.0, due - time.monotonic()))


class _Writer(TierWriter):
    def __init__(self, tier: TierWrapper, name: str, inner: TierWriter) -> None:
        self.num_bytes = inner.num_bytes
        self._tier = tier
        self._name = name
        self._inner = inner

    def write(self, buffer: ReadableBuffer) -> None:
        with self._tier.around("write", self._name, memoryview(buffer).nbytes):
            self._inner.write(buffer)
        self.num_bytes = self._inner.num_bytes

    def keep_cached(self) -> None:
        self._inner.keep_cached()

    def open_early(self) -> int:
        with self._tier.around("open_early", self._name, 0):
            return self._inner.open_early()

    def publish(self) -> None:
        with self._tier.around("publish", self._name, 0):
            self._inner.publish()
        self.is_proven = self._inner.is_proven

    def abort(self) -> None:
        self._inner.abort()


class _Reader(TierReader):
    def __init__(self, tier: TierWrapper, name: str, inner: TierReader) -> None:
        self.size_bytes = inner.size_bytes
        self.where = inner.where
        self._tier = tier
        self._name = name
        self._inner = inner

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        with self._tier.around("read_into", self._name, memoryview(buffer).nbytes):
            self._inner.read_into(offset, buffer)

    def view(self, offset: int, num_bytes: int) -> memoryview | None:
        found = self._inner.view(offset, num_bytes)
        if found is not None:
            with self._tier.around("read_into", self._name, num_bytes):
                pass
        return found

    def fileno(self) -> int | None:
        return self._inner.fileno()

    def detach(self) -> int:
        return self._inner.detach()

    def close(self) -> None:
        self._inner.close()
