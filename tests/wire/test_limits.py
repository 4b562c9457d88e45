"""Each limit at its edge: the most that is allowed passes, one more is refused with a reason."""

from dataclasses import replace

import numpy as np
import pytest

from forebay_wire import limits
from forebay_wire.errors import IntegrityError, InvalidRequest, LimitExceeded
from forebay_wire.handover import HEADER, MAGIC, VERSION, decode_header, encode_frame
from forebay_wire.ids import check_name
from forebay_wire.manifest import (
    DatasetManifest,
    GenerationManifest,
    ShardRef,
    encode,
)
from forebay_wire.segments import (
    ENTRY_DTYPE,
    TABLE_HEADER,
    TABLE_MAGIC,
    TABLE_VERSION,
    SegmentTable,
    SegmentTableBuilder,
    check_cuts,
    table_bytes_for,
)


def test_the_limits_fit_into_each_other():
    full_table = limits.MAX_SEGMENTS_PER_BLOB * limits.MAX_SEGMENT_BYTES
    assert full_table == limits.MAX_BLOB_BYTES
    assert limits.MIN_SHARED_SEGMENT_BYTES <= limits.MAX_SEGMENT_BYTES
    assert limits.MAX_UPLOAD_SLOT_BYTES <= limits.MAX_BLOB_BYTES
    # Cuts of a full append: varints of at most 4 bytes (4 MiB < 2^28).
    assert 4 * limits.MAX_SEGMENTS_PER_APPEND < limits.MAX_MESSAGE_BYTES
    assert limits.MANIFEST_CHUNK_BYTES < limits.MAX_MESSAGE_BYTES
    assert limits.MAX_DESCRIPTION_BYTES < limits.MAX_GENERATION_DESCRIPTION_BYTES
    assert limits.MAX_GENERATION_DESCRIPTION_BYTES < limits.MAX_MANIFEST_BYTES
    assert limits.MAX_MESSAGE_BYTES < limits.MAX_COMMIT_BYTES < limits.MAX_MANIFEST_BYTES
    # SCM_MAX_FD, RLIMIT_NOFILE and vm.max_map_count as Linux sets them by default.
    assert limits.MAX_DESCRIPTORS_PER_MESSAGE <= 253
    assert limits.MAX_OPEN_BLOBS_PER_CLIENT < 1024
    assert limits.MAX_MAPS_PER_CLIENT < 65530 // 2
    assert limits.MAX_UNIX_PATH_BYTES == 107


def test_segment_bytes():
    builder = SegmentTableBuilder()
    for size in (1, limits.MAX_SEGMENT_BYTES):
        builder.add(bytes(size))
    for size in (0, limits.MAX_SEGMENT_BYTES + 1):
        with pytest.raises(InvalidRequest):
            builder.add(bytes(size))
    check_cuts([limits.MAX_SEGMENT_BYTES], limits.MAX_SEGMENT_BYTES)
    with pytest.raises(InvalidRequest):
        check_cuts([limits.MAX_SEGMENT_BYTES + 1], limits.MAX_SEGMENT_BYTES + 1)


def test_segments_per_blob():
    count = limits.MAX_SEGMENTS_PER_BLOB
    entries = np.zeros(count, dtype=ENTRY_DTYPE)
    entries["length"] = limits.MAX_SEGMENT_BYTES
    full = SegmentTable(entries)
    assert full.total_bytes == limits.MAX_BLOB_BYTES
    assert SegmentTable.decode(full.encoded, "here", full.blob_id).num_segments == count
    header = TABLE_HEADER.pack(TABLE_MAGIC, TABLE_VERSION, 0, count + 1, count + 1)
    too_long = header + bytes(table_bytes_for(count + 1) - len(header))
    with pytest.raises(IntegrityError, match="wrong length"):
        SegmentTable.decode(too_long, "here")


def test_segments_built_for_one_blob():
    builder = SegmentTableBuilder()
    builder._rows = [(1, bytes(32), 0)] * limits.MAX_SEGMENTS_PER_BLOB  # a million digests, spared
    assert builder.build().num_segments == limits.MAX_SEGMENTS_PER_BLOB
    builder.add(b"x")
    with pytest.raises(LimitExceeded, match="segments of a blob"):
        builder.build()


def test_shards_per_version():
    shard = ShardRef("ab" * 32, 1, 1, (1,))
    most = DatasetManifest("d", 1, None, "", (shard,) * limits.MAX_SHARDS_PER_VERSION)
    most.encode()
    with pytest.raises(LimitExceeded, match="shards of a version"):
        replace(most, shards=(*most.shards, shard)).encode()


def test_ranks_of_a_generation():
    most = GenerationManifest("r", 1, 1, None, limits.MAX_RANKS, {}, None, (), 0.0)
    most.encode()
    with pytest.raises(LimitExceeded, match="ranks"):
        replace(most, num_ranks=limits.MAX_RANKS + 1).encode()


def test_manifest_bytes():
    frame = len('{"x":""}')
    encode(1, {"x": "a" * (limits.MAX_MANIFEST_BYTES - frame)})
    with pytest.raises(LimitExceeded, match="manifest bytes"):
        encode(1, {"x": "a" * (limits.MAX_MANIFEST_BYTES - frame + 1)})


def test_name_bytes():
    assert check_name("run", "a" * limits.MAX_NAME_BYTES)
    with pytest.raises(InvalidRequest):
        check_name("run", "a" * (limits.MAX_NAME_BYTES + 1))


def test_frame_bytes():
    overhead = len('{"x":""}')
    encode_frame({"x": "a" * (limits.MAX_FRAME_BYTES - overhead)})
    with pytest.raises(InvalidRequest, match="limit"):
        encode_frame({"x": "a" * (limits.MAX_FRAME_BYTES - overhead + 1)})
    assert decode_header(HEADER.pack(MAGIC, VERSION, 0, limits.MAX_FRAME_BYTES))
    with pytest.raises(InvalidRequest, match="too large"):
        decode_header(HEADER.pack(MAGIC, VERSION, 0, limits.MAX_FRAME_BYTES + 1))


def test_descriptors_per_message():
    most = limits.MAX_DESCRIPTORS_PER_MESSAGE
    assert decode_header(HEADER.pack(MAGIC, VERSION, most, 0)) == (most, 0)
    with pytest.raises(InvalidRequest, match="too large"):
        decode_header(HEADER.pack(MAGIC, VERSION, most + 1, 0))
