"""Shakespeare's works as passages: what the recipes of language models prepare alike."""

from __future__ import annotations

import re
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import pyarrow as pa

from forebay_trainer.preparation import SPLIT, TRAIN, Preparation
from forebay_trainer.preparation.sources import SHAKESPEARE
from forebay_wire.errors import InvalidRequest

WORK: Final = "work"
"""Column: the name of the play or poem that a row is of, by which splits are drawn."""

TEST_WORKS: Final = ("henry_v", "macbeth", "twelfth_night")
"""A history, a tragedy and a comedy."""

FOLDER: Final = "shksprdata/texts"
"""Of the archive, which has texts of others, too."""

MODERN: Final = "_gut.txt"
"""How the files of the archive end that have today's spelling; those of the folio: _gut_f.txt."""

LONG_PASSAGE: Final = 100
"""Characters from which on a repeated passage is a copy, and not, as "Exeunt.", a part of the text
in its own right."""

_BEFORE: Final = re.compile(r"\A.*?^\*+ ?(?:START OF|END\*? ?THE SMALL PRINT)[^\n]*\n", re.S | re.M)
_AFTER: Final = re.compile(
    r"^\s*(?:\*+ ?END OF|End of (?:the |this )?Project Gutenberg).*", re.S | re.M
)
_ORNAMENT: Final = re.compile(r"^(?:[\s_*=-]+|\s*THE END\.?\s*)$", re.M)
_SPELLINGS: Final = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "`": "'", "\t": " "}  # noqa: RUF001
)


class Shakespeare(Preparation):
    """One chunk a work, of rows work, text and split; tokens are the subclass's part."""

    sources = (SHAKESPEARE,)
    unique = "key"

    def __init__(self, source: str | None, test_works: Sequence[str]) -> None:
        """*source*: the package's archive, or a folder of .txt files. *test_works*: their names;
        with none of them the splits are drawn, by works."""
        self._source = source
        self._test_works = test_works

    def read(self) -> Iterator[pa.Table]:
        texts = dict(read_works(SHAKESPEARE.find(self._source)))
        unknown = [name for name in self._test_works if name not in texts]
        if unknown:
            raise InvalidRequest(
                f"prepare.test_works: no work {', '.join(unknown)}; there are: {', '.join(texts)}"
            )
        for name, text in texts.items():
            rows = {WORK: [name], "group": [name], "text": [text]}
            if self._test_works:
                rows[SPLIT] = ["test" if name in self._test_works else TRAIN]
            yield pa.table(rows)

    def clean(self, rows: pa.Table) -> pa.Table:
        return _with_texts(rows, [without_frame(text) for text in rows["text"].to_pylist()])

    def normalise(self, rows: pa.Table) -> pa.Table:
        found = [passages(text) for text in rows["text"].to_pylist()]
        numbers = [number for number, each in enumerate(found) for _ in each]
        texts = [text for each in found for text in each]
        grown = _with_texts(rows.take(pa.array(numbers, pa.int64())), texts)
        places = zip(grown[WORK].to_pylist(), texts, range(len(texts)), strict=True)
        keys = [
            f"{work} {place}" if len(text) < LONG_PASSAGE else text for work, text, place in places
        ]
        return grown.append_column("key", pa.array(keys, pa.string()))


def read_works(path: Path) -> Iterator[tuple[str, str]]:
    """Names and texts, in order of the names, of the archive or of a folder's .txt files."""
    if path.is_dir():
        for text in sorted(path.glob("*.txt")):
            yield text.stem, text.read_text(encoding="utf-8", errors="replace")
        return
    with tarfile.open(path) as archive:
        places = (PurePosixPath(name) for name in archive.getnames())
        modern = [each for each in places if each.name.endswith(MODERN)]
        for place in sorted(each for each in modern if each.parent.match(FOLDER)):
            file = archive.extractfile(str(place))
            assert file is not None
            yield place.name.removesuffix(MODERN), file.read().decode("utf-8", errors="replace")


def without_frame(text: str) -> str:
    """Without what Project Gutenberg puts around a work, rules, and "THE END"."""
    text = text.replace("\r\n", "\n").lstrip("\N{BYTE ORDER MARK}")
    return _ORNAMENT.sub("", _AFTER.sub("", _BEFORE.sub("", text, count=1), count=1))


def passages(text: str) -> list[str]:
    """What blank lines separate: speeches, stanzas, stage directions. Typewriter's quotes and
    dashes, one space at a time, none at the ends of lines."""
    text = unicodedata.normalize("NFKC", text.translate(_SPELLINGS))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    found = re.split(r"\n\n+", "\n".join(lines))
    return [each.strip("\n") for each in found if each.strip("\n")]


def works(rows: pa.Table) -> Iterator[tuple[str, str, list[str]]]:
    """Work, split and the passages of each work in a chunk, in their order."""
    columns = [rows[name].to_pylist() for name in (WORK, SPLIT, "text")]
    found: dict[tuple[str, str], list[str]] = {}
    for work, split, text in zip(*columns, strict=True):
        found.setdefault((work, split), []).append(text)
    for (work, split), texts in found.items():
        yield work, split, texts


def _with_texts(rows: pa.Table, texts: Sequence[str]) -> pa.Table:
    place = rows.column_names.index("text")
    return rows.set_column(place, "text", pa.array(texts, pa.string()))
