"""Origins as the replicas of blobs: what lies there, and behind it the segment table kept here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forebay_server.tier.origin import SETTING, OriginFile, OriginPlaces, Validator, changed
from forebay_server.tier.store import FileInfo, Tier, TierReader, TierSpace, TierWriter
from forebay_wire.errors import IntegrityError, InvalidRequest, NotFound, OriginChanged
from forebay_wire.segments import SegmentTable, encode_trailer, xxh3

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True)
class Source:
    """An origin whose bytes are known."""

    url: str
    num_bytes: int
    validator: Validator
    table: SegmentTable


class OriginTier(Tier):
    """The files of users that were read once. Thread-safe. Nothing is ever written or deleted."""

    name = "origin"
    kind = "object"
    is_foreign = True

    def __init__(self, places: OriginPlaces) -> None:
        self.places = places
        self.location = ", ".join(places.prefixes)
        self.lookup: Callable[[str], Sequence[Source]] = lambda file: ()
        """The origins that have the bytes of the blob which the catalog calls so; blocks."""

    def open(self) -> None:
        """Places are looked at when somebody reads there: one that is away stops no daemon."""

    def close(self) -> None:
        self.places.close()

    def create(self, name: str, expected_bytes: int) -> TierWriter:
        raise InvalidRequest("nothing is written where users keep their files")

    def read(self, name: str) -> TierReader:
        problem: OriginChanged | None = None
        for source in self.lookup(name):
            try:
                file = self.places.open(source.url, source.num_bytes, source.validator)
            except OriginChanged as error:
                problem = problem or error
                continue
            return _Image(file, source.table)
        raise problem or NotFound(f"no origin is known with the bytes of file {name}")

    def head(self, name: str) -> int | None:
        try:
            with self.read(name) as reader:
                return reader.size_bytes
        except NotFound:
            return None

    def delete(self, name: str) -> None:
        """The catalog forgets it; the file is the user's."""

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        return iter(())

    def sweep(self) -> None:
        """Nothing here is ours."""

    def space(self) -> TierSpace:
        return TierSpace(0, 0, 0, 0, 0)


class _Image(TierReader):
    """A blob file as it would lie in any other tier: the origin's bytes, table and trailer."""

    def __init__(self, file: OriginFile, table: SegmentTable) -> None:
        self._file = file
        self._table = table
        self._end = table.encoded + encode_trailer(table.total_bytes, len(table.encoded))
        self.size_bytes = table.total_bytes + len(self._end)
        self.where = f"origin {file.url}"

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        if offset + view.nbytes > self.size_bytes:
            raise IntegrityError(f"nothing lies behind byte {self.size_bytes} ({self.where})")
        total = self._table.total_bytes
        num_data = max(0, min(view.nbytes, total - offset))
        if num_data:
            self._file.read_into(offset, view[:num_data])
            self._check(offset, view[:num_data])
        start = max(0, offset - total)
        view[num_data:] = self._end[start : start + view.nbytes - num_data]

    def _check(self, offset: int, view: memoryview) -> None:
        """The segments that are whole in *view*: a change that hid its time is told as one."""
        position = offset
        for index, first, last in self._table.parts_of(offset, offset + view.nbytes):
            length = last - first
            if length == int(self._table.entries["length"][index]):
                piece = view[position - offset : position - offset + length]
                if xxh3(piece) != int(self._table.entries["xxh3"][index]):
                    raise changed(
                        self._file.url,
                        f"other bytes than at the first read, from byte {position} on, though "
                        "size and time are the same",
                    )
            position += length

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        self._file.close()


def off() -> InvalidRequest:
    """The error where no prefix is configured."""
    return InvalidRequest(
        f"this daemon reads no files elsewhere: start it with {SETTING}, the folders and URLs "
        "below which it may"
    )
