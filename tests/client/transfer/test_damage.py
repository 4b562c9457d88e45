"""Damaged bytes are never returned: an error names blob, segment, tier and whose they are."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import forebay
from forebay.testing.blobs import flip_bit, replica_files, store_blob, truncate
from forebay.transfer import Blob
from forebay_server.testing.daemon import DaemonProcess

SEGMENT = 256 * 1024
NUM_SEGMENTS = 4
CONTENT = random.Random(2).randbytes(SEGMENT * NUM_SEGMENTS)


@dataclass
class Stored:
    """A blob with one replica, and that replica's file."""

    client: forebay.Client
    id: str
    file: Path

    def open(self) -> Blob:
        [opened] = self.client.transfer.open([self.id], "dataset d v1")
        return opened


@pytest.fixture(scope="module")
def damaged_daemon(tmp_path_factory: pytest.TempPathFactory):
    with DaemonProcess(tmp_path_factory.mktemp("damage") / "data") as process:
        yield process


@pytest.fixture
def stored(damaged_daemon: DaemonProcess, way: str):
    with forebay.connect(damaged_daemon.address()["rpc"]) as client:
        before = set(replica_files(damaged_daemon.data))
        content = CONTENT[:-8] + random.randbytes(8)  # a blob of its own for each test
        blob = store_blob(client, content, [SEGMENT] * NUM_SEGMENTS)
        [file] = set(replica_files(damaged_daemon.data)) - before
        yield Stored(client, blob, file)


def mapped(blob: Blob) -> None:
    blob.map()


def mapped_in_pieces(blob: Blob) -> None:
    for offset in range(0, blob.num_bytes, 1000):
        blob.map(offset, min(1000, blob.num_bytes - offset))


def read(blob: Blob) -> None:
    blob.read_into(0, bytearray(blob.num_bytes))


def read_in_pieces(blob: Blob) -> None:
    for offset in range(0, blob.num_bytes, 100_000):
        blob.read_into(offset, bytearray(min(100_000, blob.num_bytes - offset)))


USES = [mapped, mapped_in_pieces, read, read_in_pieces]


@pytest.mark.parametrize("use", USES)
def test_flipped_bit_after_open(stored: Stored, use: Callable[[Blob], None]) -> None:
    blob = stored.open()
    flip_bit(stored.file, 2 * SEGMENT + 5)
    with pytest.raises(forebay.IntegrityError) as caught:
        use(blob)
    for part in ("segment 2", stored.id, "dataset d v1", "tier ssd", "recover"):
        assert part in caught.value.message


@pytest.mark.parametrize("use", USES)
def test_truncation_after_open(stored: Stored, use: Callable[[Blob], None]) -> None:
    blob = stored.open()
    truncate(stored.file, SEGMENT + 100)
    with pytest.raises(forebay.IntegrityError, match=rf"{stored.id}.*dataset d v1, tier ssd"):
        use(blob)


def test_truncation_between_two_uses(stored: Stored) -> None:
    """All was read and found right; the file is cut before it is mapped."""
    blob = stored.open()
    read(blob)
    truncate(stored.file, 0)
    with pytest.raises(forebay.IntegrityError):
        mapped(blob)


@pytest.mark.parametrize("place", ["table", "trailer", "length"])
def test_damage_that_shows_at_open(stored: Stored, place: str) -> None:
    size = stored.file.stat().st_size
    if place == "length":
        truncate(stored.file, size - 10)
    else:
        flip_bit(stored.file, -40 if place == "table" else -20)
    with pytest.raises(forebay.IntegrityError, match=r"dataset d v1"):
        read(stored.open())


def test_undamaged_segments_stay_readable(stored: Stored) -> None:
    blob = stored.open()
    flip_bit(stored.file, 3 * SEGMENT + 5)
    assert blob.map(0, 3 * SEGMENT) == CONTENT[: 3 * SEGMENT]


def test_missing_file_says_so(stored: Stored) -> None:
    stored.file.unlink()
    with pytest.raises((forebay.IntegrityError, forebay.NotFound), match="dataset d v1"):
        stored.open()
