"""`forebay doctor`: each line a verdict, advice where it is not good, status 1 for a failure."""

import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from forebay.cli import checks
from forebay.cli.checks import Finding
from forebay.cli.exit_codes import ExitCode

EXPECTED = [
    *("python", "packages", "kernel", "sqlite", "open files", "mappings", "memory"),
    *("shared memory", "file system", "space", "fsync", "direct io", "sockets", "daemon"),
]


def test_all_checks_in_order(forebay_command, tmp_path: Path) -> None:
    found = forebay_command("doctor", "--data", tmp_path, "--json").json
    assert [finding["check"] for finding in found] == EXPECTED
    assert {finding["verdict"] for finding in found} <= {"ok", "warn", "fail"}
    assert all(finding["advice"] for finding in found if finding["verdict"] != "ok")


def test_lines_for_people(forebay_command, tmp_path: Path) -> None:
    shown = forebay_command("doctor", "--data", tmp_path)
    for check in EXPECTED:
        assert f" {check}: " in shown.out


def test_nothing_is_left_behind(forebay_command, tmp_path: Path) -> None:
    forebay_command("doctor", "--data", tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []


def test_failure_sets_the_exit_status(
    forebay_command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "space", lambda folder: Finding("space", "fail", "none", "buy"))
    assert forebay_command("doctor", "--data", tmp_path).status == ExitCode.FAILURE


def test_sqlite_explains_the_one_writer() -> None:
    found = checks.sqlite()
    assert found.verdict == "ok"
    assert ("uses one for both" in found.found) == (sqlite3.sqlite_version_info < (3, 51, 3))


def test_low_limit_of_open_files() -> None:
    code = (
        "import resource; from forebay.cli.checks import open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)); print(open_files().verdict)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "warn"
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 512


def test_socket_folder_with_a_long_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    found = checks.sockets(tmp_path)
    assert (found.verdict, "shorter" in found.advice) == ("fail", True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    verdicts = {one.check: one.verdict for one in checks.run_checks(tmp_path)}
    assert verdicts["fsync"] == "fail"
