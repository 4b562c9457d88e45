"""Origins read by ranges, several at a time, from a store that is slow, cut off, or has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forebay_server.testing.http_proxy import Fault, FaultyProxy
from forebay_server.testing.s3 import S3Bucket
from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.origin import OriginPlaces
from forebay_server.tier.origin_ranges import AT_ONCE, RANGE_BYTES, in_order
from forebay_wire.errors import OriginChanged

NUM_BYTES = 5 * RANGE_BYTES + 12345


@pytest.fixture
def proxy(s3: S3Bucket) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as made:
        yield made


def read(places: OriginPlaces, url: str) -> bytes:
    looked = places.look(url)
    with in_order(places.open(url, looked.num_bytes, looked.validator)) as pieces:
        return b"".join(map(bytes, pieces))


def test_ranges_overlap_and_come_in_order(s3: S3Bucket, proxy: FaultyProxy) -> None:
    data, place = random_bytes(NUM_BYTES, 1), s3.url("ranges")
    s3.file_system().pipe_file(f"{place}/a", data)
    behind = replace(s3, endpoint=proxy.endpoint)
    places = OriginPlaces([place], options=behind.options)
    proxy.latency_seconds = 0.2
    assert read(places, f"{place}/a") == data
    assert proxy.most_at_once == AT_ONCE
    proxy.latency_seconds = 0.0
    proxy.fail(Fault("cut answer", "GET", "ranges/a", times=2, num_bytes=100_000))
    proxy.fail(Fault("answer", "GET", "ranges/a", times=2))
    assert read(places, f"{place}/a") == data
    places.close()


def test_a_change_between_two_ranges_is_told_and_gives_the_memory_back(
    s3: S3Bucket, tmp_path: Path
) -> None:
    place = s3.url("changing")
    local = tmp_path / "corpus"
    local.mkdir()
    files = s3.file_system()
    places = OriginPlaces([place, str(local)], options=s3.options)
    before, after = random_bytes(NUM_BYTES, 1), random_bytes(NUM_BYTES, 2)

    def change_in_the_middle(url: str, write: Callable[[bytes], object]) -> None:
        write(before)
        looked = places.look(url)
        with in_order(places.open(url, looked.num_bytes, looked.validator)) as pieces:
            assert bytes(next(pieces)) == before[:RANGE_BYTES]
            write(after)
            with pytest.raises(OriginChanged, match="/a has changed"):
                list(pieces)

    change_in_the_middle(f"{place}/a", lambda data: files.pipe_file(f"{place}/a", data))
    for _ in range(6):  # kept buffers would be used up
        change_in_the_middle(f"file://{local}/a", (local / "a").write_bytes)
    places.close()


@pytest.mark.parametrize("num_bytes", [0, 1, RANGE_BYTES, RANGE_BYTES + 1])
def test_any_size(tmp_path: Path, num_bytes: int) -> None:
    data = random_bytes(num_bytes, 3)
    (tmp_path / "a").write_bytes(data)
    assert read(OriginPlaces([str(tmp_path)]), f"file://{tmp_path}/a") == data
