"""The contract of a tier as tests: subclass :class:`TierContract` and say how to make yours."""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from forebay_server.tier.buffers import SEGMENT_BUFFERS
from forebay_server.tier.store import Tier, TierWriter
from forebay_server.tier.verify import copy_verified, read_table, verify_file
from forebay_wire.errors import AlreadyExists, IntegrityError, NotFound, StorageError
from forebay_wire.ids import new_random_name
from forebay_wire.segments import SegmentTable, encode_trailer, table_of

MIB: Final = 1 << 20


def random_bytes(num_bytes: int, seed: int) -> bytes:
    """The same *num_bytes* for the same *seed*."""
    return np.random.default_rng(seed).bytes(num_bytes)


def write_blob(tier: Tier, file: str, pieces: list[bytes]) -> SegmentTable:
    """Publish a blob file whose segments are *pieces*; its table."""
    table = table_of(pieces)
    with tier.create(tier.blob_name(file), sum(map(len, pieces))) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.write(table.encoded)
        writer.write(encode_trailer(table.total_bytes, len(table.encoded)))
        writer.publish()
    return table


def publish_at_once(
    tiers: Sequence[Tier], name: str, num_bytes: int, write: Callable[[TierWriter, int], object]
) -> list[int]:
    """Which of the writers of *name*, one for each of *tiers*, were not refused when all published
    at the same moment. *write* gives each its *num_bytes*, by its number."""
    won: list[int] = []
    ready = threading.Barrier(len(tiers))

    def publish(number: int) -> None:
        with tiers[number].create(name, num_bytes) as writer:
            write(writer, number)
            ready.wait(timeout=60)
            try:
                writer.publish()
                won.append(number)
            except AlreadyExists:
                pass

    threads = [threading.Thread(target=publish, args=(one,)) for one in range(len(tiers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return won


class TierContract:
    """What each tier has to pass. The promises are in the docstrings of ``tier.store``."""

    @abstractmethod
    def make_tier(self, folder: Path) -> Tier:
        """A tier, not open yet; the same *folder* means the same place."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        tier = self.make_tier(tmp_path)
        tier.open()
        yield tier
        for info in list(tier.list()):
            tier.delete(info.name)
        tier.close()

    @pytest.fixture
    def name(self, tier: Tier) -> str:
        """A name that no file has."""
        return tier.blob_name(new_random_name())

    # ------------------------------------------------------------------------------- whole files

    @pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4097, MIB, 5 * MIB + 123])
    def test_a_file_reads_as_it_was_put(self, tier: Tier, name: str, num_bytes: int) -> None:
        data = random_bytes(num_bytes, seed=num_bytes)
        tier.put(name, data)
        assert tier.get(name) == data
        assert tier.head(name) == num_bytes

    def test_a_taken_name_is_refused_and_its_file_stays(self, tier: Tier, name: str) -> None:
        tier.put(name, b"first")
        with pytest.raises(AlreadyExists):
            tier.put(name, b"second")
        assert tier.get(name) == b"first"

    def test_a_missing_file_is_not_found(self, tier: Tier, name: str) -> None:
        assert tier.head(name) is None
        with pytest.raises(NotFound):
            tier.read(name)
        with pytest.raises(NotFound):
            tier.get(name)

    def test_deleting_twice_is_no_error(self, tier: Tier, name: str) -> None:
        tier.put(name, b"data")
        tier.delete(name)
        tier.delete(name)
        assert tier.head(name) is None

    def test_of_many_writers_of_one_name_exactly_one_publishes(self, tier: Tier, name: str) -> None:
        won = publish_at_once(
            [tier] * 4, name, MIB, lambda writer, number: writer.write(bytes([number]) * MIB)
        )
        assert len(won) == 1
        assert tier.get(name) == bytes(won) * MIB

    # ------------------------------------------------------------------------------- in pieces

    def test_pieces_of_any_size_and_alignment_end_up_in_order(self, tier: Tier, name: str) -> None:
        data = random_bytes(9 * MIB, seed=1)
        cuts = [4 * MIB, 4 * MIB, 4 * MIB + 1, 4 * MIB + 4096, 4 * MIB + 4096, 7 * MIB, len(data)]
        with SEGMENT_BUFFERS.borrow() as buffer, tier.create(name, len(data)) as writer:
            start = 0
            for cut in cuts:
                piece = buffer[: cut - start]
                piece[:] = data[start:cut]
                writer.write(piece)
                piece[:] = bytes(len(piece))  # what was written may be overwritten
                start = cut
            assert writer.num_bytes == len(data)
            writer.publish()
        assert tier.get(name) == data

    def test_a_file_may_turn_out_shorter_or_longer_than_expected(self, tier: Tier) -> None:
        for expected_bytes in (0, 100, 5 * MIB):
            name = tier.blob_name(new_random_name())
            with tier.create(name, expected_bytes) as writer:
                writer.write(b"x" * (2 * MIB + 1))
                writer.publish()
            assert tier.head(name) == 2 * MIB + 1

    def test_nothing_is_visible_before_it_is_published(self, tier: Tier, name: str) -> None:
        with tier.create(name, 100) as writer:
            writer.write(b"x" * 100)
            assert tier.head(name) is None
            assert list(tier.list()) == []
            writer.publish()
        assert tier.head(name) == 100

    def test_leaving_without_publishing_leaves_nothing(self, tier: Tier, name: str) -> None:
        before = tier.space()
        with tier.create(name, MIB) as writer:
            writer.write(b"x" * MIB)
        after = tier.space()
        assert tier.head(name) is None
        assert (after.used_bytes, after.reserved_bytes) == (before.used_bytes, 0)

    def test_an_ended_writer_refuses_to_go_on(self, tier: Tier, name: str) -> None:
        with tier.create(name, 1) as writer:
            writer.publish()
            writer.abort()  # nothing after publish
            with pytest.raises(StorageError):
                writer.write(b"more")
        assert tier.head(name) == 0

    # ------------------------------------------------------------------------------- reading

    def test_any_range_can_be_read(self, tier: Tier, name: str) -> None:
        data = random_bytes(3 * MIB, seed=2)
        tier.put(name, data)
        with tier.read(name) as reader:
            assert reader.size_bytes == len(data)
            for offset, length in [(0, 10), (4095, 4098), (2 * MIB, MIB), (3 * MIB, 0)]:
                buffer = bytearray(length)
                reader.read_into(offset, buffer)
                assert buffer == data[offset : offset + length]

    def test_reading_past_the_end_says_cut_short(self, tier: Tier, name: str) -> None:
        tier.put(name, b"12345")
        with tier.read(name) as reader, pytest.raises(IntegrityError, match="cut short"):
            reader.read_into(3, bytearray(3))

    def test_a_descriptor_is_read_only_and_outlives_deletion(self, tier: Tier, name: str) -> None:
        tier.put(name, b"12345")
        with tier.read(name) as reader:
            descriptor = reader.fileno()
            if descriptor is None:
                return
            tier.delete(name)
            assert os.pread(descriptor, 5, 0) == b"12345"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(descriptor, b"x", 0)

    # ------------------------------------------------------------------------------- blob files

    @pytest.mark.parametrize("limit", [1, 100_000, 10 * MIB])
    def test_a_file_that_is_read_whole_is_the_same(self, tier: Tier, name: str, limit: int) -> None:
        content = random_bytes(200_003, 1)
        tier.put(name, content)
        with tier.read_whole(name, limit) as reader:
            found = bytearray(reader.size_bytes)
            reader.read_into(150_000, memoryview(found)[150_000:])
            reader.read_into(0, memoryview(found)[:150_000])
        assert bytes(found) == content
        with pytest.raises(NotFound):
            tier.read_whole(tier.blob_name(new_random_name()), limit)

    @pytest.mark.parametrize("is_cached", [True, False])
    def test_what_is_written_is_read_before_it_is_published(
        self, tier: Tier, name: str, is_cached: bool
    ) -> None:
        content = random_bytes(2 * MIB + 5, 1)
        with tier.create(name, len(content)) as writer:
            if is_cached:
                writer.keep_cached()
            writer.write(memoryview(content)[: MIB + 1])
            writer.write(memoryview(content)[MIB + 1 :])
            try:
                descriptor = writer.open_early()
            except NotImplementedError:
                pytest.skip("this tier has no descriptors")
            assert tier.head(name) is None
            with os.fdopen(descriptor, "rb") as early:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.pwrite(early.fileno(), b"x", 0)
                assert early.read() == content
                writer.publish()
                early.seek(0)
                assert early.read() == content
        assert tier.get(name) == content

    def test_a_verified_copy_has_the_same_bytes(self, tier: Tier) -> None:
        pieces = [random_bytes(size, seed=size) for size in (4 * MIB, 1, 300_000, 3 * MIB, 3 * MIB)]
        source, target = new_random_name(), new_random_name()
        table = write_blob(tier, source, pieces)
        with (
            tier.read(tier.blob_name(source)) as reader,
            tier.create(tier.blob_name(target), reader.size_bytes) as writer,
        ):
            assert copy_verified(reader, writer, table.blob_id).blob_id == table.blob_id
            writer.publish()
        assert tier.get(tier.blob_name(source)) == tier.get(tier.blob_name(target))
        with tier.read(tier.blob_name(target)) as reader:
            assert verify_file(reader, table.blob_id).encoded == table.encoded

    def test_the_empty_blob_is_a_table_and_a_trailer(self, tier: Tier) -> None:
        file = new_random_name()
        table = write_blob(tier, file, [])
        with tier.read(tier.blob_name(file)) as reader:
            assert verify_file(reader, table.blob_id).num_segments == 0

    @pytest.mark.parametrize("position", [0, 100_000, 299_999, 300_010, -33, -20, -1])
    def test_a_flipped_bit_is_found_wherever_it_is(self, tier: Tier, position: int) -> None:
        whole, damaged = new_random_name(), new_random_name()
        table = write_blob(tier, whole, [random_bytes(200_000, 3), random_bytes(100_000, 4)])
        data = bytearray(tier.get(tier.blob_name(whole)))
        data[position] ^= 1
        tier.put(tier.blob_name(damaged), data)
        with (
            tier.read(tier.blob_name(damaged)) as reader,
            pytest.raises(IntegrityError, match=damaged),
        ):
            verify_file(reader, table.blob_id)

    @pytest.mark.parametrize("cut", [1, 32, 33, 150, 100_000, 300_150])
    def test_a_truncation_is_found_without_reading_the_data(self, tier: Tier, cut: int) -> None:
        whole, damaged = new_random_name(), new_random_name()
        table = write_blob(tier, whole, [random_bytes(200_000, 5), random_bytes(100_000, 6)])
        tier.put(tier.blob_name(damaged), tier.get(tier.blob_name(whole))[:-cut])
        with tier.read(tier.blob_name(damaged)) as reader, pytest.raises(IntegrityError):
            read_table(reader, table.blob_id)

    # ------------------------------------------------------------------------------- the whole

    def test_listing_names_every_file_once(self, tier: Tier) -> None:
        names = {tier.blob_name(new_random_name()): size for size in (0, 1, 5000)}
        for name, size in names.items():
            tier.put(name, b"x" * size)
        assert sorted((info.name, info.size_bytes) for info in tier.list()) == sorted(names.items())
        first = min(names)
        for prefix in (first, first[:7], ""):
            listed = {info.name for info in tier.list(prefix)}
            assert listed == {name for name in names if name.startswith(prefix)}
        assert all(info.modified_unix > 1e9 for info in tier.list())

    def test_space_is_reserved_used_and_given_back(self, tier: Tier, name: str) -> None:
        empty = tier.space()
        with tier.create(name, 10 * MIB) as writer:
            assert tier.space().reserved_bytes >= 10 * MIB
            writer.write(b"x" * MIB)
            writer.publish()
        used = tier.space()
        assert used.used_bytes - empty.used_bytes >= MIB
        assert used.used_bytes - empty.used_bytes < 2 * MIB
        assert used.reserved_bytes == 0
        assert used.num_files == empty.num_files + 1
        tier.delete(name)
        assert tier.space().used_bytes == empty.used_bytes
        assert tier.space().num_files == empty.num_files

    def test_opening_again_finds_and_counts_what_was_published(self, tmp_path: Path) -> None:
        first = self.make_tier(tmp_path)
        first.open()
        name = first.blob_name(new_random_name())
        first.put(name, b"x" * 100_000)
        before = first.space()
        first.close()
        second = self.make_tier(tmp_path)
        second.open()
        assert second.get(name) == b"x" * 100_000
        assert second.space().used_bytes == before.used_bytes
        assert second.space().num_files == before.num_files
        second.delete(name)
        second.close()
