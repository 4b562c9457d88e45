"""What the daemon hands over is checked against what it says of it, before anybody maps it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forebay.transfer.replica import Handover
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import SegmentTableBuilder

DATA = bytes(range(256)) * 16


@pytest.fixture
def handed_over(tmp_path: Path) -> Iterator[tuple[Handover, dict[str, Any], Path]]:
    """A blob whose data and whose segment table lie in two files; the daemon's word; the data."""
    builder = SegmentTableBuilder()
    builder.add(DATA)
    table = builder.build()
    encoded = bytes(table.encoded)
    (tmp_path / "data").write_bytes(DATA)
    (tmp_path / "table").write_bytes(encoded)
    entry = {
        "blob": table.blob_id,
        "tier": "ssd",
        "length": len(DATA),
        "table": [1, 0, len(encoded)],
        "extents": [[0, 0, 0, len(DATA)]],
    }
    handover = Handover([os.open(tmp_path / name, os.O_RDONLY) for name in ("data", "table")])
    yield handover, entry, tmp_path / "data"
    handover.close()


def test_files_that_are_as_long_as_they_should_be_are_taken(
    handed_over: tuple[Handover, dict[str, Any], Path],
) -> None:
    handover, entry, _ = handed_over
    replica = handover.replica(entry, "here")
    target = bytearray(len(DATA))
    assert replica.read(0, memoryview(target)) == len(DATA)
    assert target == DATA


def test_a_file_that_is_too_short_is_refused(
    handed_over: tuple[Handover, dict[str, Any], Path],
) -> None:
    handover, entry, data = handed_over
    os.truncate(data, len(DATA) - 1)
    with pytest.raises(IntegrityError, match=r"4095 bytes should have 4096 \(here\)"):
        handover.replica(entry, "here")
