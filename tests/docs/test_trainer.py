"""docs/trainer.md lists every key of the trainer's configuration as the code declares it."""

import re
from pathlib import Path

from forebay_trainer.config import keys
from forebay_trainer.settings import TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"


def table():
    """The rows that the page must have, in order."""
    return [
        f"| `{key.name}` | {key.type} | `{key.default}` | {key.meaning} |"
        for key in keys(TrainConfig)
    ]


def test_every_key_is_listed_with_its_default_and_meaning():
    section = PAGE.read_text(encoding="utf-8").split("\n## Keys\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `.*$", section, flags=re.MULTILINE) == table()
