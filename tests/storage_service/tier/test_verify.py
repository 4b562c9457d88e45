"""A blob file whose parts do not make up the whole is found by its sizes alone."""

from pathlib import Path

import pytest

from forebay_server.tier.publication import DescriptorReader
from forebay_server.tier.verify import read_table, verify_file
from forebay_wire.errors import IntegrityError
from forebay_wire.segments import TRAILER, SegmentTableBuilder, encode_trailer

DATA = bytes(range(256)) * 4


def file_of(folder: Path, content: bytes) -> DescriptorReader:
    path = folder / "file"
    path.write_bytes(content)
    return DescriptorReader.open(path, "tier ssd, file x")


def encoded_table() -> tuple[str, bytes]:
    """(blob, segment table) of :data:`DATA` in two segments."""
    builder = SegmentTableBuilder()
    for part in (DATA[:1000], DATA[1000:]):
        builder.add(part)
    table = builder.build()
    return table.blob_id, bytes(table.encoded)


def test_a_whole_file_is_verified(tmp_path: Path) -> None:
    blob, table = encoded_table()
    content = DATA + table + encode_trailer(len(DATA), len(table))
    with file_of(tmp_path, content) as reader:
        assert verify_file(reader, blob).total_bytes == len(DATA)


@pytest.mark.parametrize(
    ("data", "trailer_offset", "message"),
    [
        pytest.param(DATA[1:], len(DATA), "its trailer speaks of", id="a byte is missing"),
        pytest.param(b"?" + DATA, len(DATA), "its trailer speaks of", id="a byte too many"),
        pytest.param(
            DATA[1:], len(DATA) - 1, "its table speaks of 1024", id="the table's is longer"
        ),
    ],
)
def test_parts_that_do_not_make_up_the_file_are_damage(
    tmp_path: Path, data: bytes, trailer_offset: int, message: str
) -> None:
    blob, table = encoded_table()
    content = data + table + encode_trailer(trailer_offset, len(table))
    with (
        file_of(tmp_path, content) as reader,
        pytest.raises(IntegrityError, match=message),
    ):
        read_table(reader, blob)


@pytest.mark.parametrize("num_bytes", [0, TRAILER.size - 1])
def test_a_file_shorter_than_a_trailer_is_damage(tmp_path: Path, num_bytes: int) -> None:
    with (
        file_of(tmp_path, bytes(num_bytes)) as reader,
        pytest.raises(IntegrityError, match=f"cut short: {num_bytes} bytes"),
    ):
        read_table(reader, None)
