"""Random operations: every tier agrees with a dictionary."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from forebay_server.testing.tier_contract import random_bytes
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import Tier, TierWriter
from forebay_wire.errors import AlreadyExists, NotFound
from forebay_wire.ids import new_random_name

SIZES = st.one_of(
    st.integers(0, 10), st.integers(4090, 4100), st.integers(1 << 20, (1 << 20) + 5000)
)


class TierMachine(RuleBasedStateMachine):
    """Writers, published files and restarts in any order."""

    make_tier: Callable[[Path], Tier]
    names = Bundle("names")
    writers = Bundle("writers")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.tier = self.make_tier(self.folder)
        self.tier.open()
        self.files: dict[str, bytes] = {}
        self.written: dict[int, tuple[TierWriter, str, bytearray]] = {}

    def teardown(self) -> None:
        for writer, _, _ in self.written.values():
            writer.abort()
        for info in list(self.tier.list()):
            self.tier.delete(info.name)
        self.tier.close()
        shutil.rmtree(self.folder)

    @rule(target=names)
    def invent_name(self) -> str:
        return self.tier.blob_name(new_random_name())

    @rule(target=writers, name=names, expected=SIZES)
    def create(self, name: str, expected: int) -> int:
        writer = self.tier.create(name, expected)
        self.written[id(writer)] = writer, name, bytearray()
        return id(writer)

    @rule(writer=writers, size=SIZES, seed=st.integers(0, 1000))
    def write(self, writer: int, size: int, seed: int) -> None:
        piece = random_bytes(size, seed)
        target, _, content = self.written[writer]
        target.write(piece)
        content += piece
        assert target.num_bytes == len(content)

    @rule(writer=consumes(writers))
    def publish(self, writer: int) -> None:
        target, name, content = self.written.pop(writer)
        if name in self.files:
            with pytest.raises(AlreadyExists):
                target.publish()
            return
        target.publish()
        self.files[name] = bytes(content)

    @rule(writer=consumes(writers))
    def abort(self, writer: int) -> None:
        self.written.pop(writer)[0].abort()

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.tier.delete(name)
        self.files.pop(name, None)

    @rule(name=names)
    def read(self, name: str) -> None:
        if name not in self.files:
            with pytest.raises(NotFound):
                self.tier.get(name)
            return
        assert self.tier.get(name) == self.files[name]

    @rule()
    def restart(self) -> None:
        """The next daemon's view: it must not touch what is still being written here."""
        if self.tier.kind != "object":
            self.tier.close()  # one daemon at a time; writers go on without it
        other = self.make_tier(self.folder)
        other.open()
        other.close()

    @invariant()
    def the_listing_is_right(self) -> None:
        listed = sorted((info.name, info.size_bytes) for info in self.tier.list())
        assert listed == sorted((name, len(content)) for name, content in self.files.items())

    @invariant()
    def the_ledger_is_right(self) -> None:
        space = self.tier.space()
        assert space.num_files == len(self.files)
        assert space.used_bytes >= sum(map(len, self.files.values()))
        assert (
            (space.reserved_bytes > 0)
            or not self.written
            or all(not content for _, _, content in self.written.values())
        )


@pytest.mark.parametrize(
    "make_tier",
    [
        pytest.param(lambda f: DirectoryTier("ssd", "ssd", f / "ssd", reserve_bytes=0), id="ssd"),
        pytest.param(lambda f: RemoteTier("object", f"file://{f}/object"), id="directory"),
        pytest.param(lambda f: RemoteTier("object", f"memory://{f.name}"), id="memory"),
    ],
)
def test_a_tier_agrees_with_a_dictionary(make_tier: Callable[[Path], Tier]) -> None:
    class Machine(TierMachine):
        pass

    Machine.make_tier = staticmethod(make_tier)
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=15, stateful_step_count=25, deadline=None)
    )
