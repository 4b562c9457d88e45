"""The marker `needs`: a test whose program is missing never passes silently."""

from collections.abc import Callable
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"


@pytest.fixture
def set_up(request: pytest.FixtureRequest) -> Callable[[], None]:
    """The hook of the shared conftest, about to run for the test that asks for this."""
    conftest = request.config.pluginmanager.get_plugin(str(CONFTEST))
    return lambda: conftest.pytest_runtest_setup(request.node)


def test_present_program_lets_the_test_run(
    request: pytest.FixtureRequest, set_up: Callable[[], None]
) -> None:
    request.node.add_marker(pytest.mark.needs("sh"))
    set_up()


def test_missing_program_skips_and_names_program_and_package(
    request: pytest.FixtureRequest, set_up: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    request.node.add_marker(pytest.mark.needs("sh", "no-such-program", package="some-package"))
    with pytest.raises(
        pytest.skip.Exception, match=r"needs no-such-program \(Debian package some-package\)"
    ):
        set_up()


def test_missing_program_fails_in_continuous_integration(
    request: pytest.FixtureRequest, set_up: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    request.node.add_marker(pytest.mark.needs("no-such-program"))
    with pytest.raises(pytest.fail.Exception, match="needs no-such-program"):
        set_up()
