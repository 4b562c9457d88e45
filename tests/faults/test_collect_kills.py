"""A deletion that is killed at every named step: what others share is read, what was deleted does
not come back, and the next start finishes it."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay_server.testing.engine import EngineDied, EngineProcess
from forebay_wire.failpoints import COLLECT
from forebay_wire.limits import KIB

SECONDS = 30.0
RNG = random.Random(7)
SHARED, KEPT, *GONE = (RNG.randbytes(64 * KIB + number) for number in range(4))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    made = EngineProcess(tmp_path / "data", {"reserve_bytes": 0, "trash_seconds": 0}).start()
    yield made
    made.kill()


def wait_until_remote(engine: EngineProcess, blobs: list[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not all("object" in str(copies) for copies in engine.call("copies", blobs).values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def files_of(engine: EngineProcess) -> set[str]:
    """Blob files in the landing tier and in the object tier."""
    here = [*engine.data.glob("ssd/files/*/*"), *engine.data.glob("object/data/*")]
    return {path.name for path in here}


def delete_all(engine: EngineProcess, name: str) -> None:
    """Delete a dataset with its bytes."""
    engine.call("delete_dataset", name)
    engine.call("settle")


@pytest.mark.parametrize("point", [*COLLECT, f"{COLLECT[5]}:2"])
def test_a_deletion_that_is_killed_takes_nothing_else(engine: EngineProcess, point: str) -> None:
    _, kept = engine.call("commit_dataset", "kept", [SHARED, KEPT])
    _, gone = engine.call("commit_dataset", "gone", [SHARED, *GONE])
    wait_until_remote(engine, [*kept, *gone])
    name, _, count = point.partition(":")
    engine.call("die_at", name, int(count or 1))
    with pytest.raises(EngineDied):
        delete_all(engine, "gone")
    engine.kill()
    engine.start()
    assert engine.call("manifest_of", "gone") is None
    assert engine.call("manifest_of", "kept")[1] == kept
    engine.call("settle")
    engine.call("collect")
    for blob, data in zip(kept, (SHARED, KEPT), strict=True):
        assert engine.call("read", blob, 0, len(data)) == data
    copies = engine.call("copies", [*kept, *gone])
    assert set(copies) == set(kept)
    assert files_of(engine) == {file for found in copies.values() for _, file, *_ in found}
    assert engine.call("fsck", False) == []
    engine.stop()
