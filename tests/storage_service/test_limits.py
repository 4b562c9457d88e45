"""Each limit at its edge, where the daemon enforces it: the most passes, one more is refused."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from forebay_server.catalog import queries_checkpoints
from forebay_server.model.lineage import Point
from forebay_server.publish.seal import MAX_RANK_JSON_BYTES
from forebay_server.publish.session import Piece
from forebay_server.serve.holds import Hold, Holds
from forebay_server.testing.checkpoints import RUN, CheckpointNode, open_checkpoints
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.rpc import RpcClient, rpc_client
from forebay_server.testing.storage import UID
from forebay_server.tier.memory import SlotPool
from forebay_wire import limits
from forebay_wire.errors import (
    InvalidRequest,
    LimitExceeded,
    NotFound,
    ResourceExhausted,
)
from forebay_wire.ids import GenerationId, new_random_name
from forebay_wire.limits import MIB
from forebay_wire.manifest import GenerationManifest, PackRef
from forebay_wire.v1 import blobs_pb2, datasets_pb2


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[CheckpointNode]:
    async with open_checkpoints(tmp_path, with_object=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def rpc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RpcClient]:
    data = tmp_path_factory.mktemp("limits") / "data"
    with DaemonProcess(data) as daemon, rpc_client(daemon) as client:
        yield client


def test_open_blobs_and_bytes_of_a_client() -> None:
    holds = Holds()
    holds.add("c", [Hold("a", "ssd", 1)] * limits.MAX_OPEN_BLOBS_PER_CLIENT)
    with pytest.raises(LimitExceeded, match="blobs open"):
        holds.add("c", [Hold("a", "ssd", 1)])
    holds.add("d", [Hold("a", "ssd", limits.MAX_OPEN_BYTES_PER_CLIENT)])
    with pytest.raises(LimitExceeded, match="bytes open"):
        holds.add("d", [Hold("a", "ssd", 1)])


def test_slot_bytes() -> None:
    pool = SlotPool(MIB, 0, lambda: 1 << 50)
    with pytest.raises(ResourceExhausted):  # allowed, but there is no room here
        pool.acquire("o", limits.MAX_UPLOAD_SLOT_BYTES, limits.MAX_UPLOAD_SLOT_BYTES)
    with pytest.raises(LimitExceeded, match="slot bytes"):
        pool.acquire("o", limits.MAX_UPLOAD_SLOT_BYTES + 1, MIB)
    pool.close()


async def test_blob_bytes(node: CheckpointNode) -> None:
    uploads = node.storage.uploads
    with pytest.raises(ResourceExhausted):  # allowed, but there is no room here
        await uploads.begin(UID, "o", limits.MAX_BLOB_BYTES, MIB)
    with pytest.raises(LimitExceeded, match="bytes of the blob"):
        await uploads.begin(UID, "o", limits.MAX_BLOB_BYTES + 1, MIB)


async def test_segments_of_an_append(node: CheckpointNode) -> None:
    uploads = node.storage.uploads
    grant = await uploads.begin(UID, "o", MIB, MIB)
    session = uploads._sessions[grant.session]
    most = limits.MAX_SEGMENTS_PER_APPEND
    session.check_piece(Piece(0, most, (1,) * most))
    with pytest.raises(LimitExceeded, match="segments of a piece"):
        session.check_piece(Piece(0, most + 1, (1,) * (most + 1)))


async def test_ranks(node: CheckpointNode) -> None:
    await node.begin(num_ranks=limits.MAX_RANKS)
    last = limits.MAX_RANKS - 1
    generation = GenerationId(RUN, 1, 1)
    await node.plan(generation, 1, rank=last, num_ranks=limits.MAX_RANKS)
    with pytest.raises(LimitExceeded, match="ranks"):
        await node.begin(num_ranks=limits.MAX_RANKS + 1)


async def test_descriptions_of_a_generation(
    node: CheckpointNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    await node.begin(num_ranks=2)
    text = {"x": "é" * 10_000}  # as UTF-8, whatever way the rank wrote it
    size = len('{"x":""}') + 2 * 10_000
    for step, is_enough in ((1, True), (2, False)):
        limit = 2 * size - (not is_enough)
        monkeypatch.setattr(queries_checkpoints, "MAX_GENERATION_DESCRIPTION_BYTES", limit)
        generation = GenerationId(RUN, 1, step)
        first, second = [
            await node.plan(generation, 1, rank=rank, num_ranks=2) for rank in range(2)
        ]
        await node.seal(first, b"x", text)
        if is_enough:
            assert await node.seal(second, b"x", text)
            continue
        with pytest.raises(LimitExceeded, match="bytes of the descriptions of generation run@1/2"):
            await node.seal(second, b"x", text)
        assert await node.seal(second, b"x", {"x": ""}), "the pack stays open"


def test_what_all_ranks_may_say_fits_a_manifest() -> None:
    each, rest = divmod(limits.MAX_GENERATION_DESCRIPTION_BYTES, limits.MAX_RANKS)
    frame = len('{"x":""}')
    packs = tuple(
        PackRef(rank, "ab" * 32, 1 << 62, {"x": "a" * (each - frame + (rest if rank == 0 else 0))})
        for rank in range(limits.MAX_RANKS)
    )
    long = {"x": "a" * MAX_RANK_JSON_BYTES}
    name = "n" * limits.MAX_NAME_BYTES
    GenerationManifest(
        name, 1, 1, (1, 1), limits.MAX_RANKS, {"a" * MAX_RANK_JSON_BYTES: 1.0}, long, packs, 0.0
    ).encode()


async def test_rows_and_attempts_of_a_page(node: CheckpointNode) -> None:
    number = limits.MAX_PAGE_ROWS + 2
    await node.begin()
    first = await node.save(0, [b"x"])
    await node.wait(first)
    for _ in range(number - 1):
        await node.begin()
    generations = node.checkpoints.generations
    attempts, page, after = await generations.list_generations(RUN, "", 10 * number)
    assert (len(attempts), page) == (limits.MAX_PAGE_ROWS + 1, [])
    rest, page, end = await generations.list_generations(RUN, after, 0)
    assert [info.id for info in page] == [first]
    assert end == ""
    found = {one.attempt for one in [*attempts, *rest]}
    assert found == set(range(1, number + 1))


async def test_bytes_of_a_page(node: CheckpointNode) -> None:
    await node.begin()
    large = '{"%s": 1}' % ("m" * (limits.PAGE_BYTES // 2))
    for step in range(5):
        await node.wait(await node.save(step, [b"x"], metrics_json=large))
    pages: list[list[int]] = []
    after = ""
    while after or not pages:
        _, page, after = await node.checkpoints.generations.list_generations(RUN, after, 0)
        pages.append([info.id.step for info in page])
    assert pages == [[4, 3], [2, 1], [0]]


async def test_pages_begin_where_they_are_told(node: CheckpointNode) -> None:
    for parent in (None, (1, 0), (2, 0)):
        attempt = await node.begin(parent)
        await node.wait(await node.save(0, [b"x"], attempt=attempt.attempt))
    generations = node.checkpoints.generations
    attempts, page, after = await generations.list_generations(RUN, "", 2)
    assert [one.attempt for one in attempts] == [3, 2]
    assert [info.id for info in page] == [GenerationId(RUN, 3, 0), GenerationId(RUN, 2, 0)]
    attempts, page, after = await generations.list_generations(RUN, after, 2)
    assert [Point(info.id.attempt, info.id.step) for info in page] == [Point(1, 0)]
    assert attempts[-1].attempt == 1
    assert after == ""


def shards(number: int) -> list[datasets_pb2.ShardCommit]:
    return [
        datasets_pb2.ShardCommit(
            session=new_random_name(),
            blob=f"{index:064x}",
            num_bytes=64 * MIB,
            num_rows=32_000,
            batch_rows=[1000] * 32,
        )
        for index in range(number)
    ]


def test_a_commit_of_the_most_shards_fits_its_message(rpc: RpcClient) -> None:
    request = datasets_pb2.CommitVersionRequest(
        dataset="d", schema=b"s", shards=shards(30_000), request=new_random_name()
    )
    assert request.ByteSize() > limits.MAX_MESSAGE_BYTES
    with pytest.raises(NotFound, match="session"):  # it was read: these sessions are made up
        rpc.call(rpc.datasets.CommitVersion, request)
    each = shards(1)[0].ByteSize() + 8
    assert each * limits.MAX_SHARDS_PER_VERSION < limits.MAX_COMMIT_BYTES - 2 * MIB


def test_bytes_of_any_other_message(rpc: RpcClient) -> None:
    request = blobs_pb2.BeginUploadRequest(owner="o" * limits.MAX_MESSAGE_BYTES)
    with pytest.raises(LimitExceeded, match="bytes of BeginUpload"):
        rpc.call(rpc.blobs.BeginUpload, request)
    request.owner = "o" * (limits.MAX_MESSAGE_BYTES - 5)
    assert request.ByteSize() == limits.MAX_MESSAGE_BYTES
    with pytest.raises(InvalidRequest, match="owner"):  # it was read, and refused for its length
        rpc.call(rpc.blobs.BeginUpload, request)
