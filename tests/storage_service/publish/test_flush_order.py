"""Whatever lies in the object tier can be relied on at every instant, also after a kill."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from forebay_server.model.extents import ObjectBlob
from forebay_server.testing.checkpoints import open_checkpoints
from forebay_server.testing.warm import WarmPython
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import TierWriter
from forebay_wire.failpoints import REMOTE_FLUSH, VARIABLE
from forebay_wire.limits import MIB
from forebay_wire.manifest import GenerationManifest, parse

KILLED = """
import asyncio, sys
from pathlib import Path
from forebay_server.testing.checkpoints import open_checkpoints

async def main(folder):
    async with open_checkpoints(folder) as node:
        await node.begin(num_ranks=2)
        saved = await node.save(1, [bytes([7]) * 300_000, bytes([8]) * 200_000])
        await node.wait(saved, "remote", 60)

asyncio.run(main(Path(sys.argv[1])))
"""


def check_lists(tier: Path) -> set[str]:
    """Every extent list leads to files that are there; the blobs that have one."""
    found = set()
    for path in (tier / "blobs").glob("*"):
        for extent in ObjectBlob.decode(path.read_bytes(), str(path), path.name).extents:
            # Files are published as a whole: one that is there has all its bytes.
            assert (tier / "data" / extent.file).stat().st_size == extent.file_bytes
        found.add(path.name)
    return found


@pytest.mark.parametrize("failpoint", [*REMOTE_FLUSH, "flush.before_blob:2", "flush.after_blob:2"])
async def test_a_manifest_is_last_and_an_extent_list_after_its_file(
    tmp_path: Path, failpoint: str, warm_server: WarmPython
) -> None:
    command = ["-c", KILLED, tmp_path]
    done = await asyncio.to_thread(warm_server.run, command, {VARIABLE: failpoint})
    assert done.returncode == -signal.SIGKILL, done.stderr
    tier = tmp_path / "object"
    listed = check_lists(tier)
    manifests = list((tier / "manifests").glob("*"))
    assert len(manifests) == (failpoint == "flush.after_manifest")
    for path in manifests:
        manifest = parse(path.read_bytes(), str(path), path.name)
        assert isinstance(manifest, GenerationManifest)
        assert set(manifest.blobs()) <= listed


async def test_what_is_stored_wrong_is_found_before_anything_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = RemoteTier.create
    wrong: list[Path] = []

    def create_wrong_once(tier: RemoteTier, name: str, expected_bytes: int) -> TierWriter:
        writer = create(tier, name, expected_bytes)
        publish, path = writer.publish, tmp_path / "object" / name

        def publish_wrong() -> None:
            publish()
            stored = bytearray(path.read_bytes())
            stored[100] ^= 1
            path.write_bytes(stored)

        if name.startswith("data/") and not wrong:
            wrong.append(path)
            monkeypatch.setattr(writer, "publish", publish_wrong)
        return writer

    monkeypatch.setattr(RemoteTier, "create", create_wrong_once)
    async with open_checkpoints(tmp_path) as node:
        await node.begin()
        saved = await node.save(1, [os.urandom(MIB)])
        assert (await node.wait(saved, "remote")).durability == "remote"
    assert len(wrong) == 1
    assert not wrong[0].exists()
    assert len(check_lists(tmp_path / "object")) == 1
