"""Writers and readers of objects: parts go out while the next is filled, reads survive cuts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

from forebay_server.tier.place import UNFINISHED_FOLDER
from forebay_server.tier.retry import Retrier, cause_of
from forebay_server.tier.space import Reservation
from forebay_server.tier.store import TierReader, TierWriter
from forebay_server.tier.store_client import (
    ObjectInfo,
    Part,
    PartStoreClient,
    StoreClient,
    StoreFault,
)
from forebay_wire.errors import AlreadyExists, ForebayError, IntegrityError, StorageError
from forebay_wire.ids import new_random_name
from forebay_wire.limits import GIB, KIB, MIB, check_limit

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

MAX_PARTS: Final = 10_000
PART_BYTES: Final = 8 * MIB
"""S3 wants at least 5 MiB. Larger objects have larger parts, so that MAX_PARTS suffice."""
PARTS_IN_FLIGHT: Final = 8
"""Of one tier, all writers together."""
KEPT_BUFFERS: Final = 2 * PARTS_IN_FLIGHT
SMALLEST_BUFFER_BYTES: Final = 64 * KIB
MAX_WHOLE_BYTES: Final = 1 * GIB
"""Largest object where it has to be sent in one call."""


def part_bytes_for(expected_bytes: int) -> int:
    """Part size with which an object may become twice as long as expected."""
    return max(PART_BYTES, -(-2 * expected_bytes // MAX_PARTS // MIB) * MIB)


class PartSender:
    """Threads and buffers that all writers of a tier share. Thread-safe.

    Buffers of the usual size are kept warm; how many there are is bounded by the writers (one each,
    being filled) and by PARTS_IN_FLIGHT.
    """

    def __init__(self, name: str, client: StoreClient) -> None:
        self.client = client
        self._uploads: set[str] = set()
        self._threads = ThreadPoolExecutor(PARTS_IN_FLIGHT, f"parts-{name}")
        self._room = threading.BoundedSemaphore(PARTS_IN_FLIGHT)
        self._lock = threading.Lock()
        self._free: list[bytearray] = []
        self._creating: set[str] = set()

    @contextlib.contextmanager
    def creating(self, name: str) -> Iterator[None]:
        """Inside, nobody else of this process creates *name* in a store that cannot tell."""
        with self._lock:
            if name in self._creating:
                raise StoreFault("taken", "somebody is just creating it")
            self._creating.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._creating.remove(name)

    def take(self, num_bytes: int) -> bytearray:
        """A buffer of *num_bytes*."""
        with self._lock:
            if num_bytes == PART_BYTES and self._free:
                return self._free.pop()
        return bytearray(num_bytes)

    def give_back(self, buffer: bytearray) -> None:
        with self._lock:
            if len(buffer) == PART_BYTES and len(self._free) < KEPT_BUFFERS:
                self._free.append(buffer)

    def submit(
        self, writer: ObjectWriter, number: int, buffer: bytearray, used: int
    ) -> Future[Part]:
        """Send a part as soon as there is room for one more in flight; takes *buffer* over."""
        self._room.acquire()
        try:
            return self._threads.submit(self._send, writer, number, buffer, used)
        except BaseException:
            self._room.release()
            raise

    def _send(self, writer: ObjectWriter, number: int, buffer: bytearray, used: int) -> Part:
        try:
            with memoryview(buffer)[:used] as view:
                return writer.send_part(number, view)
        finally:
            self._room.release()
            self.give_back(buffer)

    def remember(self, upload: str) -> None:
        """This upload is being written here: it is no dead writer's."""
        with self._lock:
            self._uploads.add(upload)

    def forget(self, upload: str) -> None:
        with self._lock:
            self._uploads.discard(upload)

    def is_alive(self, upload: str) -> bool:
        with self._lock:
            return upload in self._uploads

    def close(self) -> None:
        """Wait for what is in flight. Idempotent."""
        self._threads.shutdown()


class ObjectWriter(TierWriter):
    """Writes one object: whole if it is small, else in parts of which nothing is seen before the
    end. Where a store takes no parts, all of it is collected in memory."""

    def __init__(
        self, parts: PartSender, retrier: Retrier, where: str, name: str, reservation: Reservation
    ) -> None:
        self.num_bytes = 0
        self._parts = parts
        self._client = parts.client
        self._retrier = retrier
        self._where = where
        self._name = name
        self._reservation = reservation
        self._is_open = True
        self._mark = new_random_name()
        self._part_bytes = part_bytes_for(reservation.num_bytes)
        self._buffer = bytearray()
        self._used = 0
        self._upload = ""
        self._sent: list[Future[Part]] = []

    def write(self, buffer: ReadableBuffer) -> None:
        self._check_open()
        view = memoryview(buffer).cast("B")
        missing = self.num_bytes + view.nbytes - self._reservation.num_bytes
        if missing > 0:
            self._reservation.grow(missing)
        self.num_bytes += view.nbytes
        while view.nbytes:
            if self._used == len(self._buffer):
                self._make_room()
            step = min(view.nbytes, len(self._buffer) - self._used)
            with memoryview(self._buffer) as target:
                target[self._used : self._used + step] = view[:step]
            self._used += step
            view = view[step:]

    def publish(self) -> None:
        self._check_open()
        try:
            if self._upload:
                self._finish_parts()
            else:
                self._put_whole()
        except BaseException:
            self.abort()
            raise
        self._is_open = False
        self.is_proven = self._client.proves_writes
        self._parts.forget(self._upload)
        self._reservation.settle(self.num_bytes)
        self._drop_buffer()

    def abort(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        wait(self._sent)
        client = self._client
        if self._upload and isinstance(client, PartStoreClient):
            # What cannot be aborted now is swept later.
            with contextlib.suppress(ForebayError):
                self._retrier.run(
                    f"aborting the upload of file {self._name}",
                    lambda: client.abort(self._name, self._upload),
                )
            self._parts.forget(self._upload)
        self._reservation.release()
        self._drop_buffer()

    def send_part(self, number: int, data: memoryview) -> Part:
        """Called by a thread of the sender."""
        return self._retrier.run(
            f"uploading part {number} of file {self._name}",
            lambda: self._part_client().put_part(self._name, self._upload, number, data),
        )

    # ------------------------------------------------------------------------------- the ends

    def _put_whole(self) -> None:
        with memoryview(self._buffer)[: self._used] as data:
            self._create(lambda: self._client.put(self._name, data, self._mark), data)

    def _finish_parts(self) -> None:
        self._send_buffer()
        parts = [sent.result() for sent in self._sent]
        client = self._part_client()
        self._create(lambda: client.complete(self._name, self._upload, parts), None)

    def _create(self, call: Callable[[], None], data: memoryview | None) -> None:
        """Make the object by *call*. One that is there after a try whose answer was lost may be
        that try's."""
        num_tries = 0

        def attempt() -> None:
            nonlocal num_tries
            num_tries += 1
            try:
                call()
            except StoreFault as fault:
                is_doubtful = num_tries > 1 and fault.kind in ("taken", "no upload", "missing")
                if not (is_doubtful and self._client.is_ours(self._name, data, self._mark)):
                    raise

        doing = f"publishing file {self._name}"
        client = self._client
        is_exclusive = client.is_exclusive
        if data is None and isinstance(client, PartStoreClient):
            is_exclusive = is_exclusive and client.parts_are_exclusive
        try:
            if is_exclusive:
                self._retrier.attempt(doing, attempt)
            else:
                self._create_after_look(doing, attempt)
        except StoreFault as fault:
            if fault.kind == "taken":
                raise AlreadyExists(
                    f"{self._where} already has file {self._name}; it stays as it is"
                ) from None
            if fault.kind == "missing":  # an answer to PUT: nothing was asked for
                fault = StoreFault("refused", fault.text)
            raise self._retrier.error(doing, fault) from cause_of(fault)

    def _create_after_look(self, doing: str, attempt: Callable[[], None]) -> None:
        """*attempt* if the name is free, where the store itself would not say."""
        with self._parts.creating(self._name), self._claimed():
            looking = f"looking whether file {self._name} is there"
            if self._retrier.attempt(looking, lambda: self._client.head(self._name)) is not None:
                raise StoreFault("taken", "it is there")
            self._retrier.attempt(doing, attempt)

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Inside, no other writer, of this process or another, creates the object by parts: a small
        object, which the store creates exclusively, says so. It stays where nobody knows how the
        creation ended, and is swept."""
        if not self._client.is_exclusive:
            yield
            return
        claim = f"{UNFINISHED_FOLDER}/{self._name}"
        self._parts.remember(claim)
        try:
            self._create_claim(claim)
            is_known = False
            try:
                yield
                is_known = True
            except StoreFault as fault:
                is_known = fault.kind == "taken"
                raise
            finally:
                if is_known:
                    with contextlib.suppress(ForebayError):
                        doing = f"deleting the claim {claim}"
                        self._retrier.run(doing, lambda: self._client.delete(claim))
        finally:
            self._parts.forget(claim)

    def _create_claim(self, claim: str) -> None:
        num_tries, data = 0, memoryview(self._mark.encode())

        def attempt() -> None:
            nonlocal num_tries
            num_tries += 1
            try:
                self._client.put(claim, data, self._mark)
            except StoreFault as fault:
                is_doubtful = num_tries > 1 and fault.kind == "taken"
                if not (is_doubtful and self._client.is_ours(claim, data, self._mark)):
                    raise

        self._retrier.attempt(f"claiming file {self._name}", attempt)

    # ------------------------------------------------------------------------------- buffers

    def _make_room(self) -> None:
        """Have a byte of the buffer free: send it, or a larger one."""
        is_whole = len(self._buffer) >= self._part_bytes
        if is_whole and isinstance(self._client, PartStoreClient):
            self._send_buffer()
            self._buffer = self._parts.take(self._part_bytes)
            return
        wanted = self._part_bytes
        if is_whole:
            check_limit(
                f"bytes of object {self._name}",
                self.num_bytes,
                MAX_WHOLE_BYTES,
                "write smaller blobs, or use S3 or a directory as the object tier",
            )
            wanted = min(2 * len(self._buffer), MAX_WHOLE_BYTES)
        elif not self._buffer:
            wanted = min(wanted, max(self._reservation.num_bytes, SMALLEST_BUFFER_BYTES))
        larger = self._parts.take(wanted)
        with memoryview(larger) as target:
            target[: self._used] = memoryview(self._buffer)[: self._used]
        self._parts.give_back(self._buffer)
        self._buffer = larger

    def _send_buffer(self) -> None:
        """Send what is in the buffer as the next part; begins the upload with the first."""
        client = self._part_client()
        if not self._upload:
            self._upload = self._retrier.run(
                f"beginning the upload of file {self._name}",
                lambda: client.begin(self._name, self._mark),
            )
            self._parts.remember(self._upload)
        for sent in self._sent:  # one that failed for good ends the whole
            if sent.done():
                sent.result()
        number = len(self._sent) + 1
        check_limit(
            f"parts of object {self._name}",
            number,
            MAX_PARTS,
            "reserve about as many bytes as are written: that decides how large parts are",
        )
        buffer, used = self._buffer, self._used
        self._buffer, self._used = bytearray(), 0
        self._sent.append(self._parts.submit(self, number, buffer, used))

    def _drop_buffer(self) -> None:
        self._parts.give_back(self._buffer)
        self._buffer, self._used = bytearray(), 0

    def _part_client(self) -> PartStoreClient:
        assert isinstance(self._client, PartStoreClient), "only such clients get parts"
        return self._client

    def _check_open(self) -> None:
        if not self._is_open:
            raise StorageError(
                f"file {self._name} of {self._where} was published or aborted already"
            )


class ObjectReader(TierReader):
    """Reads one object by ranges, as long as it is the one that it was when it was opened."""

    def __init__(
        self,
        client: StoreClient,
        retrier: Retrier,
        info: ObjectInfo,
        where: str,
        tail: bytes | memoryview = b"",
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """*tail*: the object's last bytes, as far as they are known already; *let_go* is called
        when they are needed no more."""
        self._tail = tail
        self._let_go = let_go
        self.size_bytes = info.size_bytes
        self.where = where
        self._client = client
        self._retrier = retrier
        self._info = info

    def view(self, offset: int, num_bytes: int) -> memoryview | None:
        first = self.size_bytes - len(self._tail)
        if offset < first or offset + num_bytes > self.size_bytes:
            return None
        return memoryview(self._tail)[offset - first : offset - first + num_bytes]

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        if (found := self.view(offset, view.nbytes)) is not None:
            view[:] = found
            return
        end = offset + view.nbytes
        while view.nbytes and offset < self.size_bytes:
            num_bytes = self._read_some(offset, view)
            if not num_bytes:
                break
            view, offset = view[num_bytes:], offset + num_bytes
        if view.nbytes:
            raise IntegrityError(
                f"file is cut short: it ends before byte {end} ({self.where}); "
                "another replica or generation has to serve"
            )

    def _read_some(self, offset: int, view: memoryview) -> int:
        """Bytes read; fewer than asked for where a connection broke after some of them."""
        info = self._info

        def fetch() -> int:
            try:
                return self._client.read_into(info.key, info.etag, offset, view)
            except StoreFault as fault:
                if fault.kind == "busy" and fault.num_bytes:
                    return fault.num_bytes
                raise

        return self._retrier.run(f"reading at byte {offset} of file {info.key}", fetch)

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        let_go, self._let_go = self._let_go, lambda: None
        self._tail = b""
        let_go()
