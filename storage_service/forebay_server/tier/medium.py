"""Reading a local file around the page cache: what the medium holds, not what memory does."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from forebay_server.tier.buffers import PLAIN_BUFFERS
from forebay_server.tier.direct import DIRECT_ALIGNMENT
from forebay_server.tier.publication import DescriptorReader
from forebay_server.tier.store import TierReader, from_read_error
from forebay_wire.errors import IntegrityError, NotFound

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FLAGS: Final = os.O_RDONLY | os.O_DIRECT
_REFUSALS: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


def open_medium(path: Path, where: str) -> TierReader:
    """A reader of *path* by O_DIRECT, which leaves the page cache as it is; through the cache where
    the file system has no direct reads. :class:`NotFound` if there is no such file."""
    try:
        reader = MediumReader(os.open(path, FLAGS), where)
    except FileNotFoundError:
        raise NotFound(f"there is no such file ({where})") from None
    except OSError:
        return DescriptorReader.open(path, where)
    if reader.works():
        return reader
    reader.close()
    return DescriptorReader.open(path, where)


class MediumReader(TierReader):
    """Aligned reads into a buffer, out of which the wanted bytes are copied. Thread-safe, except
    for ``close``."""

    def __init__(self, descriptor: int, where: str) -> None:
        """Takes *descriptor*, opened for direct reads, over."""
        self.where = where
        self.size_bytes = os.fstat(descriptor).st_size
        self._descriptor = descriptor

    def works(self) -> bool:
        """Whether the file system takes a direct read: some refuse only that. An error of the
        device is none of that, and comes again."""
        with PLAIN_BUFFERS.borrow() as buffer:
            try:
                os.preadv(self._descriptor, [buffer[:DIRECT_ALIGNMENT]], 0)
            except OSError as error:
                return error.errno not in _REFUSALS
        return True

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer).cast("B")
        with PLAIN_BUFFERS.borrow() as aligned:
            while view.nbytes:
                skipped = offset % DIRECT_ALIGNMENT
                wanted = -(-(skipped + view.nbytes) // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
                found = self._read(aligned[: min(wanted, len(aligned))], offset - skipped)
                count = min(found - skipped, view.nbytes)
                if count <= 0:
                    raise IntegrityError(
                        f"file is cut short: it ends before byte {offset + view.nbytes} "
                        f"({self.where}); another replica or generation has to serve"
                    )
                source = np.frombuffer(aligned, np.uint8, count, skipped)
                np.copyto(np.frombuffer(view[:count], np.uint8), source)
                view, offset = view[count:], offset + count

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self, target: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [target], offset)
        except OSError as error:
            raise from_read_error(error, f"reading at byte {offset}", self.where) from error
