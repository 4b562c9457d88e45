"""fsspec's own tests of reading file systems, over trees that are committed as generations."""

from collections.abc import Callable, Iterator
from hashlib import md5
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests, AbstractOpenTests

import forebay
from forebay.fs import ForebayFileSystem
from forebay_server.testing.daemon import DaemonProcess

from .conftest import commit_state

NESTED = {"subfile1": b"", "subfile2": b"", "nesteddir": {"nestedfile": b""}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "bulk": {"file1": b"", "file2": b"", "subdir": NESTED},
    "edges": {"file1": b"", "file2": b"", "subdir0": NESTED, "subdir1": NESTED},
    "prefix": {"subdir.txt": b"", "subdir": {"subfile.txt": b""}},
    "hashed": {
        f"{md5(b'%d' % i, usedforsecurity=False).hexdigest()}.txt": b"%d" % i for i in range(10)
    },
    "recursive": {"file": b""},
}


@pytest.fixture(scope="session")
def scenarios(daemon: DaemonProcess) -> str:
    """The address of a daemon that has each scenario as the run of that name."""
    rpc = daemon.address()["rpc"]
    with forebay.connect(rpc) as client:
        for name, files in SCENARIOS.items():
            commit_state(client, f"suite-{name}", {"source": files})
    return str(rpc)


class Fixtures(AbstractFixtures):
    """The scenarios of the suite, there already instead of made, and not removed."""

    @pytest.fixture
    def fs(self, scenarios: str) -> ForebayFileSystem:
        return ForebayFileSystem(scenarios)

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *names: "/".join(names)

    @pytest.fixture
    def fs_path(self) -> str:
        return "checkpoints"

    @pytest.fixture
    def fs_target(self) -> str:
        return "checkpoints/target"

    @pytest.fixture
    def fs_bulk_operations_scenario_0(self) -> str:
        return source("bulk")

    @pytest.fixture
    def fs_glob_edge_cases_files(self) -> str:
        return source("edges")

    @pytest.fixture
    def fs_dir_and_file_with_same_name_prefix(self) -> str:
        return source("prefix")

    @pytest.fixture
    def fs_10_files_with_hashed_names(self) -> str:
        return source("hashed")


def source(scenario: str) -> str:
    return f"checkpoints/suite-{scenario}/1/1/state/source"


class TestGet(Fixtures, AbstractGetTests):
    def test_get_directory_recursive(
        self, fs: ForebayFileSystem, local_fs: LocalFileSystem, local_target: str
    ) -> None:
        """The suite's own makes its tree with mkdir and touch: here it is committed before."""
        folder, target = source("recursive"), str(local_target)
        for path, below in ((folder, "source/file"), (folder + "/", "file")):
            fs.get(path, target, recursive=True)  # into what is not there
            assert local_fs.find(target) == [f"{target}/file"]
            fs.get(path, target, recursive=True)  # into what is there
            assert local_fs.find(target) == sorted({f"{target}/file", f"{target}/{below}"})
            local_fs.rm(target, recursive=True)


class TestOpen(Fixtures, AbstractOpenTests):
    @pytest.mark.skip(reason="exclusive creation is writing, and only a commit makes files here")
    def test_open_exclusive(self) -> None: ...


@pytest.fixture(autouse=True)
def _instances() -> Iterator[None]:
    """fsspec keeps local file systems; nothing of ours may be among what it keeps."""
    yield
    assert not ForebayFileSystem._cache
