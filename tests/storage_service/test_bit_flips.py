"""One flipped bit at a time, all over what is stored: each is noticed, and repaired or refused.

What the catalog keeps is swept by ``catalog/test_flips.py``.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from forebay_server.catalog.queries_jobs import COPY, FLUSH, REPAIR
from forebay_server.model.extents import ObjectBlob
from forebay_server.move.copy import copy_target
from forebay_server.testing.integrity import IntegrityNode, flip, open_integrity
from forebay_server.tier.encode import open_plain
from forebay_server.tier.verify import verify_file
from forebay_wire.errors import ForebayError, IntegrityError, InvalidRequest
from forebay_wire.manifest import parse, read_stamp

PIECES = [(np.arange(150, dtype=np.int32) % 50 + n).tobytes() for n in (0, 10**6)] + [b"tail"]
NUM_MENDED = 9
"""Flips of each file for which the whole way from finding to repairing is gone."""

Check = Callable[[], object]


@asynccontextmanager
async def open_stored(folder: Path) -> AsyncIterator[tuple[IntegrityNode, str, str]]:
    """A manifest and its blob: raw in ssd, encoded in two ways in hdd and object."""
    async with open_integrity(folder) as node:
        node.node.tiers.get("hdd").encoding = "lz4"
        node.node.tiers.get("object").encoding = "shuffle-lz4"
        manifest, (blob,) = await node.add_dataset(PIECES)
        await node.run_queued(FLUSH)
        await node.run(COPY, copy_target(blob, "hdd"))
        found = {one.tier: one.encoding for one in (await node.node.locate(blob)).live()}
        assert found == {"ssd": "raw", "hdd": "lz4", "object": "shuffle-lz4"}
        yield node, manifest, blob


async def stored_files(
    node: IntegrityNode, manifest: str, blob: str
) -> dict[str, tuple[Path, Check]]:
    """What to sweep: its path, and a reading of it that raises if it is not good."""
    objects = node.node.folder / "object"
    lists, manifests = objects / "blobs" / blob, objects / "manifests" / manifest
    found: dict[str, tuple[Path, Check]] = {
        "extent list": (lists, lambda: ObjectBlob.decode(lists.read_bytes(), "here", blob)),
        "manifest": (manifests, lambda: read_manifest(manifests.read_bytes(), manifest)),
    }
    for replica in (await node.node.locate(blob)).live():
        tier, file = node.node.tiers.get(replica.tier), replica.extents[0].file

        def check(tier=tier, file=file, encoding=replica.encoding) -> None:
            with open_plain(tier, file, encoding, blob) as reader:
                verify_file(reader, blob)

        found[replica.tier] = (await node.node.path_of(blob, replica.tier), check)
    return found


def read_manifest(data: bytes, manifest: str) -> None:
    """As a recovery reads it."""
    parse(data, "here", manifest)
    read_stamp(data)


async def sweep(folder: Path, bits: Callable[[int], list[int]]) -> None:
    async with open_stored(folder) as (node, manifest, blob):
        for name, (path, check) in (await stored_files(node, manifest, blob)).items():
            check()
            for offset in range(path.stat().st_size):
                for bit in bits(offset):
                    flip(path, offset, bit)
                    try:
                        check()
                    except (IntegrityError, InvalidRequest):
                        pass
                    else:
                        pytest.fail(f"{name}: bit {bit} of byte {offset} was not noticed")
                    flip(path, offset, bit)
            check()


async def test_a_flip_of_every_byte_is_noticed(tmp_path: Path) -> None:
    await sweep(tmp_path, lambda offset: [offset % 8])


@pytest.mark.slow
async def test_a_flip_of_every_bit_is_noticed(tmp_path: Path) -> None:
    await sweep(tmp_path, lambda offset: list(range(8)))


@pytest.mark.parametrize("name", ["ssd", "hdd", "object", "extent list", "manifest"])
async def test_a_flip_anywhere_is_repaired(name: str, tmp_path: Path) -> None:
    await mend(tmp_path, name, NUM_MENDED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["ssd", "hdd", "object", "extent list", "manifest"])
async def test_every_flip_is_repaired(name: str, tmp_path: Path) -> None:
    await mend(tmp_path, name, 10**6)


async def mend(folder: Path, name: str, number: int) -> None:
    """Flip *number* bytes of a stored file one after the other, each time until all is good."""
    async with open_stored(folder) as (node, manifest, blob):
        path, check = (await stored_files(node, manifest, blob))[name]
        size = path.stat().st_size
        for offset in range(0, size, max(1, size // number)):
            flip(path, offset, offset % 8)
            await repair(node, name)
            path, check = (await stored_files(node, manifest, blob))[name]
            check()
            assert await node.states(blob) == [(tier, "live") for tier in ("hdd", "object", "ssd")]
        assert (await node.integrity.fsck(repair=False)).found == []


async def repair(node: IntegrityNode, name: str) -> None:
    """Find one damaged file, as the scrub or fsck does, and have it repaired."""
    if name == "manifest":
        (finding,) = await node.integrity._fsck.run(repair=True)
        assert finding.kind == "bad manifest"
    else:
        report = await node.scrub(name if name in ("ssd", "hdd") else "object")
        assert (report.num_damaged, report.num_lists) == (
            (0, 1) if name == "extent list" else (1, 0)
        )
    assert not any(error for _, error in await node.run_queued(REPAIR, FLUSH))


async def test_a_flip_of_the_only_copy_is_refused_wherever_it_is(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        blob = (await node.node.add_blob(PIECES, "ssd")).blob_id
        path = await node.node.path_of(blob, "ssd")
        good = path.read_bytes()
        for offset in range(0, len(good), len(good) // NUM_MENDED):
            flip(path, offset)
            assert not await node.node.opener.report(blob, "ssd", 0, "a client's word")
            (refusal,) = await node.node.opener.open("client", [blob])
            assert isinstance(refusal, ForebayError)
            assert path.exists()
            flip(path, offset)
            # The file is good again: what says so is a daemon that has not seen it bad.
            node.node.opener.quarantine._bad.clear()
            assert await node.node.opener.return_good(blob)
        assert path.read_bytes() == good
