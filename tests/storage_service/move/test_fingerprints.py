"""Fingerprints of generations: computed behind the commit, kept, reused, resumed, deleted."""

from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay_server.catalog.queries_fingerprints import ranks_done
from forebay_server.catalog.queries_jobs import FINGERPRINT, claim
from forebay_server.model.fingerprint import extent_key, fingerprint
from forebay_server.move.budget import Budget
from forebay_server.move.fingerprints import Fingerprints, extents_of, look
from forebay_server.move.jobs import Progress
from forebay_server.serve.open import Opener
from forebay_server.testing.checkpoints import CheckpointNode, open_checkpoints
from forebay_server.tier.store import TierReader
from forebay_wire.errors import DaemonUnavailable, IntegrityError, InvalidRequest, NotFound
from forebay_wire.fingerprint import Fingerprint, decode_fingerprints
from forebay_wire.ids import GenerationId
from forebay_wire.manifest import PackRef
from forebay_wire.segments import SegmentTable, encode_trailer, even_cuts, table_of

CUT = 64 << 10


class InMemory(TierReader):
    """A blob file's bytes; counts those of its data that are read."""

    def __init__(self, data: bytes) -> None:
        cuts = even_cuts(len(data), CUT)
        ends = np.cumsum([0, *cuts]).tolist()
        self.table = table_of(data[start:stop] for start, stop in pairwise(ends))
        self.content = bytearray(
            data + self.table.encoded + encode_trailer(len(data), len(self.table.encoded))
        )
        self.size_bytes = len(self.content)
        self.where = "memory"
        self.data_bytes = 0
        self._data_end = len(data)

    def read_into(self, offset: int, buffer: Any) -> None:
        view = memoryview(buffer)
        view[:] = self.content[offset : offset + len(view)]
        if offset < self._data_end:
            self.data_bytes += len(view)

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        pass


def entry(name: str, offset: int, num_bytes: int, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": [num_bytes // 4], "at": [offset, num_bytes]}


def pack_of(data: bytes, entries: list[dict[str, Any]]) -> PackRef:
    return PackRef(0, "0" * 64, len(data), {"tensors": entries})


ENTRIES = [
    entry("straddling", CUT - 64, 2 * CUT),
    entry("small", 0, 128),
    entry("tied", CUT - 64, 2 * CUT),
    entry("other", 0, 128, "int32"),
    entry("within", 256, 64, "bfloat16"),
    entry("nothing", 512, 0),
    entry("last", 4 * CUT, 5 * CUT),
]


def floats(num_bytes: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).standard_normal(num_bytes // 4).astype("<f4").tobytes()


def of(reader: InMemory, data: bytes, one: dict[str, Any]) -> Fingerprint:
    offset, num_bytes = one["at"]
    key = extent_key(one["dtype"], offset, num_bytes, reader.table)
    return fingerprint(key, one["dtype"], data[offset : offset + num_bytes])


def test_parts_anywhere_in_a_pack() -> None:
    data = floats(10 * CUT)
    reader, pack = InMemory(data), pack_of(data, ENTRIES)
    extents = extents_of(pack)
    found = look(reader, reader.table.blob_id, extents, {})
    for one, extent in zip(ENTRIES, extents, strict=True):
        expected = of(reader, data, one)
        assert (found[extent].key, found[extent].digest) == (expected.key, expected.digest)
        assert found[extent].norm == pytest.approx(expected.norm, rel=1e-12)
        assert found[extent].num_values == expected.num_values
    assert reader.data_bytes == 8 * CUT  # each needed segment once; two hold nothing


def test_what_is_known_is_not_read() -> None:
    data = floats(10 * CUT)
    changed = bytearray(data)
    changed[8 * CUT] ^= 1
    first, second = InMemory(data), InMemory(bytes(changed))
    extents = extents_of(pack_of(data, ENTRIES))
    found = look(first, first.table.blob_id, extents, {})
    known = {one.key: one for one in found.values()}
    again = look(second, second.table.blob_id, extents, known)
    assert second.data_bytes == 5 * CUT  # the last one alone
    last = extents[-1]
    assert again[last].digest != found[last].digest
    for extent in extents[:-1]:
        assert again[extent] is not None
        assert again[extent].digest == found[extent].digest


def test_damage_is_found() -> None:
    data = floats(10 * CUT)
    reader = InMemory(data)
    reader.content[5 * CUT] ^= 1
    with pytest.raises(IntegrityError):
        look(reader, reader.table.blob_id, extents_of(pack_of(data, ENTRIES)), {})


@pytest.mark.parametrize(
    "wrong",
    [{"at": [0]}, {"at": ["x", 4]}, {"dtype": "float32", "at": [0, 6]}, {"at": None}, {}],
)
def test_descriptions_that_say_nothing_are_refused(wrong: dict[str, Any]) -> None:
    one = {key: value for key, value in entry("x", 0, 8).items() if key in ("name", "dtype")}
    with pytest.raises(InvalidRequest):
        extents_of(pack_of(b"x" * 100, [{**one, **wrong}]))


def test_ranges_outside_of_the_pack_are_refused() -> None:
    reader = InMemory(floats(CUT))
    with pytest.raises(InvalidRequest):
        look(reader, reader.table.blob_id, extents_of(pack_of(b"", [entry("x", 0, 2 * CUT)])), {})


# ----------------------------------------------------------------------------------------- a node


@pytest.fixture
async def node(tmp_path: Path, catalog_url: str) -> AsyncIterator[CheckpointNode]:
    async with open_checkpoints(
        tmp_path, with_object=False, run_jobs=False, catalog_url=catalog_url
    ) as opened:
        yield opened


class Reading:
    """Reads from the node's tiers; counts, and fails where a test says so."""

    def __init__(self, node: CheckpointNode) -> None:
        self._bringer = Opener(node.storage.tiers, node.storage.catalog).bringer
        self.blobs: list[str] = []
        self.fails_at = 0

    async def read(self, blob: str, use: Callable[[str, TierReader], Any]) -> Any:
        self.blobs.append(blob)
        if len(self.blobs) == self.fails_at:
            raise DaemonUnavailable("the daemon is stopping")
        return await self._bringer.read(blob, use)


async def save(node: CheckpointNode, step: int, packs: list[bytes]) -> GenerationId:
    generation = GenerationId("run", 1, step)
    for rank, data in enumerate(packs):
        grant = await node.plan(generation, len(data), rank=rank, num_ranks=len(packs))
        await node.seal(grant, data, {"tensors": [entry("x", 0, CUT), entry("y", CUT, CUT)]})
    await node.wait(generation)
    return generation


async def work(node: CheckpointNode, handler: Fingerprints) -> None:
    """One try of the job that is due."""
    job = await node.storage.catalog.write(lambda c: claim(c, "me", 30.0, [FINGERPRINT]))
    assert job is not None
    await handler(Progress(job, "me"))


async def kept(
    node: CheckpointNode, handler: Fingerprints, generation: GenerationId, rank: int
) -> list[Fingerprint]:
    data, limit = b"", 500  # in pieces, as by the call
    while True:
        found = await handler.read(generation, rank, len(data), limit)
        data += found.chunk
        if len(data) == found.num_bytes:
            return decode_fingerprints(data, "test")


async def test_they_are_kept_by_rank_and_go_with_the_generation(node: CheckpointNode) -> None:
    await node.begin(num_ranks=2)
    packs = [floats(2 * CUT, seed) for seed in (1, 2)]
    generation = await save(node, 1, packs)
    handler = Fingerprints(node.storage.catalog, Reading(node), Budget({}), bytes_per_second=1e12)
    assert (await handler.read(generation, 0, 0, 100)).num_packs == 0
    await work(node, handler)
    for rank, data in enumerate(packs):
        found = await kept(node, handler, generation, rank)
        values = np.frombuffer(data, "<f4").astype(np.float64)
        assert [one.norm for one in found] == pytest.approx(
            [np.linalg.norm(values[: CUT // 4]), np.linalg.norm(values[CUT // 4 :])]
        )
    manifest = (await handler.read(generation, 0, 0, 100)).manifest
    await save(node, 2, packs)
    await node.checkpoints.delete_generation_now(generation)
    with pytest.raises(NotFound):
        await handler.read(generation, 0, 0, 100)
    await node.storage.catalog.write(lambda c: delete_manifest_row(c, manifest))
    assert await node.storage.catalog.read(lambda c: ranks_done(c, manifest)) == set()


def delete_manifest_row(connection: Any, manifest: str) -> None:
    from sqlalchemy import text

    connection.execute(text("DELETE FROM manifests WHERE manifest = :one"), {"one": manifest})


async def test_an_interrupted_job_goes_on_behind_the_last_pack(node: CheckpointNode) -> None:
    await node.begin(num_ranks=3)
    generation = await save(node, 1, [floats(2 * CUT, seed) for seed in (1, 2, 3)])
    reading = Reading(node)
    handler = Fingerprints(node.storage.catalog, reading, Budget({}), bytes_per_second=1e12)
    reading.fails_at = 3
    job = await node.storage.catalog.write(lambda c: claim(c, "me", 30.0, [FINGERPRINT]))
    assert job is not None
    with pytest.raises(DaemonUnavailable):
        await handler(Progress(job, "me"))
    assert (await handler.read(generation, 0, 0, 1)).num_packs == 2
    await handler(Progress(job, "me"))
    assert (await handler.read(generation, 0, 0, 1)).num_packs == 3
    assert len(set(reading.blobs)) == 3
    assert len(reading.blobs) == 4


async def test_without_a_rate_only_what_is_asked_for(node: CheckpointNode) -> None:
    await node.begin()
    generation = await save(node, 1, [floats(2 * CUT)])
    reading = Reading(node)
    handler = Fingerprints(node.storage.catalog, reading, Budget({}))
    await handler.ask(generation)
    await handler.ask(generation)
    job = await node.storage.catalog.write(lambda c: claim(c, "me", 30.0, [FINGERPRINT]))
    assert job is not None
    assert job.priority == 1
    await handler(Progress(job, "me"))
    assert (await handler.read(generation, 0, 0, 1)).num_packs == 1
    other = await save(node, 2, [floats(2 * CUT, 5)])
    await work(node, handler)
    assert (await handler.read(other, 0, 0, 1)).num_packs == 0
    assert len(reading.blobs) == 1
    with pytest.raises(NotFound):
        await handler.ask(GenerationId("run", 1, 9))


async def test_it_steps_back_while_saves_land(node: CheckpointNode) -> None:
    await node.begin()
    generation = await save(node, 1, [floats(2 * CUT)])
    looks = 0

    def is_landing() -> bool:
        nonlocal looks
        looks += 1
        return looks < 5

    options: dict[str, Any] = {"bytes_per_second": 1e12, "is_landing": is_landing}
    handler = Fingerprints(node.storage.catalog, Reading(node), Budget({}), **options)
    await work(node, handler)
    assert looks == 5
    assert (await handler.read(generation, 0, 0, 1)).num_packs == 1


def test_tables_are_those_of_the_blob() -> None:
    reader = InMemory(floats(3 * CUT))
    assert isinstance(reader.table, SegmentTable)
    with pytest.raises(IntegrityError):
        look(reader, "1" * 64, [], {})
