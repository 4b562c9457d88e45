"""The engine against a dictionary: right bytes, or an error where no good copy is in reach."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from forebay_server.testing.checkpoints import CUT_BYTES, RUN
from forebay_server.testing.engine import EngineDied, EngineProcess
from forebay_server.testing.engine_calls import BATCH_ROWS
from forebay_server.testing.engine_oracle import (
    FAILPOINTS,
    Blob,
    Copy,
    Died,
    Plan,
    allocated_bytes,
    harm,
    survives,
    when,
)
from forebay_wire.errors import (
    Conflict,
    ForebayError,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
)
from forebay_wire.ids import new_random_name
from forebay_wire.limits import KIB, MIB

SMALL = 40 * KIB
LARGE = 300 * KIB
CHOICE = st.integers(0, 1 << 30)
LANDING = ("ssd", "hdd")
TIERS = (*LANDING, "object")
PREFETCH_SECONDS = SETTLE_SECONDS = 30.0
FOLDER = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
"""In memory an fsync costs nothing; a power loss is the business of another test."""


class Engine(RuleBasedStateMachine):
    """One engine in a process of its own, and a dictionary of what it has acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="engine-", dir=FOLDER))
        self.engine = EngineProcess(self.folder, {"reserve_bytes": 0, "trash_seconds": 0})
        self.named: dict[tuple[str, int], list[Blob]] = {}
        """Acknowledged: ("generation", step) or ("dataset", number) to its blobs."""
        self.unknown: dict[tuple[str, int], list[Blob]] = {}
        """Begun, and the answer was lost."""
        self.number = 0
        self.harmed: set[Copy] = set()
        """Files that somebody changed behind the engine's back."""
        self.good: dict[str, set[Copy]] = {}
        """After the last step: blob to its good copies, in tiers that are away too."""
        self.trusted_bad: set[str] = set()
        """At that time: blobs with a copy that the engine wrongly holds for good."""
        self.away = ""
        self.full: set[str] = set()
        self.is_harmed = False
        self.pins: dict[str, tuple[tuple[str, int], str]] = {}
        self.plans: dict[str, Plan] = {}

    # ------------------------------------------------------------------------------ its life

    @initialize(is_harmed=st.booleans())
    def start(self, is_harmed: bool) -> None:
        """In half of the lives nobody harms anything, and nothing may fail for that."""
        self.is_harmed = is_harmed
        self.engine.start()
        self.attempt = self.engine.call("begin_attempt", None)
        self.save(1, SMALL)
        self.save(2, LARGE)
        self.write_dataset(1, 3)

    def teardown(self) -> None:
        try:
            if self.engine.is_alive:
                self._end()
        finally:
            self.engine.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        """With everything there again, all is read that can be."""
        with suppress(Died):
            self.call("live_on")
            self.call("late_goes_on")
        self._bring_back()
        self.call("probe")
        for key in self.named:
            for blob in self.named[key]:
                self._check(blob, 0, len(blob.data))
        if not self.harmed:
            self._check_ledger()
        self.engine.stop()

    def _check_ledger(self) -> None:
        """Once all is done, the ledger counts what is on the disk, and nothing is promised."""
        for plan in self.plans:
            self.call("end_plan", plan)
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            self.call("settle")
            counted = self.call("used_bytes")
            found = {tier: (allocated_bytes(self.folder / tier), 0) for tier in LANDING}
            if counted == found:
                return
            assert time.monotonic() < deadline, f"the ledger has {counted}, the disk {found}"
            time.sleep(0.05)

    def call(self, name: str, *arguments: Any) -> Any:
        try:
            return self.engine.call(name, *arguments)
        except EngineDied:
            self._revive()
            raise Died from None

    def _revive(self) -> None:
        """A new engine on what the dead one left."""
        self.engine.kill()
        self._bring_back()
        self.full.clear()
        self.plans.clear()
        self.engine.start()
        self._learn()

    def _learn(self) -> None:
        """What became of that whose answer was lost."""
        for key, blobs in list(self.unknown.items()):
            found = self._look(key, self.engine.call)
            if found is not None:
                assert found == [blob.id for blob in blobs], "half of it is visible"
                self.named[key] = blobs
                del self.unknown[key]

    def _look(self, key: tuple[str, int], call: Callable[..., Any]) -> list[str] | None:
        """The blobs of a generation or dataset, None if it is not there."""
        kind, number = key
        if kind == "dataset":
            found = call("manifest_of", f"d{number}")
            return None if found is None else found[1]
        if not call("is_committed", self.attempt, number):
            return None
        found = call("blobs_of", self.attempt, number)
        assert isinstance(found, list)
        return found

    @rule()
    @when(lambda self: not self.away)
    @survives
    def restart(self) -> None:
        self.call("live_on")  # or what is done at the end comes by where it is to die
        self.engine.stop()
        self.full.clear()
        self.plans.clear()
        self.engine.start()
        self._learn()

    @rule()
    def kill(self) -> None:
        """SIGKILL, whatever it does in the background."""
        self._revive()

    @rule(failpoint=st.sampled_from(FAILPOINTS), count=st.integers(1, 3))
    @survives
    def die_later(self, failpoint: str, count: int) -> None:
        """SIGKILL once something comes by there."""
        self.call("die_at", failpoint, count)

    # ------------------------------------------------------------------------------- put and seal

    @rule(seed=st.integers(0, 3), size=st.sampled_from([1, SMALL, LARGE]))
    @survives
    def save(self, seed: int, size: int) -> None:
        """A generation of two ranks; equal seeds make equal blobs."""
        rng = random.Random(seed)
        packs = [rng.randbytes(size), rng.randbytes(size + 7)]
        self.number += 1
        blobs = [Blob.of(data, CUT_BYTES) for data in packs]
        self._commit(("generation", self.number), blobs, "save", self.attempt, self.number, packs)

    @rule(seed=st.integers(0, 3), num_shards=st.integers(1, 3))
    @survives
    def write_dataset(self, seed: int, num_shards: int) -> None:
        rng = random.Random(seed + 100)
        shards = [rng.randbytes(SMALL + number) for number in range(num_shards)]
        self.number += 1
        blobs = [Blob.of(data, MIB) for data in shards]
        key = ("dataset", self.number)
        self._commit(key, blobs, "commit_dataset", f"d{self.number}", shards)

    def _commit(self, key: tuple[str, int], blobs: list[Blob], name: str, *arguments: Any) -> None:
        self.unknown[key] = blobs
        try:
            self.call(name, *arguments)
        except ResourceExhausted:
            assert self._no_tier_takes_anything(), "refused although there is room"
        except ForebayError:
            assert self.away in LANDING, "refused without a reason"
        else:
            del self.unknown[key]
            self.named[key] = blobs

    def _no_tier_takes_anything(self) -> bool:
        return all(tier in self.full or tier == self.away for tier in LANDING)

    @rule(choice=CHOICE)
    @when(lambda self: self.named and not self.away)
    @survives
    def delete(self, choice: int) -> None:
        """What it shares with others stays."""
        key = self._pick(choice)
        self.unknown[key] = self.named.pop(key)
        kind, number = key
        try:
            if kind == "dataset":
                self.call("delete_dataset", f"d{number}")
            else:
                self.call("delete_generation", self.attempt, number)
        except Conflict:  # the newest attempt stands on it
            self.named[key] = self.unknown[key]
        else:
            assert self._look(key, self.call) is None, "deleted, and still there"
        del self.unknown[key]

    # ------------------------------------------------------------------------------------ read

    @rule(choice=CHOICE, start=st.floats(0, 1), length=st.floats(0, 1))
    @when(lambda self: self.named)
    @survives
    def read(self, choice: int, start: float, length: float) -> None:
        for blob in self.named[self._pick(choice)]:
            begin = int(start * len(blob.data))
            end = begin + int(length * (len(blob.data) - begin))
            self._check(blob, begin, end)

    def _check(self, blob: Blob, begin: int, end: int) -> None:
        """Right bytes, or an error and no good copy."""
        try:
            found = self.call("read", blob.id, begin, end)
        except ForebayError as error:
            assert not self._reachable(blob), f"a good copy is not served: {error}"  # noqa: PT017
        else:
            assert found == blob.data[begin:end], "wrong bytes"

    @rule(choice=CHOICE)
    @when(lambda self: self.named and not self.away)
    @survives
    def flush(self, choice: int) -> None:
        """Everything becomes remote, except what has no good copy left."""
        kind, number = key = self._pick(choice)
        if kind == "dataset":
            return
        self.call("hurry")
        try:
            self.call("wait_remote", self.attempt, number, 20.0)
        except ForebayError:
            lost = [blob for blob in self.named[key] if not self._reachable(blob)]
            assert lost, "everything is there, and it does not become remote"
        else:
            for blob in self.named[key]:
                copies = self._copies([blob])[blob.id]
                assert any(tier == "object" for tier, _, state, _ in copies if state == "live")

    # -------------------------------------------------------------------------------- movement

    @rule(choice=CHOICE, tier=st.sampled_from(LANDING))
    @when(lambda self: self.named)
    @survives
    def evict(self, choice: int, tier: str) -> None:
        pinned = self._pinned()
        for blob in self.named[self._pick(choice)]:
            before = self._live([blob])[blob.id]
            with suppress(ForebayError):
                self.call("evict", blob.id, tier)
                after = self._live([blob])[blob.id]
                assert after or not before, "the last copy went"
                if (blob.id, tier) in pinned:
                    assert (tier in after) == (tier in before), "a pinned copy went"

    @rule(choice=CHOICE, is_down=st.booleans(), is_copy=st.booleans(), is_waiting=st.booleans())
    @when(lambda self: self.named)
    @survives
    def move(self, choice: int, is_down: bool, is_copy: bool, is_waiting: bool) -> None:
        source, target = LANDING if is_down else LANDING[::-1]
        for blob in self.named[self._pick(choice)]:
            if is_copy:
                self.call("queue_copy", blob.id, target)
            else:
                self.call("queue_migration", blob.id, source, target)
        if is_waiting:
            self.call("settle")

    @rule(
        choice=CHOICE,
        kind=st.sampled_from(["copy", "migrate"]),
        is_down=st.booleans(),
        stop_at=st.sampled_from(["begin", "inside", "removal"]),
    )
    @when(lambda self: self.named)
    @survives
    def mover_stands_still(self, choice: int, kind: str, is_down: bool, stop_at: str) -> None:
        """Its lease runs out, and somebody else has the job."""
        blobs = self.named[self._pick(choice)]
        source, target = LANDING if is_down else LANDING[::-1]
        blob = blobs[choice % len(blobs)]
        self.call("late_begins", kind, blob.id, source, target, stop_at)

    @rule()
    @survives
    def mover_wakes_up(self) -> None:
        assert self.call("late_goes_on") != "KeyError"

    @rule(choice=CHOICE, tier=st.sampled_from(LANDING))
    @when(lambda self: self.named and not self.away)
    @survives
    def pin(self, choice: int, tier: str) -> None:
        """What a pin says of itself is so."""
        kind, number = key = self._pick(choice)
        names = {"dataset": f"dataset d{number}", "generation": f"generation {RUN}@1/{number}"}
        try:
            pin = self.call("pin", names[kind], tier)
        except ResourceExhausted:
            assert tier in self.full, "no pin although there is room"
            return
        self.call("settle")
        state, is_warm = self.call("is_pinned_warm", pin)
        live = self._live(self.named[key])
        if is_warm:
            assert all(tier in live[blob.id] for blob in self.named[key]), "it says warm, not so"
        else:
            whole = all(self._reachable(blob) for blob in self.named[key])
            is_hurt = any(self._was_harmed(blob) for blob in self.named[key])
            assert self.full or is_hurt or not whole, f"it is {state} and not warm"
        if state in ("held", "fetching"):
            self.pins[pin] = (key, tier)

    @rule(choice=CHOICE)
    @when(lambda self: self.pins)
    @survives
    def unpin(self, choice: int) -> None:
        pin = sorted(self.pins)[choice % len(self.pins)]
        del self.pins[pin]
        with suppress(NotFound):  # what it held was deleted
            self.call("unpin", pin)

    def _pinned(self) -> set[Copy]:
        return {
            (blob.id, tier) for key, tier in self.pins.values() for blob in self.named.get(key, ())
        }

    # ------------------------------------------------------------------------------------- plans

    @rule(choice=CHOICE, seed=st.integers(0, 9), shuffle=st.sampled_from(["none", "full"]))
    @when(lambda self: any(kind == "dataset" for kind, _ in self.named))
    @survives
    def plan(self, choice: int, seed: int, shuffle: str) -> None:
        """A plan brings what it needs into the fastest tier, if nothing is in the way."""
        datasets = sorted(key for key in self.named if key[0] == "dataset")
        key = datasets[choice % len(datasets)]
        manifest, _ = self.call("manifest_of", f"d{key[1]}")
        name = new_random_name()
        self.call("register", name, manifest, shuffle, seed, 0)
        self.plans[name] = Plan(manifest, BATCH_ROWS * len(self.named[key]))
        deadline = time.monotonic() + PREFETCH_SECONDS
        while not (self.away or self.full or any(map(self._was_harmed, self.named[key]))):
            live = self._live(self.named[key])
            if all("ssd" in tiers for tiers in live.values()):
                break
            assert time.monotonic() < deadline, f"not prefetched: {live}"
            time.sleep(0.02)

    @rule(choice=CHOICE, epoch=st.integers(0, 1), position=st.integers(0, 12))
    @when(lambda self: self.plans)
    @survives
    def advance(self, choice: int, epoch: int, position: int) -> None:
        """A position goes forward only."""
        name = sorted(self.plans)[choice % len(self.plans)]
        plan = self.plans[name]
        position = min(position, plan.num_samples)
        then = epoch * plan.num_samples + position
        try:
            self.call("advance", name, epoch, position)
        except InvalidRequest:
            assert then <= plan.time, "a position ahead is refused"
        except NotFound:  # its lease ran out on a slow machine
            del self.plans[name]
        else:
            assert then >= plan.time, "a plan went back"
            plan.time = then

    @rule(choice=CHOICE)
    @when(lambda self: self.plans)
    @survives
    def end_plan(self, choice: int) -> None:
        name = sorted(self.plans)[choice % len(self.plans)]
        del self.plans[name]
        self.call("end_plan", name)

    # -------------------------------------------------------------------------- mend and collect

    @rule()
    @when(lambda self: not self.away)
    @survives
    def scrub(self) -> None:
        """Afterwards nothing bad is trusted, and what can be repaired is."""
        self.call("hurry")
        self.call("scrub")
        blobs = self._all_blobs()
        for blob in blobs:
            for tier, file, state, encoding in self._copies([blob]).get(blob.id, ()):
                assert state != "live" or self._is_good(blob, tier, file, encoding), (
                    f"a bad copy in {tier} is still trusted"
                )
                if self._reachable(blob) and not self.full:
                    assert state == "live", f"the copy in {tier} is not repaired"

    @rule()
    @when(lambda self: not self.away)
    @survives
    def collect(self) -> None:
        self.call("collect")

    # ---------------------------------------------------------------------------------- harm

    @rule(choice=CHOICE, how=st.sampled_from(["flip", "truncate", "remove"]))
    @when(lambda self: self.is_harmed and self.named)
    @survives
    def harm(self, choice: int, how: str) -> None:
        """One file of one copy is changed behind the engine's back."""
        blobs = self.named[self._pick(choice)]
        blob = blobs[choice % len(blobs)]
        files = sorted(self.good.get(blob.id, set()) - self.harmed)
        if not files:
            return
        copy = files[choice // 7 % len(files)]
        path = self._path(*copy)
        if path is None:
            return  # it is just moving
        self.harmed.add(copy)
        with suppress(FileNotFoundError):
            harm(path, how, choice)
        if choice % 2:
            self._check(blob, 0, len(blob.data))

    @rule(tier=st.sampled_from(TIERS))
    @when(lambda self: self.is_harmed and not self.away)
    @survives
    def wipe(self, tier: str) -> None:
        """A tier loses all that it had."""
        for blob, copies in self.good.items():
            for copy in copies:
                path = self._path(*copy)
                if copy[0] == tier and path is not None and blob:
                    self.harmed.add(copy)
                    path.unlink(missing_ok=True)

    @rule(tier=st.sampled_from(LANDING), is_full=st.booleans())
    @survives
    def fill(self, tier: str, is_full: bool) -> None:
        """A landing tier has no room, or has it again."""
        self.call("limit", tier, 1 if is_full else 0)
        (self.full.add if is_full else self.full.discard)(tier)

    @rule(tier=st.sampled_from(TIERS))
    @when(lambda self: not self.away)
    def lose(self, tier: str) -> None:
        (self.folder / tier).rename(self.folder / f"{tier}-away")
        self.away = tier

    @rule()
    @when(lambda self: self.away)
    @survives
    def bring_back(self) -> None:
        self._bring_back()
        self.call("probe")

    def _bring_back(self) -> None:
        if self.away:
            place = self.folder / self.away
            shutil.rmtree(place, ignore_errors=True)
            place.with_name(f"{self.away}-away").rename(place)
            self.away = ""

    # ------------------------------------------------------------------------------- what holds

    @invariant()
    def no_copy_is_lost_but_by_harm(self) -> None:
        """The last good copy goes only where another one, that somebody harmed, was trusted."""
        if not self.engine.is_alive:
            return
        try:
            copies = self._copies(self._all_blobs())
        except Died:
            copies = self._copies(self._all_blobs())
        before, trusted_bad = self.good, self.trusted_bad
        self.good, self.trusted_bad = {}, set()
        for blob in self._all_blobs():
            listed = copies.get(blob.id, [])
            found = {
                (tier, file)
                for tier, file, _, way in listed
                if self._is_good(blob, tier, file, way, also_away=True)
            }
            self.good[blob.id] = found
            if any((tier, file) not in found for tier, file, state, _ in listed if state == "live"):
                self.trusted_bad.add(blob.id)
            was_harmed = bool(before.get(blob.id, set()) & self.harmed)
            assert (
                found
                or was_harmed
                or blob.id in trusted_bad
                or (blob.id in before and not before[blob.id])
            ), f"the last good copy of {blob.id} is gone: {before.get(blob.id)} to {listed}"

    # ---------------------------------------------------------------------------------- parts

    def _pick(self, choice: int) -> tuple[str, int]:
        keys = sorted(self.named)
        return keys[choice % len(keys)]

    def _all_blobs(self) -> list[Blob]:
        return list({blob.id: blob for blobs in self.named.values() for blob in blobs}.values())

    def _copies(self, blobs: list[Blob]) -> dict[str, list[tuple[str, str, str, str]]]:
        found = self.call("copies", [blob.id for blob in blobs])
        assert isinstance(found, dict)
        return found

    def _live(self, blobs: list[Blob]) -> dict[str, set[str]]:
        """Blob to the tiers with a copy that the engine trusts."""
        copies = self._copies(blobs)
        return {
            blob.id: {tier for tier, _, state, _ in copies.get(blob.id, ()) if state == "live"}
            for blob in blobs
        }

    def _reachable(self, blob: Blob) -> bool:
        """Whether a row of the blob leads to a good copy in a tier that is there."""
        listed = self._copies([blob]).get(blob.id, [])
        return any(self._is_good(blob, tier, file, encoding) for tier, file, _, encoding in listed)

    def _was_harmed(self, blob: Blob) -> bool:
        files = {(tier, file) for tier, file, _, _ in self._copies([blob]).get(blob.id, ())}
        return bool((files | self.good.get(blob.id, set())) & self.harmed)

    def _is_good(
        self, blob: Blob, tier: str, file: str, encoding: str, *, also_away: bool = False
    ) -> bool:
        path = self._path(tier, file, also_away=also_away)
        assert encoding == "raw", "random bytes are not worth encoding"
        return path is not None and path.read_bytes() == blob.image

    def _path(self, tier: str, file: str, *, also_away: bool = False) -> Path | None:
        folder = self.folder / tier
        if tier == self.away:
            if not also_away:
                return None
            folder = self.folder / f"{tier}-away"
        path = folder / "data" / file if tier == "object" else folder / "files" / file[:2] / file
        return path if path.exists() else None


QUICK = settings(
    derandomize=True,
    max_examples=6,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.timeout(600)
def test_the_engine_agrees_with_a_dictionary() -> None:
    run_state_machine_as_test(Engine, settings=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_engine_agrees_with_a_dictionary_for_long() -> None:
    long = settings(QUICK, max_examples=200, stateful_step_count=60)
    run_state_machine_as_test(Engine, settings=long)
