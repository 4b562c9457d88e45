"""A volume out of service: nothing new goes there, what is there is not condemned."""

import errno
from pathlib import Path

import pytest

from forebay_server.model.health import MAX_DEVICE_ERRORS, PROBES_TO_RETURN
from forebay_server.testing.faults import FaultyTier
from forebay_server.tier.directory import DirectoryTier
from forebay_server.tier.health import GuardedTier
from forebay_server.tier.remote import RemoteTier
from forebay_server.tier.store import HEALTHY, Tier
from forebay_wire.errors import IntegrityError, InvalidRequest, StorageError
from forebay_wire.ids import new_random_name


@pytest.fixture
def faulty(tmp_path: Path) -> FaultyTier:
    tier = FaultyTier(DirectoryTier("ssd", "ssd", tmp_path, reserve_bytes=0))
    tier.open()
    return tier


def take_out(tier: GuardedTier, faulty: FaultyTier, code: int = errno.EROFS) -> None:
    faulty.fail("create", code=code)
    with pytest.raises(StorageError):
        tier.put(new_random_name(), b"data")


def test_a_volume_that_turned_read_only_takes_nothing_and_says_why(faulty: FaultyTier) -> None:
    events: list[tuple[str, bool]] = []
    tier = GuardedTier(faulty, lambda name, in_service, reason: events.append((name, in_service)))
    name = new_random_name()
    tier.put(name, b"kept")
    take_out(tier, faulty)
    assert tier.health.startswith("out of service: ")
    calls = faulty.calls["create"]
    with pytest.raises(StorageError, match="out of service"):
        tier.create(new_random_name(), 1)
    assert faulty.calls["create"] == calls, "the volume was asked again"
    assert tier.get(name) == b"kept"
    assert events == [("ssd", False)]


def test_a_probe_brings_it_back_and_leaves_nothing(faulty: FaultyTier) -> None:
    events: list[tuple[str, bool]] = []
    tier = GuardedTier(faulty)
    tier.listen(lambda name, in_service, reason: events.append((name, in_service)))
    take_out(tier, faulty)
    faulty.fail("publish", code=errno.EROFS)
    assert not tier.probe()
    assert tier.probe()
    assert tier.health == HEALTHY
    assert list(tier.list()) == []
    assert events == [("ssd", False), ("ssd", True)]
    tier.put(new_random_name(), b"data")


def test_after_device_errors_one_good_probe_is_not_enough(faulty: FaultyTier) -> None:
    tier = GuardedTier(faulty)
    for _ in range(MAX_DEVICE_ERRORS):
        take_out(tier, faulty, errno.EIO)
    assert tier.health != HEALTHY
    assert [tier.probe() for _ in range(PROBES_TO_RETURN)] == [False] * (PROBES_TO_RETURN - 1) + [
        True
    ]


def test_a_read_error_is_damage_in_service_and_no_verdict_out_of_it(faulty: FaultyTier) -> None:
    tier = GuardedTier(faulty)
    name = new_random_name()
    tier.put(name, b"data")
    faulty.fail("read", code=errno.EIO)
    with pytest.raises(IntegrityError):
        tier.get(name)
    take_out(tier, faulty)
    faulty.fail("read", code=errno.EIO)
    with pytest.raises(StorageError):
        tier.get(name)
    assert tier.get(name) == b"data"


UNREACHABLE = errno.EHOSTUNREACH


def test_a_store_that_answers_nothing_twice_is_out_until_one_probe_is_good(
    faulty: FaultyTier,
) -> None:
    tier = GuardedTier(faulty)
    tier.put(new_random_name(), b"data")
    faulty.fail("head", 2, code=UNREACHABLE)
    assert not tier.ask()
    assert tier.health == HEALTHY
    assert not tier.answers(), "it may be away, and is not asked again on the way"
    assert faulty.calls["head"] == 1
    assert not tier.ask()
    assert tier.health.startswith("out of service: ")
    assert not tier.answers()
    assert tier.probe()
    assert tier.answers()


def test_an_answer_ends_the_doubt(faulty: FaultyTier) -> None:
    tier = GuardedTier(faulty)
    for _ in range(3):
        faulty.fail("head", code=UNREACHABLE)
        assert not tier.ask()
        assert tier.ask()
        assert tier.answers()
    assert tier.health == HEALTHY


def test_a_tier_that_has_just_answered_is_not_asked_again(faulty: FaultyTier) -> None:
    seconds = [0.0]
    tier = GuardedTier(faulty, clock=lambda: seconds[0])
    tier.put(new_random_name(), b"data")
    assert tier.answers()
    assert faulty.calls["head"] == 0
    seconds[0] += 60
    faulty.fail("head", code=errno.ENODEV)
    assert not tier.answers()
    assert tier.health != HEALTHY


def test_a_place_that_was_never_measured_has_no_room_while_it_is_away(tmp_path: Path) -> None:
    folder = tmp_path / "object"
    tier = GuardedTier(RemoteTier("object", f"file://{folder}"))
    tier.open()
    folder.rename(tmp_path / "away")
    with pytest.raises(StorageError, match="is away"):
        tier.head("data/x")
    with pytest.raises(StorageError, match="is away"):
        list(tier.list())
    assert tier.space().free_bytes == 0
    assert "is away" in tier.health


class StoreAway(RemoteTier):
    """Answers nothing at first."""

    is_up = False

    def open(self) -> None:
        if not self.is_up:
            cause = OSError(errno.EHOSTUNREACH, "no route to host")
            raise StorageError(f"tier {self.name} failed: 6 tries") from cause
        super().open()


def test_a_store_that_is_away_is_opened_later_and_confirmed_before_it_serves(
    tmp_path: Path,
) -> None:
    store = StoreAway("object", f"file://{tmp_path}")
    with pytest.raises(StorageError, match="6 tries"):
        GuardedTier(store).open()
    tier = GuardedTier(store, may_be_away=True)
    tier.open()
    assert "6 tries" in str(tier.absence)
    assert "6 tries" in tier.health
    assert tier.space().free_bytes == 0
    with pytest.raises(StorageError, match="out of service"):
        tier.create("data/x", 1)
    assert not tier.probe()

    def refuse(found: Tier) -> None:
        assert list(found.list()) == []
        for use in (tier.get, tier.head, tier.delete):  # by others, meanwhile
            with pytest.raises(StorageError, match="out of service"):
                use("data/x")
        raise InvalidRequest("it is another store")

    tier.confirm = refuse
    store.is_up = True
    for _ in range(2):
        assert not tier.probe()
        assert tier.health == "out of service: it is another store"
        with pytest.raises(StorageError):
            tier.get("data/x")
    confirmed: list[Tier] = []
    tier.confirm = confirmed.append
    assert tier.probe()
    assert confirmed == [store]
    assert (tier.health, tier.absence) == (HEALTHY, None)
    tier.put("data/x", b"kept")
    assert tier.get("data/x") == b"kept"
