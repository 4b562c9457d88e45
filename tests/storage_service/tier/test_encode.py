"""Blob files at rest: any encoding reads as the raw file does, or is found damaged."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay_server.model.encodings import CODES, RAW, RAW_WAY, SETTINGS, Method, Way, ways_to_try
from forebay_server.testing.tier_contract import random_bytes, write_blob
from forebay_server.tier import encode, encoded_reader, verify
from forebay_server.tier.buffers import BufferPool
from forebay_server.tier.codecs import BLOSC_HEADER, decode_segment, encode_segment
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.encode import StoredFile, encode_into, open_plain
from forebay_server.tier.encoded import ENTRY_DTYPE, TRAILER
from forebay_server.tier.store import Tier, TierReader
from forebay_server.tier.verify import read_table, verify_file
from forebay_server.tier.wrap import TierWrapper
from forebay_wire.errors import ForebayError, IntegrityError, NotFound, ResourceExhausted
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB, MIB
from forebay_wire.segments import SegmentTable, table_of, xxh3

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ENCODED = [name for name in CODES if name != RAW]
ALL_WAYS = [RAW_WAY, *ways_to_try("auto")]


class CountingTier(TierWrapper):
    """Counts the bytes that are read from it."""

    num_bytes = 0

    @contextmanager
    def around(self, operation: str, name: str, num_bytes: int) -> Iterator[None]:
        if operation == "read_into":
            self.num_bytes += num_bytes
        yield


class BytesReader(TierReader):
    """A file in memory."""

    def __init__(self, data: bytes, name: str) -> None:
        self.size_bytes = len(data)
        self.where = f"file {name}"
        self._data = data

    def read_into(self, offset: int, buffer: WriteableBuffer) -> None:
        view = memoryview(buffer)
        if offset + len(view) > len(self._data):
            raise IntegrityError(f"cut short ({self.where})")
        view[:] = self._data[offset : offset + len(view)]

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        pass


class BytesTier(TierWrapper):
    """Whatever is asked for, it is this."""

    data = b""

    def read(self, name: str) -> TierReader:
        return BytesReader(self.data, name)


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tier]:
    folder = tmp_path_factory.mktemp("tier")
    tier = DirectoryTier("hdd", "hdd", folder / "hdd", reserve_bytes=0)
    tier.open()
    yield tier
    tier.close()


def weights(num_bytes: int, seed: int = 0) -> bytes:
    """What trained float32 weights look like: small, with random mantissas."""
    values = np.random.default_rng(seed).normal(0, 0.02, num_bytes // 4 + 1).astype("<f4")
    return values.tobytes()[:num_bytes]


def text(num_bytes: int, seed: int = 0) -> bytes:
    """What LZ4 alone makes smaller: words again and again."""
    words = [b"storage ", b"of ", b"training ", b"data\n"]
    picked = np.random.default_rng(seed).integers(0, len(words), num_bytes // 3 + 1)
    return b"".join(words[one] for one in picked)[:num_bytes]


def counter(num_bytes: int, seed: int = 0) -> bytes:
    return np.arange(seed, seed + num_bytes // 4 + 1, dtype="<u4").tobytes()[:num_bytes]


def store(tier: Tier, pieces: list[bytes], setting: str) -> tuple[str, StoredFile]:
    """A blob of *pieces* in *tier*, encoded as *setting* says: its file."""
    source, target = new_random_name(), new_random_name()
    table = write_blob(tier, source, pieces)
    with open_plain(tier, source, RAW, table.blob_id) as reader:
        stored = encode_into(reader, tier, target, setting, table.blob_id)
    assert stored.table.blob_id == table.blob_id
    assert tier.head(tier.blob_name(target)) == stored.num_bytes
    return target, stored


def image_of(reader: TierReader) -> bytes:
    data = bytearray(reader.size_bytes)
    reader.read_into(0, data)
    return bytes(data)


def used(tier: Tier) -> tuple[int, int, int]:
    space = tier.space()
    return space.used_bytes, space.reserved_bytes, space.num_files


def raw_image(tier: Tier, pieces: list[bytes]) -> bytes:
    file = new_random_name()
    write_blob(tier, file, pieces)
    return tier.get(tier.blob_name(file))


# ------------------------------------------------------------------------------------ round trips

segments = st.one_of(
    st.binary(min_size=1, max_size=300),
    st.builds(weights, st.integers(1, 70_000), st.integers(0, 99)),
    st.builds(text, st.integers(1, 70_000), st.integers(0, 99)),
    st.builds(lambda size: bytes(size), st.integers(1, 70_000)),
)


@pytest.mark.parametrize("setting", SETTINGS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(segments, max_size=12), data=st.data())
def test_any_blob_reads_as_it_was(
    tier: Tier, setting: str, pieces: list[bytes], data: st.DataObject
) -> None:
    file, stored = store(tier, pieces, setting)
    expected = raw_image(tier, pieces)
    with open_plain(
        tier, file, stored.encoding, stored.table.blob_id, stored_bytes=stored.num_bytes
    ) as reader:
        assert image_of(reader) == expected
        assert verify_file(reader, stored.table.blob_id).encoded == stored.table.encoded
        for _ in range(3):
            start = data.draw(st.integers(0, len(expected)))
            stop = data.draw(st.integers(start, len(expected)))
            part = bytearray(stop - start)
            reader.read_into(start, part)
            assert part == expected[start:stop]


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
@settings(max_examples=40)
@given(data=st.one_of(segments, st.binary(min_size=1, max_size=17)))
def test_any_segment_decodes_in_any_way(way: Way, data: bytes) -> None:
    encoded = encode_segment(way, memoryview(data))
    target = bytearray(len(data))
    decode_segment(way, encoded, memoryview(target))
    assert target == data


def test_the_largest_segments_and_the_smallest(tier: Tier) -> None:
    pieces = [weights(4 * MIB), b"x", text(4 * MIB), random_bytes(4 * MIB, 1), b"y", weights(3)]
    file, stored = store(tier, pieces, "auto")
    assert stored.encoding != RAW
    with open_plain(tier, file, stored.encoding, stored.table.blob_id) as reader:
        assert image_of(reader) == raw_image(tier, pieces)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_empty_blob_stays_raw(tier: Tier, setting: str) -> None:
    file, stored = store(tier, [], setting)
    assert stored.encoding == RAW
    with open_plain(tier, file, RAW, stored.table.blob_id) as reader:
        assert verify_file(reader, stored.table.blob_id).num_segments == 0


def test_an_encoded_blob_is_encoded_again_and_made_raw(tier: Tier) -> None:
    pieces = [weights(300_000, seed) for seed in range(5)]
    file, first = store(tier, pieces, "shuffle-lz4")
    encoding = first.encoding
    for setting in ("lz4", "auto", "raw"):
        target = new_random_name()
        with open_plain(tier, file, encoding, first.table.blob_id) as reader:
            made = encode_into(reader, tier, target, setting, first.table.blob_id)
        file, encoding = target, made.encoding
    assert encoding == RAW
    assert tier.get(tier.blob_name(file)) == raw_image(tier, pieces)


def test_many_threads_encode_and_read_at_a_time(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer buffers than they would all like to have: none waits for ever."""
    for module, pool in (
        (encode, "SEGMENT_BUFFERS"),
        (verify, "SEGMENT_BUFFERS"),
        (encoded_reader, "STORED_BUFFERS"),
        (encoded_reader, "PLAIN_BUFFERS"),
    ):
        monkeypatch.setattr(module, pool, BufferPool(2))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            pieces = [weights(MIB, seed), text(3 * MIB, seed), weights(4 * MIB, seed + 1)]
            file, stored = store(tier, pieces, "auto")
            with open_plain(tier, file, stored.encoding, stored.table.blob_id) as reader:
                part = bytearray(2 * MIB)
                reader.read_into(MIB - 7, part)
                assert part == b"".join(pieces)[MIB - 7 : 3 * MIB - 7]
                again = encode_into(reader, tier, new_random_name(), "lz4", stored.table.blob_id)
                assert again.table.encoded == stored.table.encoded
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


# ------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (random_bytes(MIB, 7), RAW),
        (text(MIB), "lz4"),
        (weights(MIB), "shuffle-lz4"),
        (np.arange(MIB // 8, dtype="<u8").tobytes(), "shuffle-lz4"),
    ],
    ids=["noise", "text", "float32", "counter"],
)
def test_auto_takes_what_pays(tier: Tier, data: bytes, encoding: str) -> None:
    _, stored = store(tier, [data], "auto")
    assert stored.encoding == encoding
    assert (stored.num_bytes < len(data)) == (encoding != RAW)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_the_width_of_the_elements_is_found(tier: Tier, width: int) -> None:
    steps = np.random.default_rng(1).integers(0, 200, MIB // width)
    data = np.cumsum(steps).astype(f"<u{width}").tobytes()
    file, stored = store(tier, [data], "shuffle-lz4")
    entries = np.frombuffer(
        tier.get(tier.blob_name(file)),
        ENTRY_DTYPE,
        count=1,
        offset=stored.num_bytes - TRAILER.size - ENTRY_DTYPE.itemsize,
    )
    assert entries["width"].tolist() == [width]


def test_each_segment_has_the_way_of_its_own_type(tier: Tier) -> None:
    """A pack of a model in one type and moments in another."""
    rng = np.random.default_rng(3)
    wide = [np.cumsum(rng.integers(0, 200, MIB // 8)).astype("<u8").tobytes() for _ in range(4)]
    narrow = [np.cumsum(rng.integers(0, 3, MIB // 2)).astype("<u2").tobytes() for _ in range(4)]
    file, mixed = store(tier, [*wide, *narrow], "auto")
    alone = [store(tier, parts, "auto")[1].num_bytes for parts in (wide, narrow)]
    assert mixed.num_bytes < sum(alone) * 1.01
    with open_plain(tier, file, mixed.encoding, mixed.table.blob_id) as reader:
        assert verify_file(reader, mixed.table.blob_id).encoded == mixed.table.encoded
    entries = np.frombuffer(
        tier.get(tier.blob_name(file)),
        ENTRY_DTYPE,
        count=8,
        offset=mixed.num_bytes - TRAILER.size - 8 * ENTRY_DTYPE.itemsize,
    )
    assert entries["width"].tolist() == [8] * 4 + [2] * 4


def test_a_small_segment_does_not_speak_for_a_large_one(tier: Tier) -> None:
    for pieces in ([text(MIB), b"x"], [b"x", text(MIB), random_bytes(100, 1)]):
        assert store(tier, pieces, "auto")[1].encoding == "lz4"


def test_one_segment_of_noise_lies_as_it_is(tier: Tier) -> None:
    noise = random_bytes(200_000, 5)
    file, stored = store(tier, [text(MIB), noise, text(MIB)], "lz4")
    assert noise in tier.get(tier.blob_name(file))
    assert stored.num_bytes < 2 * MIB


# --------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_range_reads_only_its_segments(tier: Tier, encoding: str) -> None:
    pieces = [(weights if encoding != "lz4" else text)(256 * KIB, seed) for seed in range(40)]
    file, stored = store(tier, pieces, encoding)
    assert stored.encoding == encoding
    counting = CountingTier(tier)
    whole = b"".join(pieces)
    with open_plain(counting, file, encoding, stored.table.blob_id) as reader:
        opened = counting.num_bytes
        assert opened <= 64 * KIB
        for start, length, num_segments in [
            (256 * KIB * 20 + 5, 10, 1),
            (256 * KIB * 7 - 1, 2, 2),
            (256 * KIB * 30, 256 * KIB * 3, 3),
        ]:
            before = counting.num_bytes
            part = bytearray(length)
            reader.read_into(start, part)
            assert part == whole[start : start + length]
            assert 0 < counting.num_bytes - before <= num_segments * 256 * KIB
        before = counting.num_bytes
        read_table(reader, stored.table.blob_id)
        assert counting.num_bytes == before


def test_reading_past_the_end_says_cut_short(tier: Tier) -> None:
    file, stored = store(tier, [text(MIB)], "lz4")
    with open_plain(tier, file, "lz4", stored.table.blob_id) as reader:
        with pytest.raises(IntegrityError, match="cut short"):
            reader.read_into(reader.size_bytes - 1, bytearray(2))
        with pytest.raises(IntegrityError, match="cut short"):
            reader.read_into(reader.size_bytes + 5, bytearray(1))


# --------------------------------------------------------------------------------------- damage


def read_all(tier: Tier, file: str, encoding: str, table: SegmentTable) -> bytes:
    with open_plain(tier, file, encoding, table.blob_id) as reader:
        verify_file(reader, table.blob_id)
        return image_of(reader)


@pytest.mark.parametrize("encoding", ENCODED)
def test_every_flipped_bit_is_found(tier: Tier, encoding: str) -> None:
    make = text if encoding == "lz4" else counter
    pieces = [make(900, 1), random_bytes(40, 2), make(1000, 3), make(700, 4), b"z"]
    file, stored = store(tier, pieces, encoding)
    assert stored.encoding == encoding
    data = tier.get(tier.blob_name(file))
    damaged = BytesTier(tier)
    for bit in range(len(data) * 8):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        damaged.data = bytes(bad)
        with pytest.raises(IntegrityError, match=file):
            read_all(damaged, file, encoding, stored.table)


@pytest.mark.parametrize("encoding", ENCODED)
def test_every_truncation_is_found_without_reading_the_data(tier: Tier, encoding: str) -> None:
    make = text if encoding == "lz4" else weights
    file, stored = store(tier, [make(4_000, 1), make(500, 3)], encoding)
    data = tier.get(tier.blob_name(file))
    damaged = BytesTier(tier)
    for length in range(len(data)):
        damaged.data = data[:length]
        with pytest.raises(IntegrityError, match=file):
            open_plain(damaged, file, encoding, stored.table.blob_id)


def test_a_file_of_another_blob_encoding_or_size_is_refused(tier: Tier) -> None:
    file, stored = store(tier, [text(MIB)], "lz4")
    other = table_of([b"something else"])
    for encoding, blob, size in [
        ("lz4", other.blob_id, stored.num_bytes),
        ("shuffle-lz4", stored.table.blob_id, stored.num_bytes),
        ("lz4", stored.table.blob_id, stored.num_bytes + 1),
    ]:
        with pytest.raises(IntegrityError, match=file):
            open_plain(tier, file, encoding, blob, stored_bytes=size)
    with pytest.raises(IntegrityError), open_plain(tier, file, RAW, other.blob_id) as reader:
        verify_file(reader, stored.table.blob_id)
    with pytest.raises(NotFound):
        open_plain(tier, new_random_name(), "lz4", stored.table.blob_id)


def forge(
    tier: Tier, table: SegmentTable, stored: list[bytes], entries: list[tuple[int, ...]]
) -> Tier:
    """A file whose own digests are all right, whatever it says."""
    body = table.encoded + np.array(entries, ENTRY_DTYPE).tobytes()
    data = b"".join(stored)
    head = TRAILER.pack(b"FBENCODE", 1, CODES["lz4"], len(data), len(body), xxh3(body), 0)[:-8]
    made = BytesTier(tier)
    made.data = data + body + head + xxh3(head).to_bytes(8, "little")
    return made


@pytest.mark.parametrize("method", [one for one in Method if one is not Method.RAW])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(min_size=1, max_size=200), width=st.sampled_from([1, 2, 4, 8]))
def test_a_hostile_segment_with_good_digests_is_an_integrity_error(
    tier: Tier, method: Method, junk: bytes, width: int
) -> None:
    plain = bytes(100_000)
    if method is not Method.LZ4:  # as far as the decoder itself
        junk = BLOSC_HEADER.pack(2, 1, 0x21, width, len(plain), len(plain), len(junk) + 16) + junk
    table = table_of([plain])
    forged = forge(tier, table, [junk], [(len(junk), method, width, 0, xxh3(junk))])
    with open_plain(forged, "f", "lz4", table.blob_id) as reader, pytest.raises(IntegrityError):
        image_of(reader)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_a_wrong_decode_with_good_digests_is_never_given_out(tier: Tier, way: Way) -> None:
    table = table_of([b"a" * 100_000])
    wrong = bytes(encode_segment(way, memoryview(b"b" * 100_000)))
    entry = (len(wrong), way.method, way.width, 0, xxh3(wrong))
    with (
        open_plain(forge(tier, table, [wrong], [entry]), "f", "lz4", table.blob_id) as reader,
        pytest.raises(IntegrityError, match=r"segment 0 of blob .* does not match its digest"),
    ):
        image_of(reader)


@pytest.mark.parametrize(
    "entry",
    [
        (5, 9, 1, 0, 0),
        (5, 1, 3, 0, 0),
        (5, 1, 1, 7, 0),
        (0, 1, 1, 0, 0),
        (4, 1, 1, 0, 0),
        (101, 1, 1, 0, 0),
        (2**32 - 1, 1, 1, 0, 0),
    ],
    ids=["method", "width", "reserved", "no bytes", "gap", "larger than plain", "huge"],
)
def test_an_index_that_contradicts_itself_is_refused(tier: Tier, entry: tuple[int, ...]) -> None:
    table = table_of([b"x" * 100])
    forged = forge(tier, table, [b"12345"], [entry])
    with pytest.raises(IntegrityError, match="contradicts"):
        open_plain(forged, "f", "lz4", table.blob_id)


def test_a_damaged_source_is_not_copied(tier: Tier) -> None:
    source = new_random_name()
    table = write_blob(tier, source, [text(MIB), text(MIB, 1)])
    data = bytearray(tier.get(tier.blob_name(source)))
    data[MIB + 5] ^= 1
    damaged, target = new_random_name(), new_random_name()
    tier.put(tier.blob_name(damaged), data)
    before = used(tier)
    with (
        open_plain(tier, damaged, RAW, table.blob_id) as reader,
        pytest.raises(IntegrityError, match="segment 1"),
    ):
        encode_into(reader, tier, target, "auto", table.blob_id)
    assert tier.head(tier.blob_name(target)) is None
    assert used(tier) == before


def test_a_copy_that_is_interrupted_leaves_nothing(tier: Tier) -> None:
    source, target = new_random_name(), new_random_name()
    table = write_blob(tier, source, [text(MIB, seed) for seed in range(6)])
    told: list[int] = []

    def advance(num_bytes: int) -> None:
        told.append(num_bytes)
        if sum(told) >= 3 * MIB:
            raise ResourceExhausted("enough")

    before = used(tier)
    with (
        open_plain(tier, source, RAW, table.blob_id) as reader,
        pytest.raises(ForebayError, match="enough"),
    ):
        encode_into(reader, tier, target, "lz4", table.blob_id, advance=advance)
    assert tier.head(tier.blob_name(target)) is None
    assert used(tier) == before
