"""Contenders are told what to do, answer, fail by name, and end with all that they started."""

import importlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MODULE = """
import os, subprocess, sys

class Contender:
    def __init__(self, name, word):
        self.name, self.word = name, word

    def say(self, number):
        print("what a library prints is no answer")
        return {"said": f"{self.name} {self.word} {number}", "parent": os.getppid()}

    def nothing(self):
        pass

    def begin(self):
        return {"pid": subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid}

    def leave(self):
        print("the last words", flush=True)
        os._exit(3)

def make(name, word):
    return Contender(name, word)
"""


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "told.py").write_text(MODULE)
    children = importlib.import_module("children")
    with children.Family("told", ["a", "b"], log=tmp_path / "log", word="says") as made:
        yield made


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_each_answers_for_itself(family: Any) -> None:
    family["a"].send("say", number=1)
    family["b"].send("say", number=2)
    found = [family[name].answer() for name in family]
    assert [one["said"] for one in found] == ["a says 1", "b says 2"]
    assert found[0]["parent"] == found[1]["parent"], "imported once, forked twice"
    assert family["a"].ask("nothing") == {}


def test_an_error_has_the_name_and_the_child_goes_on(family: Any) -> None:
    with pytest.raises(RuntimeError, match="b: TypeError"):
        family["b"].ask("say")
    assert family["b"].ask("say", number=3)["said"] == "b says 3"


def test_one_that_ended_is_named_with_its_last_words(family: Any) -> None:
    family["b"].ask("nothing")
    with pytest.raises(RuntimeError, match=r"a has ended:\n(?s:.*)the last words"):
        family["a"].ask("leave")


def test_what_is_killed_takes_along_what_it_started(family: Any) -> None:
    pids = [family[name].ask("begin")["pid"] for name in family]
    assert not any(is_gone(pid) for pid in pids)
    family.kill()
    deadline = time.monotonic() + 20
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, "something lives on"
        time.sleep(0.01)


def test_who_has_nothing_more_to_do_ends_by_itself(family: Any) -> None:
    pid = family["a"].pid
    os.kill(pid, signal.SIGCONT)  # it lives
    family.stop()
    assert is_gone(pid)
