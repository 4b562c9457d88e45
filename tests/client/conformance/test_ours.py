"""Our loaders keep every promise of the kit, alone and inside others, on a real daemon."""

import pytest
from environment import daemon_environment

from forebay.testing.conformance import Subject, check_loader
from forebay.testing.conformance.__main__ import main
from forebay.testing.conformance.ours import our_adapters

pytestmark = [
    # Workers are forked beside threads on purpose, and more of them than there are cores.
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's
]

NEEDS_PROCESSES = "a_killed_worker_is_not_silent"
BETWEEN_PROCESSES = [
    "epoch_is_whole",
    "further_epochs_are_whole",
    "resumes_at_every_step",
    "resumes_again_and_again",
    NEEDS_PROCESSES,
    "damage_is_noticed",
]
METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with daemon_environment(tmp_path_factory.mktemp("node"), num_samples=83) as made:
        yield made


def check(environment, loader, *, seed=0, only=(), shapes=None, **options):
    adapter = our_adapters(environment.client, environment.name, **options)[loader]
    report = check_loader(Subject(adapter, environment, **(shapes or {})), seed=seed, only=only)
    report.check()
    return {one.promise for one in report.outcomes if one.verdict == "not tested"}


def test_the_loader_keeps_every_promise(environment):
    assert check(environment, "DataLoader") == {NEEDS_PROCESSES}  # its workers are threads


def test_workers_in_another_loader_keep_promises(environment):
    loader = "torchdata fork persistent"
    assert check(environment, loader, only=BETWEEN_PROCESSES) == set()


@pytest.mark.parametrize(
    ("loader", "promise"),
    [
        ("torch spawn", "workers_do_not_matter"),
        ("torch forkserver persistent", "further_epochs_are_whole"),
        ("torchdata forkserver", "resumes_with_other_workers"),
    ],
)
def test_workers_of_new_processes_keep_promises(environment, loader, promise):
    """One of each, since each worker imports torch; all of all are slow tests."""
    small = {"world_sizes": (1,), "num_workers": (0, 1)}
    assert check(environment, loader, only=[promise], shapes=small) == set()


def test_the_command_checks_a_daemon(environment, capsys):
    assert main(["--data", str(environment.client.address.folder), "--only", "epoch_is_whole"]) == 0
    assert "1 kept, 0 broken" in capsys.readouterr().out
    assert "conformance-of-loaders" not in environment.client.datasets()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["local", "http"])
@pytest.mark.parametrize("is_remote", [True, False], ids=["two-copies", "one-copy"])
@pytest.mark.parametrize("options", [{}, {"last_batch": "pad"}, {"shuffle": "block"}], ids=str)
@pytest.mark.parametrize("loader", ["DataLoader", "torch fork", "torchdata fork persistent"])
def test_every_promise_in_every_way(tmp_path, monkeypatch, way, is_remote, options, loader):
    if way == "http":
        monkeypatch.setenv("FOREBAY_NO_LOCAL", "1")
    with daemon_environment(tmp_path, is_remote=is_remote) as environment:
        for seed in range(1, 4):
            untested = check(environment, loader, seed=seed, **options)
            assert untested <= {NEEDS_PROCESSES}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("persistent", ["", " persistent"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["torch", "torchdata"])
def test_every_promise_with_every_start_method(environment, kind, method, persistent):
    shapes = {} if method == "fork" else {"world_sizes": (1, 2), "num_workers": (0, 1)}
    untested = check(environment, f"{kind} {method}{persistent}", seed=2, shapes=shapes)
    assert untested == set()
