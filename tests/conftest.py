"""What every test gets: hypothesis without deadlines, and the marker for programs it needs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from forebay_server.catalog.engine import sqlite_url
from forebay_server.testing.daemon import DaemonProcess
from forebay_server.testing.postgresql import PostgresqlServer
from forebay_server.testing.s3 import S3Bucket, missing_s3, open_bucket
from forebay_server.testing.warm import WarmPython

# Debian keeps these off PATH.
EXTRA_FOLDERS = ("/usr/sbin", "/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin")))

# A shared machine makes single examples slow by chance; the timeout of the test bounds the whole.
settings.register_profile("forebay", deadline=None, print_blob=True)
settings.load_profile("forebay")


def _missing_programs(marker: pytest.Mark) -> list[str]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *EXTRA_FOLDERS])
    return [program for program in marker.args if shutil.which(program, path=path) is None]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose programs are missing; where CI=true, fail it: there they must exist."""
    for marker in item.iter_markers("needs"):
        missing = _missing_programs(marker)
        if not missing:
            continue
        package = marker.kwargs.get("package")
        reason = f"needs {', '.join(missing)}" + (f" (Debian package {package})" if package else "")
        if os.environ.get("CI") == "true":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def warm_server() -> Iterator[WarmPython]:
    """Daemons, and other programs, fork from a process that has imported the server: the tests
    start some hundreds."""
    with WarmPython("forebay_server.cli") as warm:
        DaemonProcess.warm = warm
        yield warm
        DaemonProcess.warm = None


WITH_TORCH = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "torch._dynamo",  # a wrapped model imports it
    "forebay.checkpoint",
    "forebay.dataset.stream",
    "pytest",
)


@pytest.fixture(scope="session")
def warm_torch() -> Iterator[WarmPython]:
    """Starts programs that use torch, whose import takes three seconds of a core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with WarmPython(*WITH_TORCH, environment=environment) as warm:
        yield warm


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresqlServer]:
    """A PostgreSQL server for all tests of this process."""
    with PostgresqlServer() as server:
        yield server


CATALOGS = (
    "sqlite",
    pytest.param("postgresql", marks=pytest.mark.needs("initdb", "postgres", package="postgresql")),
)


@pytest.fixture(params=CATALOGS)
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a catalog that does not exist yet: each test runs on both engines."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "catalog.sqlite")
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    return server.empty_database()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Bucket]:
    """A bucket on a real S3 server, one for all tests of this process."""
    missing = missing_s3()
    if missing is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    with open_bucket(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket
