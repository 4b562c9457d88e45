"""The object tier on a real HDFS passes the contract of tiers, where there is one to test with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from forebay_server.testing.hdfs import URL_VARIABLE, hdfs_tier, missing_hdfs
from forebay_server.testing.tier_contract import MIB, TierContract, publish_at_once, random_bytes
from forebay_server.tier.parts import PART_BYTES
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier, TierWriter
from forebay_wire.errors import AlreadyExists, ForebayError, NotFound, StorageError
from forebay_wire.ids import new_random_name

needs_hdfs = pytest.mark.skipif(missing_hdfs() is not None, reason=missing_hdfs() or "")
SESSION = f"test-{new_random_name()[:12]}"
LARGE_BYTES = 3 * PART_BYTES + 12345


@pytest.fixture(scope="module", autouse=True)
def _remove() -> Iterator[None]:
    yield
    if missing_hdfs() is None:
        files, root = bare_files()
        if files.exists(root):
            files.rm(root, recursive=True)


def bare_files() -> tuple[Any, str]:
    """A bare client, and this session's folder."""
    files, root = fsspec.core.url_to_fs(os.environ[URL_VARIABLE], skip_instance_cache=True)
    return files, f"{root}/{SESSION}"


def make(place: str, **arguments: Any) -> RemoteTier:
    return hdfs_tier(f"{SESSION}/{place}", **arguments)


@needs_hdfs
class TestHdfs(TierContract):
    def make_tier(self, folder: Path) -> Tier:
        return make(folder.name)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[RemoteTier]:
    made = make(f"own-{tmp_path.name}")
    made.open()
    yield made
    made.close()


@needs_hdfs
def test_a_large_file_is_whole_and_leaves_nothing_beside_it(tier: RemoteTier) -> None:
    name, data = tier.blob_name(new_random_name()), random_bytes(LARGE_BYTES, 1)
    tier.put(name, data)
    assert tier.get(name) == data
    with pytest.raises(AlreadyExists):
        tier.put(name, random_bytes(LARGE_BYTES, 2))
    assert tier.get(name) == data
    assert unfinished_of(tier) == []


@needs_hdfs
def test_of_many_writers_of_one_large_name_exactly_one_publishes(tier: RemoteTier) -> None:
    name = tier.blob_name(new_random_name())

    def write(writer: TierWriter, number: int) -> None:
        for _ in range(3 * PART_BYTES // MIB):
            writer.write(bytes([number]) * MIB)

    won = publish_at_once([tier] * 3, name, LARGE_BYTES, write)
    assert len(won) == 1
    assert tier.get(name) == bytes(won) * (3 * PART_BYTES)
    assert unfinished_of(tier) == []


KILLED = """
import os, sys
from forebay_server.tier.remote import RemoteTier
tier = RemoteTier("object", sys.argv[1])
tier.open()
writer = tier.create("data/never", 40 << 20)
writer.write(bytes(20 << 20))
os._exit(9)
"""


@needs_hdfs
def test_what_a_killed_writer_left_is_never_seen_and_swept_once_it_is_old(tmp_path: Path) -> None:
    tier = make("killed", left_over_seconds=-1)
    url = f"{os.environ[URL_VARIABLE]}/{SESSION}/killed"
    subprocess.run([sys.executable, "-c", KILLED, url], check=False, timeout=60)
    young = make("killed")
    young.open()
    assert len(unfinished_of(young)) == 1, "a day has not passed: it may be another writer's"
    assert list(young.list()) == []
    young.close()
    tier.open()
    assert unfinished_of(tier) == []
    tier.close()


@needs_hdfs
def test_in_a_folder_that_is_gone_no_file_is_gone(tier: RemoteTier) -> None:
    name = tier.blob_name(new_random_name())
    tier.put(name, b"data")
    files, root = bare_files()
    folder = f"{root}/{tier.location.rpartition('/')[2]}"
    files.mv(folder, f"{folder}-away")
    for call in (tier.head, tier.read):
        with pytest.raises(StorageError, match="is not there"):
            call(name)
    with pytest.raises(StorageError, match="is not there"):
        list(tier.list())
    with pytest.raises(StorageError, match="is not there"):
        tier.put(tier.blob_name(new_random_name()), b"data")
    assert not files.exists(folder)
    files.mv(f"{folder}-away", folder)
    assert tier.get(name) == b"data"


@needs_hdfs
def test_an_empty_place_to_recover_from_is_refused() -> None:
    with pytest.raises(NotFound, match="holds no manifests/"):
        make("nothing", must_have="manifests/").open()
    files, root = bare_files()
    assert not files.exists(f"{root}/nothing")


@pytest.mark.slow
def test_a_name_node_that_is_not_there_is_one_clear_line() -> None:
    pytest.importorskip("hdfs_native")
    with pytest.raises(ForebayError, match=r"failed opening it: 6 tries.*Connection refused") as it:
        RemoteTier("object", "hdfs://127.0.0.1:1/x").open()
    assert "\n" not in it.value.message


def unfinished_of(tier: RemoteTier) -> list[str]:
    files, root = bare_files()
    return list(files.ls(f"{root}/{tier.location.rpartition('/')[2]}/tmp", detail=False))
