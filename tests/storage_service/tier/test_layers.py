"""Segments that lie as differences: read as they were, or found damaged, whatever is wrong."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forebay_server.model.deltas import LARGEST_SHARE
from forebay_server.model.encodings import AUTO, PIECES, RAW
from forebay_server.model.extents import ObjectBlob
from forebay_server.model.sharing import Placed, merged
from forebay_server.testing.tier_contract import random_bytes, write_blob
from forebay_server.tier import deltas, encode, encoded_reader, layers, verify
from forebay_server.tier.buffers import BufferPool
from forebay_server.tier.deltas import BaseReader, DamagedBase, DeltaFile, encode_deltas
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.encode import StoredFile, encode_into, open_plain
from forebay_server.tier.store import Tier, TierReader
from forebay_server.tier.verify import verify_file
from forebay_server.tier.wrap import TierWrapper
from forebay_wire.errors import IntegrityError, NotFound
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB, MIB
from forebay_wire.segments import SegmentTable, table_of


@pytest.fixture(scope="module")
def tier() -> Iterator[Tier]:
    """In memory: hundreds of files are written, and fsynced."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        tier = DirectoryTier("hdd", "hdd", Path(folder) / "hdd", reserve_bytes=0)
        tier.open()
        yield tier
        tier.close()


def weights(num_bytes: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).normal(0, 0.02, num_bytes // 4 + 1).astype("<f4")
    return values.tobytes()[:num_bytes]


def nudged(data: bytes, seed: int = 1) -> bytes:
    """*data* with the low byte of every fourth changed: as weights are after a small step."""
    found = np.frombuffer(data, np.uint8).copy()
    found[::4] ^= np.random.default_rng(seed).integers(0, 256, len(found[::4]), dtype=np.uint8)
    return found.tobytes()


class Stored:
    """A blob in a tier of which each generation of pieces lies on the one before."""

    def __init__(self, tier: Tier, generations: list[list[bytes]]) -> None:
        self.tier = tier
        self.pieces = generations[-1]
        self.table = table_of(self.pieces)
        self.files: list[str] = []
        self.made: DeltaFile | None = None
        placed: list[Placed] = []
        base: tuple[str, SegmentTable] | None = None
        for pieces in generations:
            source = new_random_name()
            table = write_blob(tier, source, pieces)
            file, stored, is_delta = self._store(source, table, base)
            below = [one.layers for one in placed]
            placed = [
                Placed(
                    file, int(table.offsets[index]), len(piece), stored.num_bytes, stored.encoding,
                    below[index] if is_delta[index] else (),
                )
                for index, piece in enumerate(pieces)
            ]  # fmt: skip
            self.files.append(file)
            base = source, table
        self.list = ObjectBlob(self.table, tuple(merged(placed, "", 0)), PIECES)

    def _store(
        self, source: str, table: SegmentTable, base: tuple[str, SegmentTable] | None
    ) -> tuple[str, StoredFile, Sequence[bool]]:
        file = new_random_name()
        with open_plain(self.tier, source, RAW, table.blob_id) as reader:
            if base is not None:
                with open_plain(self.tier, base[0], RAW, base[1].blob_id) as other:
                    found = BaseReader(other, base[1], range(table.num_segments))
                    self.made = encode_deltas(reader, found, self.tier, file, AUTO)
                if self.made is not None:
                    return file, self.made.stored, self.made.is_delta
            stored = encode_into(reader, self.tier, file, AUTO, table.blob_id)
            return file, stored, [False] * table.num_segments

    @property
    def whole(self) -> bytes:
        return b"".join(self.pieces)

    def open(self, tier: Tier | None = None, found: ObjectBlob | None = None) -> TierReader:
        name = new_random_name()
        self.tier.put(self.tier.blob_name(name), (found or self.list).encode())
        return open_plain(tier or self.tier, name, PIECES, self.table.blob_id)


def chain(num_layers: int, sizes: list[int], seed: int = 0) -> list[list[bytes]]:
    found = [[weights(size, seed + index) for index, size in enumerate(sizes)]]
    for layer in range(1, num_layers):
        found.append([nudged(piece, layer) for piece in found[-1]])
    return found


def read_all(reader: TierReader) -> bytes:
    data = bytearray(reader.size_bytes)
    reader.read_into(0, data)
    return bytes(data)


sizes = st.lists(st.integers(1, 90_000), min_size=1, max_size=8)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=sizes, num_layers=st.integers(1, 5), mixed=st.booleans(), data=st.data())
def test_any_chain_reads_as_it_was(
    tier: Tier, sizes: list[int], num_layers: int, mixed: bool, data: st.DataObject
) -> None:
    generations = chain(num_layers, sizes)
    if mixed:  # some changed altogether on their way
        for number in range(1, num_layers):
            for index in range(number % 2, len(sizes), 3):
                generations[number][index] = random_bytes(sizes[index], 100 * number + index)
    stored = Stored(tier, generations)
    with stored.open() as reader:
        assert verify_file(reader, stored.table.blob_id).encoded == stored.table.encoded
        image = read_all(reader)
        assert image[: len(stored.whole)] == stored.whole
        for _ in range(4):
            start = data.draw(st.integers(0, len(image)))
            stop = data.draw(st.integers(start, len(image)))
            part = bytearray(stop - start)
            reader.read_into(start, part)
            assert part == image[start:stop]


def test_what_pays_is_a_difference_and_what_does_not_is_not(tier: Tier) -> None:
    same, other = weights(MIB), random_bytes(MIB, 5)
    stored = Stored(tier, [[same, weights(MIB, 9)], [nudged(same), other]])
    assert stored.made is not None
    assert stored.made.is_delta == (True, False)
    assert stored.made.plain_bytes == MIB
    assert stored.made.delta_bytes < 0.3 * MIB
    assert Stored(tier, [[weights(MIB)], [weights(MIB, 1)]]).made is None  # nothing is written
    alone = Stored(tier, [[same]]).list.extents[0].file_bytes
    assert stored.made.delta_bytes < LARGEST_SHARE * alone


def test_the_largest_segments_and_the_smallest(tier: Tier) -> None:
    stored = Stored(tier, chain(2, [4 * MIB, 1, 4 * MIB, 70_000]))
    assert stored.list.has_layers
    with stored.open() as reader:
        part = bytearray(5 * MIB)
        reader.read_into(3 * MIB - 5, part)
        assert part == stored.whole[3 * MIB - 5 : 8 * MIB - 5]
        verify_file(reader, stored.table.blob_id)


def test_each_layer_is_read_once(tier: Tier) -> None:
    stored = Stored(tier, chain(4, [256 * KIB] * 8))
    reads: list[tuple[str, int, int]] = []

    class Watched(TierWrapper):
        def read(self, name: str) -> TierReader:
            return Noting(super().read(name), name)

    class Noting(TierReader):
        def __init__(self, inner: TierReader, name: str) -> None:
            self.inner, self.name = inner, name
            self.size_bytes, self.where = inner.size_bytes, inner.where

        def read_into(self, offset: int, buffer: object) -> None:
            reads.append((self.name, offset, memoryview(buffer).nbytes))  # type: ignore[arg-type]
            self.inner.read_into(offset, buffer)  # type: ignore[arg-type]

        def fileno(self) -> None:
            return None

        def close(self) -> None:
            self.inner.close()

    with stored.open(Watched(tier)) as reader:
        reads.clear()
        data = bytearray(2 * MIB)
        reader.read_into(0, data)
    assert data == stored.whole
    assert len(reads) == len({name for name, _, _ in reads}) == 4
    assert sum(size for _, _, size in reads) < 2 * sum(
        one.file_bytes for one in stored.list.extents if one.layer == 3
    )


# ------------------------------------------------------------------------------------------- damage


class Damaged(TierWrapper):
    """One file has other bytes."""

    name = ""
    data = b""

    def read(self, name: str) -> TierReader:
        if name != self.name:
            return super().read(name)
        other = new_random_name()
        self.put(self.blob_name(other), self.data)
        return super().read(self.blob_name(other))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_byte_anywhere_is_found_or_does_not_matter(
    tier: Tier, data: st.DataObject
) -> None:
    stored = _small(tier)
    number = data.draw(st.integers(0, len(stored.files) - 1))
    name = tier.blob_name(stored.files[number])
    content = bytearray(tier.get(name))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = Damaged(tier)
    damaged.name, damaged.data = name, bytes(content)
    try:
        with stored.open(damaged) as reader:
            found = read_all(reader)
    except IntegrityError:
        return
    assert found[: len(stored.whole)] == stored.whole


_stored: list[Stored] = []


def _small(tier: Tier) -> Stored:
    if not _stored:
        _stored.append(Stored(tier, chain(4, [3000, 700, 5000])))
    return _stored[0]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_hostile_list_with_a_good_digest_gives_the_bytes_or_an_error(
    tier: Tier, data: st.DataObject
) -> None:
    """Any field of any extent is something else."""
    stored = _small(tier)
    extents = list(stored.list.extents)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(extents) - 1))
        numbers = st.one_of(
            st.integers(0, 9000),
            st.sampled_from([0, 700, 3000, 3700, 8700, 2**32, 2**63, 2**64 - 1]),
        )
        change = data.draw(
            st.one_of(
                st.builds(lambda n: {"blob_offset": n}, numbers),
                st.builds(lambda n: {"file_offset": n}, numbers),
                st.builds(lambda n: {"num_bytes": n}, numbers),
                st.builds(lambda n: {"layer": n}, st.integers(0, 2**32 - 1)),
                st.builds(lambda n: {"file": n}, st.sampled_from(stored.files)),
                st.sampled_from([{}, {"drop": 1}, {"twice": 1}]),
            )
        )
        if "drop" in change and len(extents) > 1:
            del extents[index]
        elif "twice" in change:
            extents.insert(index, extents[index])
        elif "drop" not in change:
            extents[index] = replace(extents[index], **change)
    try:
        with stored.open(found=replace(stored.list, extents=tuple(extents))) as reader:
            found = bytearray(len(stored.whole))
            reader.read_into(0, found)
            verify_file(reader, stored.table.blob_id)
    except (IntegrityError, NotFound):
        return
    assert found == stored.whole


def test_a_base_that_is_missing_is_told(tier: Tier) -> None:
    stored = Stored(tier, chain(2, [5000]))
    tier.delete(tier.blob_name(stored.files[0]))
    with pytest.raises(NotFound):
        stored.open()


def test_a_base_that_is_damaged_where_it_is_read_is_not_used(tier: Tier) -> None:
    base, source, file = new_random_name(), new_random_name(), new_random_name()
    old = [weights(MIB), weights(MIB, 1)]
    table = write_blob(tier, base, old)
    data = bytearray(tier.get(tier.blob_name(base)))
    data[MIB + 400_000] ^= 1
    damaged = new_random_name()
    tier.put(tier.blob_name(damaged), data)
    new = write_blob(tier, source, [nudged(one) for one in old])
    before = {info.name for info in tier.list()}
    with (
        open_plain(tier, source, RAW, new.blob_id) as reader,
        open_plain(tier, damaged, RAW, None) as other,
        pytest.raises(DamagedBase, match="segment 1"),
    ):
        encode_deltas(reader, BaseReader(other, table, range(2)), tier, file, AUTO)
    assert {info.name for info in tier.list()} == before


def test_many_threads_write_and_read_at_a_time(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer buffers than they would all like to have: none waits for ever."""
    for module, pool in (
        (encode, "SEGMENT_BUFFERS"),
        (deltas, "SEGMENT_BUFFERS"),
        (deltas, "BASE_BUFFERS"),
        (verify, "SEGMENT_BUFFERS"),
        (layers, "WHOLE_BUFFERS"),
        (layers, "LAYER_BUFFERS"),
        (encoded_reader, "STORED_BUFFERS"),
        (encoded_reader, "PLAIN_BUFFERS"),
    ):
        monkeypatch.setattr(module, pool, BufferPool(2))
    shared = BufferPool(2)
    for module in (encode, deltas, verify):
        monkeypatch.setattr(module, "SEGMENT_BUFFERS", shared)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            stored = Stored(tier, chain(2, [MIB, 300_000, MIB], seed))
            with stored.open() as reader:
                verify_file(reader, stored.table.blob_id)
                part = bytearray(MIB)
                reader.read_into(MIB // 2, part)
                assert part == stored.whole[MIB // 2 : MIB // 2 + MIB]
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)
