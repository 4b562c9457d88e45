"""Upload sessions through real tiers in a folder."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, select

from forebay_server.catalog import queries_blobs, queries_uploads
from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.publish.lease import LandedBlob
from forebay_server.publish.reconcile import reconcile
from forebay_server.publish.session import Piece
from forebay_server.testing.storage import UID, Storage, open_storage
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.memory import SlotPool
from forebay_server.tier.publication import PublicationWriter
from forebay_server.tier.registry import Tiers
from forebay_server.tier.verify import read_table, verify_file
from forebay_wire.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    StorageError,
)
from forebay_wire.limits import MIB
from forebay_wire.segments import SegmentTable, even_cuts, table_of


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Storage]:
    async with open_storage(tmp_path) as opened:
        yield opened


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - leases run by a clock
            await asyncio.sleep(0.02)


async def test_a_sealed_blob_is_on_disk_with_its_table(node: Storage) -> None:
    data = os.urandom(10 * MIB + 123)
    landed = await node.upload(data)
    table = table_of(data[i : i + MIB] for i in range(0, len(data), MIB))
    assert landed.blob == table.blob_id
    assert (landed.num_bytes, landed.num_segments) == (len(data), table.num_segments)
    location = (await node.catalog.locate([landed.blob]))[landed.blob]
    extent = location.replicas[0].extents[0]
    with node.tiers.get("ssd").read(extent.file) as reader:
        assert verify_file(reader, landed.blob).blob_id == landed.blob
        stored = bytearray(len(data))
        reader.read_into(0, stored)
    assert bytes(stored) == data


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4 * MIB, 4 * MIB + 1, 13 * MIB])
async def test_every_size_lands(node: Storage, num_bytes: int) -> None:
    data = os.urandom(num_bytes)
    landed = await node.upload(data, cuts=even_cuts(num_bytes))
    location = (await node.catalog.locate([landed.blob]))[landed.blob]
    with node.tiers.get("ssd").read(location.replicas[0].extents[0].file) as reader:
        table = read_table(reader, landed.blob)
        assert isinstance(table, SegmentTable)
        assert table.total_bytes == num_bytes
        verify_file(reader, landed.blob)


async def test_pieces_appended_in_order_make_the_same_blob(node: Storage) -> None:
    data = os.urandom(9 * MIB)
    whole = await node.upload(data)
    grant = await node.uploads.begin(UID, "dataset d", len(data), 4 * MIB)
    slot = node.uploads.slot(grant.session, UID)
    for sequence, start_at in enumerate(range(0, 8 * MIB, 4 * MIB)):
        slot.view[: 4 * MIB] = data[start_at : start_at + 4 * MIB]
        cuts = even_cuts(4 * MIB, MIB)
        assert (
            await node.uploads.append(grant.session, UID, Piece(sequence, 4 * MIB, tuple(cuts)))
            == start_at + 4 * MIB
        )
        slot.view[: 4 * MIB] = bytes(4 * MIB)  # may be overwritten at once
    slot.view[:MIB] = data[8 * MIB :]
    landed = await node.uploads.seal(grant.session, UID, Piece(2, MIB, (MIB,)))
    assert landed.blob == whole.blob


async def test_a_slot_that_lands_while_it_is_filled_makes_the_same_blob(node: Storage) -> None:
    data = os.urandom(9 * MIB)
    whole = await node.upload(data)
    grant = await node.uploads.begin(UID, "dataset d", len(data), len(data))
    slot = node.uploads.slot(grant.session, UID)
    for sequence, first in enumerate((0, 4 * MIB)):
        slot.view[first : first + 4 * MIB] = data[first : first + 4 * MIB]
        piece = Piece(sequence, 4 * MIB, (MIB,) * 4, slot_offset=first)
        appended, _ = await asyncio.gather(
            node.uploads.append(grant.session, UID, piece),
            node.uploads.append(grant.session, UID, piece),  # asked again meanwhile
        )
        assert appended == first + 4 * MIB
    slot.view[8 * MIB :] = data[8 * MIB :]
    with pytest.raises(InvalidRequest, match="bytes of a slot"):
        await node.uploads.append(grant.session, UID, Piece(2, MIB, (MIB,), 8 * MIB + 1))
    landed = await node.uploads.seal(grant.session, UID, Piece(2, MIB, (MIB,), 8 * MIB))
    assert landed.blob == whole.blob
    assert landed.num_segments == whole.num_segments


async def test_a_repeated_piece_is_answered_and_not_applied(node: Storage) -> None:
    grant = await node.uploads.begin(UID, "dataset d", 30, MIB)
    node.uploads.slot(grant.session, UID).view[:3] = b"abc"
    assert await node.uploads.append(grant.session, UID, Piece(0, 3, (3,))) == 3
    assert await node.uploads.append(grant.session, UID, Piece(0, 3, (3,))) == 3
    sealed = await node.uploads.seal(grant.session, UID, Piece(1, 3, (3,)))
    assert sealed.num_bytes == 6
    assert await node.uploads.seal(grant.session, UID, Piece(1, 3, (3,))) == sealed


async def test_a_piece_out_of_order_is_refused_and_harms_nothing(node: Storage) -> None:
    grant = await node.uploads.begin(UID, "dataset d", 30, MIB)
    with pytest.raises(InvalidRequest, match="expects piece 0, got 1"):
        await node.uploads.append(grant.session, UID, Piece(1, 3, (3,)))
    with pytest.raises(InvalidRequest, match="cuts add up to 2"):
        await node.uploads.append(grant.session, UID, Piece(0, 3, (2,)))
    with pytest.raises(InvalidRequest, match="bytes of a slot"):
        await node.uploads.append(grant.session, UID, Piece(0, 2 * MIB, (MIB, MIB)))
    assert await node.uploads.append(grant.session, UID, Piece(0, 3, (3,))) == 3


async def test_equal_content_is_stored_once(node: Storage) -> None:
    data = os.urandom(MIB)
    first, second = await node.upload(data), await node.upload(data)
    assert first.blob == second.blob
    assert len(node.files()) == 1
    location = (await node.catalog.locate([first.blob]))[first.blob]
    assert len(location.replicas) == 1
    await node.uploads.abort(first.session, UID)
    assert len(node.files()) == 1  # the second session still holds it
    await node.uploads.abort(second.session, UID)
    assert node.files() == []


async def test_another_user_cannot_touch_a_session(node: Storage) -> None:
    grant = await node.uploads.begin(UID, "dataset d", 3, 3)
    with pytest.raises(PermissionDenied):
        node.uploads.slot(grant.session, UID + 1)
    with pytest.raises(PermissionDenied):
        await node.uploads.seal(grant.session, UID + 1, Piece(0, 3, (3,)))
    with pytest.raises(PermissionDenied):
        await node.uploads.abort(grant.session, UID + 1)


async def test_abort_leaves_nothing_and_is_idempotent(node: Storage) -> None:
    grant = await node.uploads.begin(UID, "dataset d", MIB, MIB)
    assert node.tiers.get("ssd").space().reserved_bytes > MIB
    await node.uploads.abort(grant.session, UID)
    await node.uploads.abort(grant.session, UID)
    assert node.tiers.get("ssd").space().reserved_bytes == 0
    assert node.tiers.get("ssd").space().used_bytes == 0
    with pytest.raises(NotFound, match="has ended"):
        await node.uploads.append(grant.session, UID, Piece(0, 1, (1,)))


async def test_a_session_without_sign_of_life_expires(tmp_path: Path) -> None:
    async with open_storage(tmp_path, lease_seconds=0.4) as node:
        landed = await node.upload(os.urandom(MIB))
        grant = await node.uploads.begin(UID, "dataset other", MIB, MIB)

        async def gone() -> bool:
            reserved = node.tiers.get("ssd").space().reserved_bytes
            return node.uploads.num_sessions == 0 and not node.files() and reserved == 0

        await until(gone)
        with pytest.raises(NotFound):
            await node.uploads.renew(grant.session, UID)
        assert await node.catalog.locate([landed.blob]) == {}


async def test_the_slot_of_an_expired_session_is_never_used_again(tmp_path: Path) -> None:
    async with open_storage(tmp_path, lease_seconds=0.4) as node:
        grant = await node.uploads.begin(UID, "dataset d", MIB, MIB)
        slot = node.uploads.slot(grant.session, UID)

        async def gone() -> bool:
            return node.tiers.slots.space().used_bytes == 0

        await until(gone)
        with pytest.raises(NotFound, match="closed"):
            slot.duplicate()


@pytest.mark.parametrize("who", ["client", "daemon"])
async def test_only_a_clients_own_abort_keeps_its_slot(node: Storage, who: str) -> None:
    grant = await node.uploads.begin(UID, "dataset d", MIB, MIB)
    slot = node.uploads.slot(grant.session, UID)
    if who == "client":
        await node.uploads.abort(grant.session, UID)
    else:
        await node.uploads.end([grant.session])
    again = await node.uploads.begin(UID, "dataset d", MIB, MIB)
    assert (node.uploads.slot(again.session, UID) is slot) == (who == "client")


async def test_renewing_one_session_keeps_what_its_owner_landed(tmp_path: Path) -> None:
    async with open_storage(tmp_path, lease_seconds=0.6) as node:
        landed = await node.upload(os.urandom(MIB))
        grant = await node.uploads.begin(UID, "dataset d", MIB, MIB)
        for _ in range(8):
            await asyncio.sleep(0.2)
            await node.uploads.renew(grant.session, UID)
        assert node.files() != []
        assert landed.blob in await node.catalog.locate([landed.blob])


async def test_renewing_again_at_once_writes_one_row(node: Storage) -> None:
    landed = await node.upload(os.urandom(MIB))
    grant = await node.uploads.begin(UID, "dataset d", MIB, MIB)

    def expiry(connection: Connection) -> float:
        table = queries_uploads.uploads
        found = connection.scalar(select(table.c.expires).where(table.c.session == landed.session))
        assert found is not None
        return float(found)

    def is_late(connection: Connection) -> None:
        connection.execute(queries_uploads.uploads.update().values(expires=expiry(connection) - 30))

    before = await node.catalog.read(expiry)
    await node.uploads.renew(grant.session, UID)
    assert await node.catalog.read(expiry) == before
    await node.catalog.write(is_late)  # half of the lease has passed
    await node.uploads.renew(grant.session, UID)
    assert await node.catalog.read(expiry) >= before


async def test_a_full_first_tier_lets_the_second_take_it(tmp_path: Path) -> None:
    async with open_storage(tmp_path, limit_bytes=3 * MIB) as node:
        await node.upload(os.urandom(2 * MIB))
        second = await node.upload(os.urandom(2 * MIB))
        location = (await node.catalog.locate([second.blob]))[second.blob]
        assert location.replicas[0].tier == "hdd"
        with pytest.raises(ResourceExhausted, match="tier ssd"):
            await node.uploads.begin(UID, "dataset d", 2 * MIB, MIB)


async def test_memory_that_another_has_on_loan_is_waited_for(tmp_path: Path) -> None:
    async with open_storage(tmp_path, ram_bytes=6 * MIB) as node:
        first = await node.uploads.begin(UID, "dataset a", 5 * MIB, 5 * MIB)
        second = asyncio.create_task(node.uploads.begin(UID, "dataset b", 5 * MIB, 5 * MIB))
        done, _ = await asyncio.wait([second], timeout=0.3)
        assert not done
        await node.uploads.seal(first.session, UID, Piece(0, 10, (10,)))
        async with asyncio.timeout(10):
            assert (await second).slot_bytes == 5 * MIB


async def test_memory_that_does_not_come_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay_server.publish.slots.SLOT_WAIT_SECONDS", 0.2)
    async with open_storage(tmp_path, ram_bytes=6 * MIB) as node:
        await node.uploads.begin(UID, "dataset a", 5 * MIB, 5 * MIB)
        with pytest.raises(ResourceExhausted, match=r"tier ram .* raise ram-bytes"):
            await node.uploads.begin(UID, "dataset b", 5 * MIB, 5 * MIB)


# ------------------------------------------------------------------------------ in the background


async def test_a_background_seal_answers_before_it_lands(node: Storage) -> None:
    data = os.urandom(5 * MIB)
    bound: list[str] = []
    grant = await node.uploads.begin(
        UID, "run r", len(data), len(data), bind=lambda connection, session: bound.append(session)
    )
    assert bound == [grant.session]
    node.uploads.slot(grant.session, UID).view[: len(data)] = data

    def landed(connection: Connection, blob: LandedBlob) -> LandedBlob:
        connection.execute(  # something has to name the blob, or it is garbage
            queries_uploads.uploads.insert().values(
                session="f" * 32,
                owner="x",
                uid=1,
                tier="ssd",
                file="e" * 32,
                blob=blob.blob,
                state="landed",
                expires=4e9,
            )
        )
        return blob

    async def seal():
        return await node.uploads.seal_in_background(
            grant.session,
            UID,
            Piece(0, len(data), tuple(even_cuts(len(data)))),
            sealed=lambda connection: "sealed",
            landed=landed,
        )

    answer, task = await seal()
    assert answer == "sealed"
    assert (await seal())[1] is task
    with pytest.raises(Conflict):
        node.uploads.slot(grant.session, UID)
    with pytest.raises(Conflict):
        await node.uploads.abort(grant.session, UID)
    blob = await task
    assert blob.blob in await node.catalog.locate([blob.blob])
    assert node.uploads.num_sessions == 0
    assert (
        await node.catalog.read(
            lambda connection: queries_uploads.live_sessions(connection, [grant.session])
        )
        == set()
    )


async def test_a_refused_landing_leaves_nothing(node: Storage) -> None:
    grant = await node.uploads.begin(UID, "run r", 3, 3)

    def landed(connection: Connection, blob: LandedBlob) -> None:
        raise Conflict("the generation was aborted")

    _, task = await node.uploads.seal_in_background(
        grant.session, UID, Piece(0, 3, (3,)), sealed=lambda connection: None, landed=landed
    )
    with pytest.raises(Conflict, match="was aborted"):
        await task
    assert node.files() == []
    assert node.uploads.num_sessions == 0
    assert await node.catalog.read(lambda c: queries_blobs.orphan_blobs(c, 10)) == []


async def test_a_refused_bind_leaves_no_session(node: Storage) -> None:
    def bind(connection: Connection, session: str) -> None:
        raise Conflict("no")

    with pytest.raises(Conflict):
        await node.uploads.begin(UID, "run r", MIB, MIB, bind=bind)
    assert node.uploads.num_sessions == 0
    assert node.tiers.get("ssd").space().reserved_bytes == 0


class Gate:
    """Landings stop before their end, until they are let through one by one."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.passes = threading.Semaphore(0)

    async def wait_for_arrival(self) -> None:
        assert await asyncio.to_thread(self.arrived.acquire, timeout=10.0)


@pytest.fixture
def gate(node: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    publish = PublicationWriter.publish

    def publish_behind_the_gate(writer: PublicationWriter) -> None:
        gate.arrived.release()
        assert gate.passes.acquire(timeout=30.0)
        publish(writer)

    monkeypatch.setattr(PublicationWriter, "publish", publish_behind_the_gate)
    yield gate
    gate.passes.release(100)


async def seal_behind(node: Storage) -> asyncio.Task[None]:
    """Seal one byte in the background; its landing."""
    grant = await node.uploads.begin(UID, "run r", 1, 1)
    _, landing = await node.uploads.seal_in_background(
        grant.session,
        UID,
        Piece(0, 1, (1,)),
        sealed=lambda connection: None,
        landed=lambda connection, blob: None,
    )
    return landing


async def test_what_is_short_does_not_wait_for_landings(node: Storage, gate: Gate) -> None:
    landings = [await seal_behind(node) for _ in range(4)]
    for _ in landings:
        await gate.wait_for_arrival()
    async with asyncio.timeout(10.0):
        await node.uploads.begin(UID, "dataset d", 1, 1)
        tier = node.tiers.landing[0]
        await node.tiers.run(tier, tier.space)
    assert not any(landing.done() for landing in landings)


async def test_a_drain_waits_for_what_is_sealed_meanwhile(node: Storage, gate: Gate) -> None:
    first = await seal_behind(node)
    await gate.wait_for_arrival()
    draining = asyncio.create_task(node.uploads.drain(30.0))
    await asyncio.sleep(0)  # it has looked by now
    second = await seal_behind(node)
    gate.passes.release()
    await first
    for _ in range(10):
        await asyncio.sleep(0)
    assert not draining.done()
    gate.passes.release()
    assert await draining
    assert second.done()


async def test_a_drain_ends_with_its_time_and_tells(node: Storage, gate: Gate) -> None:
    await seal_behind(node)
    assert not await node.uploads.drain(0.05)
    assert node.uploads.num_landing == 1


# ------------------------------------------------------------------------------------- at a start


async def test_a_start_removes_what_no_row_names_and_keeps_what_one_does(tmp_path: Path) -> None:
    async with open_storage(tmp_path) as node:
        kept = await node.upload(os.urandom(MIB))

        def name_it(connection: Connection) -> None:
            connection.exec_driver_sql(
                "INSERT INTO manifests (manifest, kind, data, created) VALUES ('m', 1, x'00', 0)"
            )
            connection.exec_driver_sql(
                "INSERT INTO manifest_blobs (manifest, blob) VALUES ('m', ?)", (kept.blob,)
            )

        await node.catalog.write(name_it)
        uncommitted = await node.upload(os.urandom(MIB))
        node.tiers.get("ssd").put("ab" * 16, b"nobody's")
    async with open_storage(tmp_path) as node:
        location = await node.catalog.locate([kept.blob, uncommitted.blob])
        assert list(location) == [kept.blob]
        assert node.files() == [location[kept.blob].replicas[0].extents[0].file]


async def test_a_start_takes_cut_and_missing_files_out_of_service(tmp_path: Path) -> None:
    async with open_storage(tmp_path) as node:
        blobs = [(await node.upload(os.urandom(MIB))).blob for _ in range(2)]

        def name_them(connection: Connection) -> None:
            connection.exec_driver_sql(
                "INSERT INTO manifests (manifest, kind, data, created) VALUES ('m', 1, x'00', 0)"
            )
            for blob in blobs:
                connection.exec_driver_sql(
                    "INSERT INTO manifest_blobs (manifest, blob) VALUES ('m', ?)", (blob,)
                )

        await node.catalog.write(name_them)
        located = await node.catalog.locate(blobs)
        gone, cut = (
            tmp_path / "ssd" / "files" / file[:2] / file
            for file in (located[blob].replicas[0].extents[0].file for blob in blobs)
        )
    gone.unlink()
    os.truncate(cut, 1000)
    async with open_storage(tmp_path) as node:
        located = await node.catalog.locate(blobs)
        assert [location.live() for location in located.values()] == [(), ()]
        assert cut.exists()


async def test_a_start_refuses_a_volume_that_is_not_the_catalogs(tmp_path: Path) -> None:
    async with open_storage(tmp_path) as node:
        await node.upload(os.urandom(MIB))
    (tmp_path / "catalog.sqlite").unlink()
    catalog = Catalog.open(sqlite_url(tmp_path / "catalog.sqlite"))
    tiers = Tiers([DirectoryTier("ssd", "ssd", tmp_path / "ssd")], SlotPool(MIB, 0))
    await tiers.start()
    try:
        with pytest.raises(StorageError, match="does not know"):
            await reconcile(catalog, tiers)
        assert any((tmp_path / "ssd" / "files").rglob("*"))
    finally:
        await tiers.close()
        catalog.close()
