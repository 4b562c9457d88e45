"""Objects in a store."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from forebay_server.tier.buffers import BufferPool
from forebay_server.tier.fsspec_client import FsspecClient
from forebay_server.tier.parts import MAX_WHOLE_BYTES, ObjectReader, ObjectWriter, PartSender
from forebay_server.tier.place import UNFINISHED_FOLDER, Place
from forebay_server.tier.retry import Retrier
from forebay_server.tier.space import UNBOUNDED, SpaceLedger
from forebay_server.tier.store import FileInfo, TierReader, TierWriter
from forebay_server.tier.store_client import (
    ObjectInfo,
    PartStoreClient,
    StoreClient,
    StoreFault,
)
from forebay_wire.errors import NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.limits import MIB, check_limit

logger = logging.getLogger(__name__)

LEFT_OVER_SECONDS: Final = 24 * 3600.0
"""Age at which an unfinished upload is a dead writer's: longer than any upload takes."""

TAIL_BYTES: Final = 4096
"""Read as an object is opened: a segment table, unless the blob is large, and what points to it."""


WHOLE_BUFFERS: Final = BufferPool(8, 8 * MIB)
"""For small objects that come with the call that opens them."""


class StorePlace(Place):
    """A store behind a client. Thread-safe."""

    def __init__(
        self,
        tier: str,
        client: StoreClient,
        where: str,
        left_over_seconds: float,
        *,
        must_be_exclusive: bool = True,
    ) -> None:
        """*must_be_exclusive* False: the store is not asked to create objects only if they do not
        exist; who writes looks before, which is no promise."""
        client.is_exclusive = must_be_exclusive
        self._client = client
        self._where = where
        self._left_over_seconds = left_over_seconds
        self._retrier = Retrier(where)
        self._parts = PartSender(tier, client)

    def connect(self) -> None:
        doing = "opening it"
        try:
            self._retrier.attempt(doing, self._client.open)
        except StoreFault as fault:
            raise self._retrier.refusal(doing, fault) from None

    def has_any(self, prefix: str) -> bool:
        return next(self.list(prefix), None) is not None

    def open(self) -> None:
        is_exclusive = self._client.is_exclusive
        doing = "checking that objects can be written and read"
        if is_exclusive:
            doing = "checking that objects can be created only if they do not exist"
        try:
            self._retrier.attempt(doing, self._probe if is_exclusive else self._probe_plainly)
        except StoreFault as fault:
            raise self._retrier.refusal(doing, fault) from None
        self.sweep()

    def close(self) -> None:
        self._parts.close()
        self._client.close()

    def create(self, name: str, expected_bytes: int, ledger: SpaceLedger) -> TierWriter:
        if not isinstance(self._client, PartStoreClient):
            check_limit(
                f"bytes of object {name}",
                expected_bytes,
                MAX_WHOLE_BYTES,
                "write smaller blobs, or use S3 or a directory as the object tier",
            )
        reservation = ledger.reserve(expected_bytes)
        return ObjectWriter(self._parts, self._retrier, self._where, name, reservation)

    def read_whole(self, name: str, where: str, num_bytes: int) -> TierReader:
        buffer = WHOLE_BUFFERS.take_if_free() if num_bytes <= WHOLE_BUFFERS.buffer_bytes else None
        if buffer is None:
            return self.read(name, where)
        try:
            tail = buffer[:num_bytes]
            info = self._client.tail_into(name, tail)
            if info is not None:
                tail = tail[: info.size_bytes]
                give_back = partial(WHOLE_BUFFERS.give_back, buffer)
                return ObjectReader(self._client, self._retrier, info, where, tail, give_back)
        except BaseException:
            WHOLE_BUFFERS.give_back(buffer)
            raise
        WHOLE_BUFFERS.give_back(buffer)
        return self.read(name, where)  # which tries again, and says what is wrong

    def read(self, name: str, where: str) -> TierReader:
        found = self._retrier.run(f"looking up file {name}", partial(self._tail, name))
        if found is None:
            raise NotFound(f"there is no such file ({where})")
        return ObjectReader(self._client, self._retrier, found[0], where, found[1])

    def head(self, name: str) -> int | None:
        info = self._look_up(name)
        return None if info is None else info.size_bytes

    def delete(self, name: str) -> int | None:
        info = self._look_up(name)
        if info is None:
            return None
        self._retrier.run(f"deleting file {name}", lambda: self._client.delete(name))
        return info.size_bytes

    def list(self, prefix: str) -> Iterator[FileInfo]:
        after = ""
        while True:
            infos, after = self._retrier.run(
                "listing files", partial(self._client.list_page, prefix, after)
            )
            for info in infos:
                if not info.key.startswith(f"{UNFINISHED_FOLDER}/"):
                    yield FileInfo(info.key, info.size_bytes, info.modified_unix)
            if not after:
                return

    def sweep(self) -> None:
        client = self._client
        if not isinstance(client, PartStoreClient):
            return
        found = self._retrier.run("listing unfinished uploads", client.unfinished)
        for one in found:
            if one.age_seconds < self._left_over_seconds or self._parts.is_alive(one.upload):
                continue
            logger.info("dropping the upload of %s that ended unfinished", one.key)
            self._retrier.run(
                f"aborting the unfinished upload of {one.key}",
                partial(client.abort, one.key, one.upload),
            )
        if not client.parts_are_exclusive:
            self._sweep_claims()

    def _sweep_claims(self) -> None:
        after, oldest = "", time.time() - self._left_over_seconds
        while True:
            infos, after = self._retrier.run(
                "listing claims", partial(self._client.list_page, f"{UNFINISHED_FOLDER}/", after)
            )
            for info in infos:
                if info.modified_unix < oldest and not self._parts.is_alive(info.key):
                    self._retrier.run(
                        f"deleting the claim {info.key}", partial(self._client.delete, info.key)
                    )
            if not after:
                return

    def held_bytes(self, info: FileInfo) -> int:
        """Of a store nobody knows more than an object's size."""
        return info.size_bytes

    def free_bytes(self) -> int:
        return UNBOUNDED

    def _tail(self, name: str) -> tuple[ObjectInfo, bytes] | None:
        found = self._client.tail(name, TAIL_BYTES)
        if found is None:
            self._client.check_place()  # in one that is gone, no object is gone
        return found

    def _look_up(self, name: str) -> ObjectInfo | None:
        def look() -> ObjectInfo | None:
            info = self._client.head(name)
            if info is None:
                self._client.check_place()  # in one that is gone, no object is gone
            return info

        return self._retrier.run(f"looking up file {name}", look)

    def _probe(self) -> None:
        """Create an object twice: the second time has to fail."""
        client, probe = self._client, f"probe-{new_random_name()}"
        if isinstance(client, FsspecClient) and not client.may_create_exclusively:
            raise _not_exclusive()
        try:
            _put_first(client, probe)
            if not _is_refused(partial(client.put, probe, memoryview(b"again"), probe)):
                raise _not_exclusive()
            if isinstance(client, PartStoreClient):
                client.parts_are_exclusive = _refuses_parts(client, probe)
        finally:
            with contextlib.suppress(StoreFault):
                client.delete(probe)
        client.proves_writes = client.refuses_damage(probe)

    def _probe_plainly(self) -> None:
        """Create an object and read it."""
        client, probe, data = self._client, f"probe-{new_random_name()}", b"probe"
        try:
            client.put(probe, memoryview(data), probe)
            found = bytearray(len(data))
            if client.read_into(probe, "", 0, memoryview(found)) != len(data) or found != data:
                raise StoreFault("misconfigured", "it gives back other bytes than were written")
        finally:
            with contextlib.suppress(StoreFault):
                client.delete(probe)


def _put_first(client: StoreClient, probe: str) -> None:
    """Create an object that is not there, and would not be replaced."""
    try:
        client.put(probe, memoryview(b"probe"), probe)
    except StoreFault as fault:
        if fault.kind in ("misconfigured", "refused"):
            raise _not_exclusive(f" ({fault.text})") from None
        raise


def _refuses_parts(client: PartStoreClient, taken: str) -> bool:
    """Whether an upload in parts cannot replace the object *taken*."""
    upload = client.begin(taken, taken)
    try:
        part = client.put_part(taken, upload, 1, memoryview(b"again"))
        return _is_refused(partial(client.complete, taken, upload, [part]))
    finally:
        with contextlib.suppress(StoreFault):
            client.abort(taken, upload)


def _is_refused(create: Callable[[], None]) -> bool:
    try:
        create()
    except StoreFault as fault:
        if fault.kind != "taken":
            raise
        return True
    return False


def _not_exclusive(told: str = "") -> StoreFault:
    return StoreFault(
        "not exclusive",
        f"the store cannot create an object only if it does not exist{told}, so nothing becomes "
        "remote there: use an S3 with conditional writes or file:///some/folder",
    )
