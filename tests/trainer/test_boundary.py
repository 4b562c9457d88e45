"""Two files of the trainer know the service; the rest could train from anywhere."""

import ast
from pathlib import Path

import forebay_trainer

PACKAGE = Path(forebay_trainer.__file__).parent
KNOW_THE_SERVICE = {"data.py", "checkpoint.py"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_only_two_files_import_the_client():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "forebay" for name in imported(path))
    }
    assert {each for each in found if not each.startswith("demo/")} == KNOW_THE_SERVICE


def test_the_loop_can_be_read_at_a_sitting():
    assert len((PACKAGE / "loop.py").read_text(encoding="utf-8").splitlines()) < 200
