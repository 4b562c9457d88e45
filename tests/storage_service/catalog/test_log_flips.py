"""What a killed daemon has committed is there, or the start says that it is not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from forebay_server.catalog.engine import Catalog, sqlite_url
from forebay_server.catalog.queries_settings import get_setting, put_setting
from forebay_server.catalog.wal import find_loss, log_path, mark_path
from forebay_wire.errors import IntegrityError

NUM_COMMITS = 12
NUM_FLIPS = 150

Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a kill leaves it: with a log, and a mark that says how far it goes."""
    folder = tmp_path_factory.mktemp("killed")
    path = folder / "here" / "catalog.sqlite"
    path.parent.mkdir()
    catalog = Catalog.open(sqlite_url(path))
    for number in range(NUM_COMMITS):
        catalog.write_now(
            lambda connection, number=number: put_setting(connection, f"n{number}", "x" * 500)
        )
    shutil.copytree(path.parent, folder / "killed")
    catalog.close()
    assert not mark_path(path).exists(), "a closed catalog needs no mark"
    return folder / "killed"


@pytest.fixture
def left(killed: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a fresh copy of it; the catalog's path."""

    def make() -> Path:
        shutil.rmtree(tmp_path / "left", ignore_errors=True)
        shutil.copytree(killed, tmp_path / "left")
        (tmp_path / "left" / "catalog.sqlite-shm").unlink()
        return tmp_path / "left" / "catalog.sqlite"

    return make


def num_found(path: Path) -> int:
    """The commits that a catalog opened now has."""
    catalog = Catalog.open(sqlite_url(path))
    try:
        return catalog.read_now(
            lambda connection: sum(
                get_setting(connection, f"n{number}") == "x" * 500 for number in range(NUM_COMMITS)
            )
        )
    finally:
        catalog.close()


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_all_commits_are_there_after_a_kill(left: Callable[[], Path]) -> None:
    path = left()
    assert num_found(path) == NUM_COMMITS
    assert num_found(path) == NUM_COMMITS
    assert not mark_path(path).exists()


def test_a_kill_before_the_first_commit_is_marked_is_no_loss(tmp_path: Path) -> None:
    for number in range(8):  # what a log that is begun anew is told by is random
        place = tmp_path / f"{number}"
        place.mkdir()
        path = place / "catalog.sqlite"
        Catalog.open(sqlite_url(path)).close()
        catalog = Catalog.open(sqlite_url(path))
        catalog.write_now(lambda connection: get_setting(connection, "nothing"))
        mark = mark_path(path).read_bytes()
        catalog.write_now(lambda connection: put_setting(connection, "n0", "x" * 500))
        killed = tmp_path / f"{number}-killed"
        shutil.copytree(place, killed)
        mark_path(killed / path.name).write_bytes(mark)  # as a kill right after the commit
        catalog.close()
        assert find_loss(killed / path.name) is None
        assert num_found(killed / path.name) == 1


def test_no_flip_in_the_log_loses_a_commit_unseen(left: Callable[[], Path]) -> None:
    sweep(left, NUM_FLIPS)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_no_flip_of_any_byte_of_the_log_loses_a_commit_unseen(left: Callable[[], Path]) -> None:
    sweep(left, 10**9)


def sweep(left: Callable[[], Path], number: int) -> None:
    num_bytes = log_path(left()).stat().st_size
    num_refused = 0
    for position in range(0, num_bytes, max(1, num_bytes // number)):
        path = left()
        flip(log_path(path), position, position % 8)
        try:
            found = num_found(path)
        except IntegrityError:
            assert log_path(path).exists(), "what is refused is left as it is"
            num_refused += 1
        else:
            assert found == NUM_COMMITS, f"byte {position}"
    assert num_refused > num_bytes / max(1, num_bytes // number) * 0.9


def test_no_flip_in_the_mark_does_harm(left: Callable[[], Path]) -> None:
    for position in range(mark_path(left()).stat().st_size):
        path = left()
        flip(mark_path(path), position, position % 8)
        assert num_found(path) == NUM_COMMITS


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: log_path(path).unlink(),
        lambda path: log_path(path).write_bytes(b""),
        lambda path: log_path(path).write_bytes(log_path(path).read_bytes()[:-1]),
        lambda path: log_path(path).write_bytes(log_path(path).read_bytes()[:-9000]),
    ],
    ids=["gone", "empty", "short by a byte", "short by commits"],
)
def test_a_log_that_lost_its_end_is_refused(left: Callable[[], Path], harm: Harm) -> None:
    path = left()
    harm(path)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"has lost commits .*`forebay recover`"):
            num_found(path)


def test_without_a_mark_the_log_itself_tells_but_for_its_last_commit(
    left: Callable[[], Path],
) -> None:
    """As after a power loss, which may leave an old mark, or none."""
    num_bytes = log_path(left()).stat().st_size
    frame_bytes = 4096 + 24
    num_unseen = 0
    for position in range(32 + 7, num_bytes, frame_bytes):
        path = left()
        mark_path(path).unlink()
        flip(log_path(path), position + 2000, 3)
        if find_loss(path) is None:
            num_unseen += 1
            assert num_found(path) == NUM_COMMITS - 1
    assert 0 < num_unseen <= 4, "only frames of the last commit"


def test_a_torn_commit_that_nobody_was_told_of_is_no_damage(left: Callable[[], Path]) -> None:
    path = left()
    mark_path(path).unlink()
    log_path(path).write_bytes(log_path(path).read_bytes()[:-1])
    assert num_found(path) == NUM_COMMITS - 1


def test_an_older_mark_refuses_nothing(tmp_path: Path) -> None:
    """The log is begun anew again and again; a power loss may leave a mark of long ago."""
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog.open(sqlite_url(path))
    marks = set()
    for number in range(60):
        catalog.write_now(
            lambda connection, number=number: put_setting(
                connection, f"k{number}", f"{number:02}" * 50000
            )
        )
        marks.add(mark_path(path).read_bytes())
    assert len({mark[8:16] for mark in marks}) > 1, "the log was begun anew"
    for mark in sorted(marks)[::7]:
        mark_path(path).write_bytes(mark)
        assert find_loss(path) is None
    catalog.close()
