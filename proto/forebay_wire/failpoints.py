"""Named places where a test may kill the process that passes them, or hold it up.

``FOREBAY_FAILPOINTS=name`` kills at the first passing of *name*, ``name:3`` at the third;
``name@PATH`` holds every passing up while the FIFO at *PATH* is open for writing, and does nothing
where there is none. Several are separated by commas. Without the variable a passing costs two
dictionary look-ups.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Final

VARIABLE: Final = "FOREBAY_FAILPOINTS"

DATASET_COMMIT: Final = (
    "upload.before_publish",
    "upload.after_publish",
    "upload.after_row",
    "dataset.before_commit",
    "dataset.inside_commit",
    "dataset.after_commit",
)
"""Failpoints of a dataset commit, in the order in which it passes them."""

SELECTION_COMMIT: Final = (
    "selection.before_commit",
    "selection.inside_commit",
    "selection.after_commit",
)
"""Failpoints of naming sealed rows as selections, in the order in which it passes them."""

GENERATION_BEGIN: Final = (
    "attempt.before_commit",
    "attempt.after_commit",
    "pack.before_begin",
    "pack.after_begin",
)
"""Failpoints of an attempt's begin and of a pack's, in the order in which it passes them."""

GENERATION_COMMIT: Final = (
    "pack.before_seal",
    "pack.after_seal",
    "upload.before_publish",
    "upload.after_publish",
    "generation.before_commit",
    "generation.inside_commit",
    "generation.after_commit",
)
"""Failpoints of a generation commit, in the order in which it passes them."""

RETENTION: Final = (
    "retain.before_delete",
    "retain.inside_delete",
    "retain.after_delete",
)
"""Failpoints of deleting what a policy does not keep, in the order in which it passes them."""

SHARING: Final = ("upload.before_list", "upload.after_list")
"""Failpoints of publishing a pack that shares pieces with others, between its file and its row, in
the order in which it passes them."""

REMOTE_FLUSH: Final = (
    "flush.before_blob",
    "flush.after_blob",
    "flush.after_extents",
    "flush.before_manifest",
    "flush.after_manifest",
)
"""Failpoints of publishing a version or generation into the object tier."""

MOVE: Final = (
    "copy.before_file",
    "copy.after_file",
    "copy.after_row",
    "migrate.before_remove",
    "migrate.inside_remove",
    "migrate.after_remove",
    "migrate.after_unlink",
)
"""Failpoints of moving a blob from one tier to another, in the order in which it passes them."""

EVICT: Final = (
    "evict.before_row",
    "evict.after_row",
    "evict.after_file",
)
"""Failpoints of giving a copy up that another tier has, too."""

REPAIR: Final = (
    "repair.before_copy",
    "repair.before_remove",
    "repair.inside_remove",
    "repair.after_remove",
    "repair.after_unlink",
)
"""Failpoints of replacing a damaged copy by a good one, in the order in which it passes them."""

MEND: Final = (
    "mend.before_file",
    "mend.after_files",
    "mend.inside_rows",
    "mend.after_rows",
    "mend.after_unlink",
)
"""Failpoints of writing a damaged file anew from good segments, in the order in which it passes
them."""

COLLECT: Final = (
    "collect.before_manifest",
    "collect.after_objects",
    "collect.after_manifest",
    "collect.before_row",
    "collect.after_object_row",
    "collect.after_blob_objects",
    "collect.after_row",
    "collect.after_files",
)
"""Failpoints of deleting a manifest and then the blobs that nothing names any more, in the order in
which it passes them."""

COMPACT: Final = (
    "compact.before_file",
    "compact.after_files",
    "compact.inside_rows",
    "compact.after_rows",
    "compact.after_delete",
)
"""Failpoints of making a file smaller, in the order in which it passes them."""

ORIGIN: Final = (
    "origin.before_row",
    "origin.after_row",
    "origin.before_pin",
)
"""Failpoints of the first read of an origin, and of making a dataset's origins blobs."""

CLIENT_SAVE: Final = (
    "client.save.after_plan",
    "client.save.after_begin",
    "client.save.in_copy",
    "client.save.after_copy",
    "client.save.after_seal",
    "client.write.after_shard",
    "client.write.before_commit",
)
"""Failpoints of the writing client."""

CLIENT_EXPORT: Final = ("client.export.after_file", "client.export.before_rename")
"""Failpoints of writing a generation as foreign files, in the order in which it passes them."""

ALL: Final = frozenset(
    DATASET_COMMIT
    + SELECTION_COMMIT
    + GENERATION_BEGIN
    + GENERATION_COMMIT
    + REMOTE_FLUSH
    + MOVE
    + EVICT
    + REPAIR
    + MEND
    + COLLECT
    + COMPACT
    + SHARING
    + RETENTION
    + CLIENT_SAVE
    + CLIENT_EXPORT
    + ORIGIN
)

_lock = threading.Lock()


def _parse(text: str) -> tuple[dict[str, int], dict[str, Path]]:
    """Failpoint to the passing that kills, and to the FIFO that holds up."""
    kills: dict[str, int] = {}
    holds: dict[str, Path] = {}
    for part in filter(None, text.split(",")):
        place, _, fifo = part.partition("@")
        name, _, count = place.partition(":")
        if name not in ALL:
            raise ValueError(f"{VARIABLE} names {name!r}, which is no failpoint")
        if fifo:
            holds[name] = Path(fifo)
        else:
            kills[name] = int(count or 1)
    return kills, holds


def arm(text: str) -> None:
    """Kill and hold up from now on where *text*, a value of the variable, says so."""
    global _kills, _holds
    _kills, _holds = _parse(text)


_kills: dict[str, int]
_holds: dict[str, Path]
arm(os.environ.get(VARIABLE, ""))


def failpoint(name: str) -> None:
    """Kill this process with SIGKILL here, or wait here, if the environment asked for it."""
    if name in _holds:
        with contextlib.suppress(FileNotFoundError):
            _holds[name].read_bytes()  # ends with the last writer
    if name not in _kills:
        return
    with _lock:
        _kills[name] -= 1
        if _kills[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
