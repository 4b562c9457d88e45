"""Placement: what policies ask for, and that no decision loses the last durable place."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay_server.model.placement import (
    AHEAD_SECONDS,
    BUILT_IN,
    COLD,
    DURABILITY,
    HOT,
    WARM,
    WHEN_IDLE,
    BlobFacts,
    Copy,
    Drop,
    Policy,
    ReplicaFacts,
    TierRoom,
    decide,
    has_work,
)

DAY = 86400.0
NOW = 100 * DAY
KINDS = tuple(DURABILITY)


def rooms(**free_bytes: int) -> list[TierRoom]:
    found = {"ssd": 1000, "hdd": 1000, "object": 1000, **free_bytes}
    return [TierRoom(kind, kind, free) for kind, free in found.items()]


def blob(*kinds: str, idle: float = 0.0, **facts: Any) -> BlobFacts:
    return BlobFacts(
        now=NOW,
        created=NOW - 50 * DAY,
        last_used=NOW - idle,
        num_bytes=10,
        replicas=tuple(ReplicaFacts(kind, kind) for kind in kinds),
        **facts,
    )


def summary(policy: Policy, facts: BlobFacts, **free_bytes: int) -> list[str]:
    actions = decide(policy, facts, rooms(**free_bytes))
    return [
        f"copy to {action.to}" if isinstance(action, Copy) else f"drop {action.tier}"
        for action in actions
    ]


@pytest.mark.parametrize(
    ("policy", "facts", "expected"),
    [
        (HOT, blob("ssd"), ["copy to object"]),
        (HOT, blob("object"), ["copy to ssd"]),
        (HOT, blob("hdd", "object"), ["copy to ssd"]),
        (HOT, blob("ssd", "object", idle=40 * DAY), []),
        (WARM, blob("ssd"), ["copy to object"]),
        (WARM, blob("ssd", "object", idle=6 * DAY), []),
        (WARM, blob("ssd", "object", idle=7 * DAY), ["drop ssd"]),
        (WARM, blob("ssd", idle=7 * DAY), ["copy to object"]),  # first the copy, later the drop
        (WARM, blob("ssd", "hdd", idle=7 * DAY), ["copy to object", "drop ssd"]),
        (WARM, blob("ssd", "object", idle=7 * DAY, planned_next_use=NOW + 5), []),
        (WARM, blob("ssd", "object", idle=7 * DAY, is_dirty=True), []),
        (WARM, blob("ssd", "object", idle=7 * DAY, pinned_tiers=frozenset({"ssd"})), []),
        (WARM, blob("object", pinned_tiers=frozenset({"ssd"})), ["copy to ssd"]),
        (COLD, blob("ssd", "object"), ["drop ssd"]),
        (COLD, blob("hdd", "object", idle=2 * DAY), ["drop hdd"]),
        (COLD, blob("ssd", "hdd", "object", idle=2 * DAY), ["drop ssd", "drop hdd"]),
        (COLD, blob("object"), []),
        (COLD, blob(), []),
    ],
)
def test_what_policies_ask_for(policy: Policy, facts: BlobFacts, expected: list[str]) -> None:
    assert summary(policy, facts) == expected


def test_without_an_object_tier_an_idle_blob_goes_down_to_the_disk() -> None:
    facts = blob("ssd", idle=10 * DAY)
    assert summary(WARM, facts, object=0) == ["copy to hdd"]
    assert summary(WARM, blob("ssd", "hdd", idle=10 * DAY), object=0) == ["drop ssd"]


def test_a_copy_goes_only_if_one_at_least_as_durable_stays() -> None:
    demoting = Policy("own", demote_after_seconds={"ssd": 0.0, "hdd": 0.0, "object": 0.0})
    assert summary(demoting, blob("ssd", "object")) == ["drop ssd"]
    assert summary(demoting, blob("ssd", "hdd"), object=0) == ["drop ssd"]
    assert summary(demoting, blob("ram", "ssd"), hdd=0, object=0) == []
    assert summary(demoting, blob("object")) == []


def test_nothing_is_copied_to_a_tier_that_it_would_leave_at_once() -> None:
    demoting = Policy("own", demote_after_seconds={"ssd": 0.0, "hdd": 60.0})
    assert summary(demoting, blob("ssd", idle=50.0), object=0) == ["copy to hdd"]
    assert summary(demoting, blob("ssd", idle=70.0), object=0) == []


@pytest.mark.parametrize(
    ("within", "makes_room"),
    [
        (0.0, True),
        (50 * DAY + AHEAD_SECONDS, True),
        (50 * DAY + AHEAD_SECONDS + 1, None),
        (None, None),
    ],
)
def test_room_is_made_in_a_full_tier_for_what_is_due_soon(
    within: float | None, makes_room: bool | None
) -> None:
    policy = Policy("own", copies={"ssd": within})
    copies = [one for one in decide(policy, blob("object"), rooms(ssd=9)) if isinstance(one, Copy)]
    assert [one.makes_room for one in copies] == ([] if makes_room is None else [makes_room])
    (fits,) = decide(policy, blob("object"), rooms(ssd=10))
    assert isinstance(fits, Copy)
    assert not fits.makes_room


def test_a_plan_alone_makes_no_room_for_policies() -> None:
    policy = Policy("own", copies={"ssd": None})
    assert decide(policy, blob("object", planned_next_use=NOW + 5), rooms(ssd=9)) == []


def test_a_store_that_caches_gets_the_copies_and_frees_nothing() -> None:
    cache = TierRoom("cache", "cache", 1000)
    (copy,) = decide(HOT, blob("ssd"), [*rooms()[:2], cache])
    assert isinstance(copy, Copy)
    assert copy.to == "cache"
    (copy,) = decide(HOT, blob("ssd"), [cache, *rooms()])
    assert isinstance(copy, Copy)
    assert copy.to == "object"  # where there is one
    demoting = Policy("own", demote_after_seconds={"ssd": 0.0, "hdd": 0.0})
    assert decide(demoting, blob("ssd", "cache"), [cache]) == []
    assert decide(demoting, blob("ssd", "hdd", "cache"), [cache]) == [
        Drop("ssd", "unused for 0 s, policy own keeps it 0 s in ssd")
    ]


def test_policies_without_work_are_not_looked_at() -> None:
    assert has_work(HOT, {"ssd"})
    assert has_work(WARM, {"ssd"})
    assert has_work(HOT, {"cache"})
    assert not has_work(Policy("own", copies={"object": None}), {"ssd", "hdd"})
    assert not has_work(WARM, {"hdd"})


def test_a_replica_that_is_open_stays() -> None:
    facts = blob("ssd", "object", idle=9 * DAY)
    opened = tuple(dataclasses.replace(one, is_open=True) for one in facts.replicas)
    assert summary(WARM, dataclasses.replace(facts, replicas=opened)) == []


def test_the_most_urgent_copy_comes_first_with_its_due_time() -> None:
    policy = Policy("own", copies={"object": None, "hdd": 60.0, "ssd": 3600.0})
    facts = blob("ram", planned_next_use=NOW + 5)
    copies = [action for action in decide(policy, facts, rooms()) if isinstance(action, Copy)]
    created = facts.created
    assert [(copy.to, copy.due) for copy in copies] == [
        ("hdd", created + 60),
        ("ssd", created + 3600),
        ("object", WHEN_IDLE),
    ]


def test_a_planned_use_makes_the_local_copy_due_by_then() -> None:
    policy = Policy("own", copies={"ssd": None})
    (copy,) = decide(policy, blob("object", planned_next_use=NOW + 5), rooms())
    assert isinstance(copy, Copy)
    assert copy.due == NOW + 5


def test_copies_are_encoded_as_the_policy_says() -> None:
    policy = Policy("own", copies={"hdd": None}, encoding={"hdd": "lz4"})
    (copy,) = decide(policy, blob("object"), rooms())
    assert isinstance(copy, Copy)
    assert copy.encoding == "lz4"


def test_the_built_in_policies_are_known_by_name() -> None:
    assert set(BUILT_IN) == {"hot", "warm", "cold"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"land": ("sdd",)}, "no tier kind 'sdd'"),
        ({"land": ()}, "no tier where new bytes land"),
        ({"land": ("ssd", "ssd")}, "twice"),
        ({"land": ("object",)}, "not in 'object'"),
        ({"copies": {"tape": 1.0}}, "no tier kind 'tape'"),
        ({"copies": {"ssd": -1.0}}, "no number of seconds"),
        ({"demote_after_seconds": {"ssd": math.nan}}, "no number of seconds"),
        ({"copies": {"ssd": 1.0}, "demote_after_seconds": {"ssd": 9.0}}, "name it once"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy("own", **fields)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    seconds = st.floats(0, 300)
    copied = draw(st.sets(st.sampled_from(KINDS), max_size=2))
    demoted = draw(st.sets(st.sampled_from(KINDS)).map(lambda kinds: kinds - copied))
    land = draw(st.permutations(["ssd", "hdd"]))
    return Policy(
        "own",
        land=tuple(land[: draw(st.integers(1, 2))]),
        copies={kind: draw(st.none() | seconds) for kind in sorted(copied)},
        demote_after_seconds={kind: draw(seconds) for kind in sorted(demoted)},
    )


TIERS = [("ram", "ram"), ("fast", "ssd"), ("ssd", "ssd"), ("hdd", "hdd"), ("object", "object")]


def mostly(value: Any, others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What keeps copies from going is rare, else hardly any would go."""
    return st.integers(0, 5).flatmap(lambda number: others if number == 5 else st.just(value))


replicas = st.builds(
    lambda tier, is_open: ReplicaFacts(*tier, is_open),
    st.sampled_from(TIERS),
    mostly(False, st.just(True)),
)

facts_of_blobs = st.builds(
    BlobFacts,
    now=st.just(1000.0),
    created=st.floats(0, 500),
    last_used=st.floats(0, 1000),
    num_bytes=st.just(10),
    replicas=st.lists(replicas, max_size=5, unique_by=lambda one: one.tier).map(tuple),
    pinned_tiers=mostly(
        frozenset(), st.frozensets(st.sampled_from([tier for tier, _ in TIERS]), max_size=2)
    ),
    is_dirty=mostly(False, st.just(True)),
    planned_next_use=mostly(None, st.floats(1000, 2000)),
)

some_rooms = st.tuples(*(st.sampled_from([0, 100]) for _ in TIERS)).map(
    lambda free: [TierRoom(*tier, bytes_) for tier, bytes_ in zip(TIERS, free, strict=True)]
)


@settings(max_examples=150)
@given(policy=policies(), facts=facts_of_blobs, free=some_rooms, data=st.data())
def test_nothing_that_is_done_of_a_decision_loses_durability(
    policy: Policy, facts: BlobFacts, free: list[TierRoom], data: st.DataObject
) -> None:
    """Whatever part of it was done, in whatever order; copies may fail."""
    actions = decide(policy, facts, free)
    kind_of = dict(TIERS)
    held = {replica.tier for replica in facts.replicas}
    drops = [action for action in actions if isinstance(action, Drop)]
    done = data.draw(st.permutations(actions))[: data.draw(st.integers(0, len(actions)))]
    live = set(held)
    for action in done:
        if isinstance(action, Drop):
            live.discard(action.tier)
            durable = DURABILITY[kind_of[action.tier]]
            assert any(DURABILITY[kind_of[tier]] >= durable for tier in live & held)
    open_tiers = {replica.tier for replica in facts.replicas if replica.is_open}
    for drop in drops:
        assert not facts.is_dirty
        assert facts.planned_next_use is None
        assert drop.tier in held
        assert drop.tier not in facts.pinned_tiers | open_tiers
    for action in actions:
        if isinstance(action, Copy):
            assert action.to not in held
            fits = next(room.free_bytes for room in free if room.tier == action.to) >= 10
            assert action.makes_room is not fits
            is_demanded = action.due <= facts.now + AHEAD_SECONDS
            assert fits or is_demanded


@settings(max_examples=150)
@given(policy=policies(), facts=facts_of_blobs, free=some_rooms)
def test_decisions_come_to_rest(policy: Policy, facts: BlobFacts, free: list[TierRoom]) -> None:
    """Doing all that is decided, again and again, ends: nothing is copied to be dropped."""
    kind_of = dict(TIERS)
    dropped: set[str] = set()
    for _ in range(8):
        actions = decide(policy, facts, free)
        if not actions:
            return
        live = {replica.tier: replica for replica in facts.replicas}
        for action in actions:
            if isinstance(action, Copy):
                assert action.to not in dropped
                live[action.to] = ReplicaFacts(action.to, kind_of[action.to])
            else:
                dropped.add(action.tier)
                del live[action.tier]
        facts = dataclasses.replace(facts, replicas=tuple(live.values()))
    pytest.fail(f"still deciding {decide(policy, facts, free)}")
