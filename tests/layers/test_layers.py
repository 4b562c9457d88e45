"""What an install makes importable, and what importing it loads."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"forebay", "forebay_server", "forebay_trainer", "forebay_wire"}
FOLDERS = ("client", "proto", "storage_service", "trainer")

FIND_FOLDERS = f"""
import importlib.util
print([name for name in {FOLDERS!r} if importlib.util.find_spec(name)])
"""

LOADED_BY_IMPORT = """
import sys
import forebay
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"torch", "grpc", "forebay_server"}))
"""


def run_python(code: str, *, cwd: Path, options: tuple[str, ...] = ()) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel built from the working tree, without a network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], timeout=300, check=True)
    (built,) = tmp_path.glob("forebay-*.whl")
    return built


def test_folder_names_are_not_importable_from_another_folder(tmp_path: Path) -> None:
    assert run_python(FIND_FOLDERS, cwd=tmp_path) == "[]"


def test_import_forebay_loads_neither_torch_nor_grpc_nor_the_server(tmp_path: Path) -> None:
    assert run_python(LOADED_BY_IMPORT, cwd=tmp_path) == "[]"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_each_package_says_that_it_is_typed(package: str) -> None:
    (marker,) = ROOT.glob(f"*/{package}/py.typed")
    assert marker.is_file()


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.slow
def test_wheel_holds_exactly_the_four_packages_at_its_top(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES


@pytest.mark.slow
def test_folder_names_are_not_importable_from_an_installed_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -I -S: neither the current folder nor the editable install of this environment is on the path.
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{FIND_FOLDERS}"
    assert run_python(code, cwd=tmp_path, options=("-I", "-S")) == "[]"
    code += f"print(all(importlib.util.find_spec(name) for name in {sorted(PACKAGES)!r}))"
    assert run_python(code, cwd=tmp_path, options=("-I", "-S")) == "[]\nTrue"
