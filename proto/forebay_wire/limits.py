"""Sizes and counts that both sides must respect, each with its unit and its reason."""

from __future__ import annotations

from typing import Final

from forebay_wire.errors import LimitExceeded

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

MAX_SEGMENT_BYTES: Final = 4 * MIB
"""Largest segment: the unit of verification must fit the pooled I/O buffers."""

MIN_SHARED_SEGMENT_BYTES: Final = 256 * KIB
"""Small tensors share a segment at least this large, so tables stay short."""

MAX_SEGMENTS_PER_BLOB: Final = 1 << 20
"""A segment table stays under 44 MiB."""

MAX_SEGMENTS_PER_APPEND: Final = 1 << 16
"""Cuts travel in one control message (varints, under 300 KiB)."""

MAX_BLOB_BYTES: Final = 1 << 42
"""4 TiB: a full table of full segments."""

MAX_DESCRIPTORS_PER_MESSAGE: Final = 64
"""Linux refuses more than 253 descriptors a message (SCM_MAX_FD); 64 keeps frames small."""

MAX_EXTENTS_PER_MESSAGE: Final = 4096
"""Pieces of blobs that one answer of the descriptor socket tells of: 200 KB."""

MAX_PIECES_PER_BLOB: Final = MAX_EXTENTS_PER_MESSAGE // 2
"""Into which a blob that shares bytes with others may be cut."""

MAX_BLOBS_PER_OPEN: Final = MAX_DESCRIPTORS_PER_MESSAGE // 2
"""What always fits one answer: a blob's table may come in a descriptor of its own."""

MAX_OPEN_BLOBS_PER_CLIENT: Final = 512
"""Soft RLIMIT_NOFILE is often 1024; a client keeps half of it for others."""

MAX_OPEN_BYTES_PER_CLIENT: Final = 1 << 40
"""Bytes of handed-over blobs that one client may hold open before the daemon refuses."""

MAX_MAPS_PER_CLIENT: Final = 8192
"""vm.max_map_count is 65530 by default and shared with the allocator and other libraries."""

MAX_MESSAGE_BYTES: Final = 4 * MIB
"""One gRPC message; longer lists are paged or streamed."""

MAX_COMMIT_BYTES: Final = 32 * MIB
"""The message of CommitVersion alone, which is one transaction: MAX_SHARDS_PER_VERSION shards."""

PAGE_BYTES: Final = 1 * MIB
"""A page of a list ends with the row that passes this, so that it fits one message."""

MANIFEST_CHUNK_BYTES: Final = 1 * MIB
"""One piece of a streamed manifest."""

MAX_MANIFEST_BYTES: Final = 64 * MIB

MAX_FRAME_BYTES: Final = 256 * KIB
"""One frame of the descriptor socket."""

MAX_SHARDS_PER_VERSION: Final = 100_000

MAX_TENSORS_PER_PACK: Final = 200_000

MAX_DESCRIPTION_BYTES: Final = 48 * MIB
"""What one rank says about its pack."""

MAX_GENERATION_DESCRIPTION_BYTES: Final = MAX_MANIFEST_BYTES - 4 * MIB
"""What all ranks say; the rest of the manifest is for metrics, position and MAX_RANKS entries."""

MAX_RANKS: Final = 4096

MAX_NAME_BYTES: Final = 128
"""Names of datasets, runs, selections and tiers."""

MAX_PAGE_ROWS: Final = 1000

MAX_UNIX_PATH_BYTES: Final = 107
"""sun_path holds 108 bytes with the terminating zero."""

MAX_UPLOAD_SLOT_BYTES: Final = 64 * GIB


def check_limit(what: str, value: int, limit: int, advice: str) -> int:
    """*value* if it is at most *limit*, else :class:`LimitExceeded` with numbers and advice."""
    if value > limit:
        raise LimitExceeded(f"{what}: {value} is more than the limit of {limit}; {advice}")
    return value
