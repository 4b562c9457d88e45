"""The command line, run in this process: what it prints and how it ends."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from forebay.cli import main


@dataclass(frozen=True)
class Ended:
    """One command's end."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def forebay_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ended]:
    """Runs ``forebay ARGUMENTS``."""
    for name in ("FOREBAY_ADDRESS", "FOREBAY_DATA"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ended(int(ended.value.code or 0), printed.out, printed.err)

    return run
