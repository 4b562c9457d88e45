"""What every test gets: hypothesis without deadlines, and the marker for programs it needs."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

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
