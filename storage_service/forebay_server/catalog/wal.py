"""Commits that are missing from the end of SQLite's write-ahead log are noticed.

SQLite ends its recovery at the first frame of the log whose checksum is wrong, as a power loss
leaves a transaction that was never acknowledged in any state there. A flipped bit looks the same,
and would take acknowledged commits with it. Two things tell them apart:

* The *mark*, a small file beside the catalog: after each commit, before anybody is answered, it is
  written how far the log goes. It is not synced, which would cost as much as the commit: it never
  says more than the disk holds, after a power loss perhaps less.
* The log itself: each transaction is synced before the next one is written, so one that has a
  successor was complete.

The formats of the log and of its index: sqlite.org/fileformat2.html#walformat, walformat.html.
"""

from __future__ import annotations

import functools
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

MARK_SUFFIX: Final = "-mark"

_MARK_MAGIC: Final = b"FBMARK01"
_MARK: Final = struct.Struct("<8sIIIII")
"""Magic; salts 1 and 2; number of frames; the checksum of the last one, in two words. XXH3 follows.
"""
_DIGEST: Final = struct.Struct("<Q")
_INDEX: Final = struct.Struct("=IIIBBHIIII8sII")
"""The header of SQLite's index of the log: version, unused, change, is set up, big-endian, page
size, number of frames, pages, checksum in two words, salts, and the header's own checksum."""
_HEADER: Final = struct.Struct(">8I")
"""Of the log: magic, version, page size, checkpoint, salts, checksum."""
_FRAME: Final = struct.Struct(">6I")
"""Header of a frame: page, pages after a commit (else 0), salts, checksum."""
_MAGIC: Final = 0x377F0682
"""The last bit says that checksums read big-endian words."""
_STEP: Final = np.array([[1, 1], [1, 2]], dtype=np.uint64)
_WORD: Final = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class End:
    """Where a log ends: its cycle, by the salts, and the frames of whole commits in it."""

    salt_1: int
    salt_2: int
    num_frames: int
    checksum: tuple[int, int]


def log_path(path: Path) -> Path:
    """Where SQLite keeps the log of the database *path*."""
    return path.with_name(path.name + "-wal")


def mark_path(path: Path) -> Path:
    """Where the mark of the catalog *path* lies."""
    return path.with_name(path.name + MARK_SUFFIX)


class MarkFailed(OSError):
    """What was committed is durable, and could not be marked so."""


class Marker:
    """Keeps the mark of an open catalog. Belongs to the thread that commits."""

    def __init__(self, path: Path) -> None:
        """The catalog *path* is open and has a log, or gets one with its first commit."""
        self._path = path
        self._index = -1
        self._mark = -1
        self._last: bytes = b""

    def note(self) -> None:
        """A commit is durable: write down how far the log goes. Raises :class:`MarkFailed`."""
        try:
            self._note()
        except OSError as error:
            raise MarkFailed(*error.args) from error

    def _note(self) -> None:
        if self._index < 0 and not self._open():
            return
        header = os.pread(self._index, _INDEX.size, 0)
        if len(header) < _INDEX.size:
            return
        fields = _INDEX.unpack(header)
        salt_1, salt_2 = struct.unpack(">II", fields[10])
        self._write(End(salt_1, salt_2, fields[6], (fields[8], fields[9])))

    def close(self) -> None:
        """Idempotent."""
        for descriptor in (self._index, self._mark):
            if descriptor >= 0:
                os.close(descriptor)
        self._index = self._mark = -1

    def _open(self) -> bool:
        index = self._path.with_name(self._path.name + "-shm")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._index = os.open(index, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._mark = os.open(mark_path(self._path), flags, 0o600)
        return True

    def _write(self, end: End) -> None:
        data = _MARK.pack(_MARK_MAGIC, end.salt_1, end.salt_2, end.num_frames, *end.checksum)
        if data != self._last:
            os.pwrite(self._mark, data + _DIGEST.pack(xxhash.xxh3_64_intdigest(data)), 0)
            self._last = data


def drop_mark(path: Path) -> bool:
    """Remove the mark of *path*; whether there was one. The caller syncs the folder."""
    try:
        mark_path(path).unlink()
    except FileNotFoundError:
        return False
    return True


def find_loss(path: Path) -> str | None:
    """What of the log of *path* is missing though it was committed, in words; None if nothing is.

    To be asked before SQLite opens the file.
    """
    mark = _read_mark(path)
    try:
        data = log_path(path).read_bytes()
    except FileNotFoundError:
        data = b""
    log = _Log.of(data)
    if log is None:
        if mark is not None and mark.num_frames:
            return (
                f"its log, with {mark.num_frames} frames of commits, is gone or has a bad header; "
                f"if another program opened the catalog since, remove {mark_path(path)}"
            )
        return None
    if mark is not None and (lost := log.lacks(mark)):
        return lost
    return log.lost_inside()


def _read_mark(path: Path) -> End | None:
    """What the mark says; None where there is none, or a power loss left nothing of it."""
    with suppress(FileNotFoundError):
        data = mark_path(path).read_bytes()
        if len(data) != _MARK.size + _DIGEST.size:
            return None
        (digest,) = _DIGEST.unpack_from(data, _MARK.size)
        magic, salt_1, salt_2, num_frames, *checksum = _MARK.unpack_from(data)
        if magic == _MARK_MAGIC and digest == xxhash.xxh3_64_intdigest(data[: _MARK.size]):
            return End(salt_1, salt_2, num_frames, (checksum[0], checksum[1]))
    return None


@dataclass(frozen=True)
class _Log:
    """A log with a good header."""

    salts: tuple[int, int]
    headers: NDArray[np.uint32]
    """(frames, 6): the words of each frame's header."""
    num_good: int
    """Frames before the first one that recovery does not take."""

    @classmethod
    def of(cls, data: bytes) -> _Log | None:
        if len(data) < _HEADER.size:
            return None
        magic, _, page_bytes, _, salt_1, salt_2, *checksum = _HEADER.unpack_from(data)
        if magic & ~1 != _MAGIC or not 512 <= page_bytes <= 65536:
            return None
        order = ">u4" if magic & 1 else "<u4"
        words = np.frombuffer(data, dtype=order, count=6).astype(np.uint64)
        state = _advance(np.zeros(2, np.uint64), _sums(words[None])[0], 3)
        if tuple(state.tolist()) != tuple(checksum):
            return None
        frame_bytes = _FRAME.size + page_bytes
        num_frames = (len(data) - _HEADER.size) // frame_bytes
        frames = np.frombuffer(
            data, dtype=np.uint8, count=num_frames * frame_bytes, offset=_HEADER.size
        ).reshape(num_frames, frame_bytes)
        headers = np.ascontiguousarray(frames[:, : _FRAME.size]).view(">u4").astype(np.uint32)
        num_good = _count_good(frames, headers, order, state, (salt_1, salt_2))
        return cls((salt_1, salt_2), headers, num_good)

    def lacks(self, mark: End) -> str:
        """What the mark knows of and the log has not; empty if nothing."""
        if not mark.num_frames:
            return ""  # noted before the first commit that this log, or its next cycle, was to get
        if (mark.salt_1, mark.salt_2) != self.salts:
            cycles = (self.salts[0] - mark.salt_1) & 0xFFFFFFFF
            if 0 < cycles < 1 << 31:
                return ""  # the log was begun anew since, which a checkpoint precedes
            return "its log is not the one that the last commits went to"
        if mark.num_frames > self.num_good:
            number = mark.num_frames - self.num_good
            return f"the last {number} frames of its log are damaged, and they were committed"
        if mark.num_frames:
            last = self.headers[mark.num_frames - 1]
            if (int(last[4]), int(last[5])) != mark.checksum:
                return "its log does not hold what was committed"
        return ""

    def lost_inside(self) -> str | None:
        """A bad frame in a transaction that another one follows."""
        rest = self.headers[self.num_good :]
        ours = (rest[:, 2] == self.salts[0]) & (rest[:, 3] == self.salts[1])
        ends = np.flatnonzero(ours & (rest[:, 1] != 0))
        if len(ends) and ours[ends[0] + 1 :].any():
            return f"frame {self.num_good + 1} of its log is damaged, and commits follow it"
        return None


def _count_good(
    frames: NDArray[np.uint8],
    headers: NDArray[np.uint32],
    order: str,
    state: NDArray[np.uint64],
    salts: tuple[int, int],
) -> int:
    """Frames that recovery takes; the last of them need not be a commit."""
    if not len(frames):
        return 0
    covered = np.concatenate([frames[:, :8], frames[:, _FRAME.size :]], axis=1)
    words = np.ascontiguousarray(covered).view(order)
    sums = _sums(words)
    num_pairs = words.shape[1] // 2
    for number, header in enumerate(headers.tolist()):
        if (header[2], header[3]) != salts:
            return number
        state = _advance(state, sums[number], num_pairs)
        if state.tolist() != header[4:]:
            return number
    return len(frames)


@functools.cache
def _powers(count: int) -> NDArray[np.uint64]:
    """(count + 1, 2, 2): the powers of the checksum's step, from 0 on."""
    found = np.empty((count + 1, 2, 2), np.uint64)
    found[0] = np.eye(2, dtype=np.uint64)
    for number in range(count):
        found[number + 1] = (_STEP @ found[number]) & _WORD
    return found


def _sums(words: NDArray[np.generic]) -> NDArray[np.uint64]:
    """(rows, 2): what each row of words adds to a checksum.

    The checksum takes two words at a time: s0 += x0 + s1, s1 += x1 + s0. That is a linear map of
    (s0, s1) plus (x0, x0 + x1), so a row's share does not depend on what came before it.
    """
    pairs = words.astype(np.uint64).reshape(len(words), -1, 2)
    first = pairs[:, :, 0]
    second = (first + pairs[:, :, 1]) & _WORD
    powers = _powers(pairs.shape[1])[-2::-1]
    parts = [
        ((first * powers[:, row, 0]) & _WORD) + ((second * powers[:, row, 1]) & _WORD)
        for row in (0, 1)
    ]
    return np.stack([part.sum(axis=1) & _WORD for part in parts], axis=1)


def _advance(
    state: NDArray[np.uint64], sums: NDArray[np.uint64], num_pairs: int
) -> NDArray[np.uint64]:
    """The checksum after *num_pairs* more pairs of words, whose share is *sums*."""
    found: NDArray[np.uint64] = ((_powers(num_pairs)[-1] @ state) + sums) & _WORD
    return found
