"""The catalog against the tiers, both ways: what is wrong is found, mended on demand, and nothing
that could be the last of something is deleted."""

import os
from pathlib import Path

from sqlalchemy import delete, insert

from forebay_server.catalog.queries_jobs import COLLECT, FLUSH, REPAIR, enqueue
from forebay_server.catalog.tables import (
    manifest_blobs,
    manifest_remote,
    manifests,
    pin_blobs,
    pins,
    replicas,
    selections,
    versions,
)
from forebay_server.move.fsck import Finding
from forebay_server.testing.integrity import IntegrityNode, flip, open_integrity
from forebay_wire.ids import new_random_name

PIECES = [os.urandom(5000), os.urandom(1000)]


async def check(node: IntegrityNode) -> list[Finding]:
    return (await node.integrity.fsck(repair=False)).found


async def mend(node: IntegrityNode) -> list[Finding]:
    """Repair, run what that queued, and look again."""
    await node.integrity._fsck.run(repair=True)
    await node.run_queued(COLLECT, FLUSH, REPAIR)
    return await check(node)


def old(path: Path) -> None:
    """Past every grace period."""
    os.utime(path, (1.0, 1.0))


def of_size(folder: Path, num_bytes: int) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if path.stat().st_size == num_bytes]


async def test_nothing_is_wrong_with_what_was_just_made(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        await node.add_dataset(PIECES, [b"x"], tiers=("ssd", "hdd"))
        assert await check(node) == []
        await node.run_queued(FLUSH)
        assert await check(node) == []


async def test_rows_without_files_and_files_of_another_size(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (gone, cut) = await node.add_dataset(PIECES, [b"x" * 100])
        await node.run_queued(FLUSH)
        (await node.node.path_of(gone, "ssd")).unlink()
        path = await node.node.path_of(cut, "ssd")
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-7])
        found = {one.kind: one for one in await check(node)}
        assert set(found) == {"missing file", "wrong size"}
        assert found["missing file"].subject == f"blob {gone}"
        assert "7" not in found["wrong size"].repair
        assert {one.kind for one in await check(node)} == set(found), "a dry run changes nothing"
        assert await mend(node) == []
        for blob in (gone, cut):
            assert await node.states(blob) == [("object", "live"), ("ssd", "live")]
            await node.check_copies(blob)


async def test_files_without_rows_are_collected_once_they_are_old(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        for name in ("ssd", "object"):
            tier = node.node.tiers.get(name)
            for _ in range(2):
                tier.put(tier.blob_name(new_random_name()), b"stray")
        assert await check(node) == []
        paths = of_size(tmp_path, 5)
        assert len(paths) == 4
        for path in paths[::2]:
            old(path)
        found = await check(node)
        assert [one.kind for one in found] == ["stray file"] * len(paths[::2])
        listed = await node.integrity.list_garbage()
        assert {one.what for one in listed} == {f"file {path.name}" for path in paths[::2]}
        assert await mend(node) == []
        assert [path.exists() for path in paths] == [False, True, False, True]
        assert "deleted" in await node.events("tier ssd") + await node.events("tier object")


async def test_extent_lists_that_are_damaged_missing_or_of_nothing(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (bad, lost) = await node.add_dataset(PIECES, [b"x"])
        await node.run_queued(FLUSH)
        lists = tmp_path / "object" / "blobs"
        kept = {blob: (lists / blob).read_bytes() for blob in (bad, lost)}
        flip(lists / bad, 50)
        (lists / lost).unlink()
        stray = lists / ("a" * 64)
        stray.write_bytes(b"?")
        old(stray)
        kinds = sorted(one.kind for one in await check(node))
        assert kinds == ["bad extent list", "bad extent list", "stray extent list"]
        assert await mend(node) == []
        assert {blob: (lists / blob).read_bytes() for blob in kept} == kept
        assert not stray.exists()


async def test_manifests_that_are_damaged_or_gone_are_published_again(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        made = [(await node.add_dataset([bytes([one])]))[0] for one in range(2)]
        await node.run_queued(FLUSH)
        paths = [tmp_path / "object" / "manifests" / name for name in made]
        kept = [path.read_bytes() for path in paths]
        flip(paths[0], len(kept[0]) // 2)
        paths[1].unlink()
        assert [one.kind for one in await check(node)] == ["bad manifest"] * 2
        assert await mend(node) == []
        assert [path.read_bytes() for path in paths] == kept


async def test_what_another_catalog_knows_stays(tmp_path: Path) -> None:
    """As after a backup of the catalog was restored: the object tier has more."""
    async with open_integrity(tmp_path) as node:
        identity, (blob,) = await node.add_dataset(PIECES, tiers=("ssd",))
        await node.run_queued(FLUSH)

        def forget(connection):
            for table in (manifest_remote, manifest_blobs, selections, versions, manifests):
                connection.execute(delete(table))

        await node.node.catalog.write(forget)
        before = node.files("object")
        await node.run("collect", "x")  # the blob is an orphan by now
        (left,) = [one for one in await check(node) if one.kind == "unknown manifest"]
        assert left.subject == f"manifest {identity}"
        assert left.repair == ""
        assert blob not in str([one.repair for one in await mend(node)])
        assert f"manifests/{identity}" in node.files("object")
        assert len(before) == 3


async def test_blobs_that_no_tier_has_and_pins_to_nothing(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES)

        def damage(connection):
            connection.execute(delete(replicas).where(replicas.c.blob == blob))
            connection.execute(insert(pins).values(pin="p" * 32, target="dataset d@1", tier="ssd"))
            connection.execute(insert(pin_blobs).values(pin="p" * 32, blob="b" * 64))

        await node.node.catalog.write(damage)
        found = sorted(one.kind for one in await check(node))
        assert found == ["lost blob", "pin to nothing", "stray row"]
        assert sorted(one.kind for one in await mend(node)) == ["lost blob", "stray row"]


async def test_a_manifest_row_that_contradicts_its_blobs(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        identity, (blob, _) = await node.add_dataset(PIECES, [b"x"])
        drop = delete(manifest_blobs).where(manifest_blobs.c.blob == blob)
        await node.node.catalog.write(lambda c: c.execute(drop))
        (found,) = await check(node)
        assert (found.kind, found.subject) == ("bad manifest row", f"manifest {identity}")
        assert f"like {blob}" in found.detail


async def test_a_tier_that_is_away_is_a_finding_and_its_files_are_not(tmp_path: Path) -> None:
    async with open_integrity(tmp_path) as node:
        _, (blob,) = await node.add_dataset(PIECES)
        (tmp_path / "ssd").rename(tmp_path / "away")
        (found,) = await check(node)
        assert (found.kind, found.subject) == ("unreachable", "tier ssd")
        (tmp_path / "away").rename(tmp_path / "ssd")
        assert await node.states(blob) == [("ssd", "live")]


async def test_what_plans_and_clients_need_is_garbage_only_later(tmp_path: Path) -> None:
    needed = True
    async with open_integrity(tmp_path, is_planned=lambda blob: needed) as node:
        blob = (await node.node.add_blob(PIECES, "ssd")).blob_id
        (doomed,) = await node.integrity.list_garbage()
        assert (doomed.what, doomed.tiers) == (f"blob {blob}", ("ssd",))
        assert "not before a client or plan" in doomed.reason
        await node.node.catalog.write(lambda c: enqueue(c, COLLECT, "x"))
        ((_, error),) = await node.run_queued(COLLECT)
        assert "still open" in error
        assert await node.states(blob) == [("ssd", "live")]
        needed = False
        await node.run(COLLECT, "y")
        assert node.files("ssd") == []
        assert (await node.events(f"blob {blob}"))[-1] == "deleted"
