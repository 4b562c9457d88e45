"""Sentences with named entities in columns, as CoNLL-2003 has them (Tjong Kim Sang, De Meulder).

A line is a word: its first column is the word, its last one the tag. Columns are parted by tabs, or
by spaces where a line has no tab; an empty line ends a sentence, ``-DOCSTART-`` begins a document.
A tag is ``O``, or ``B-`` or ``I-`` with the type of an entity.

IOB1 begins an entity with ``I-``, and with ``B-`` only right after one of the same type; IOB2
begins every one with ``B-``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from forebay_wire.errors import InvalidRequest

OUTSIDE: Final = "O"
DOCUMENT: Final = "-DOCSTART-"

Scheme = Literal["IOB1", "IOB2"]


@dataclass(frozen=True)
class Sentence:
    words: tuple[str, ...]
    tags: tuple[str, ...]
    document: int
    """Its number, from 0; all 0 in a file without ``-DOCSTART-``."""


def read_sentences(lines: Iterable[str], origin: str) -> Iterator[Sentence]:
    """The sentences of a file; InvalidRequest names *origin* and the line of what is no row."""
    words: list[str] = []
    tags: list[str] = []
    document = -1
    for number, line in enumerate(itertools.chain(lines, [""]), start=1):
        text = line.rstrip("\r\n")
        if not text.strip():
            if words:
                yield Sentence(tuple(words), tuple(tags), max(0, document))
            words, tags = [], []
        elif text.startswith(DOCUMENT):
            document += 1
        else:
            word, tag = _columns(text, f"{origin}, line {number}")
            words.append(word)
            tags.append(tag)


def _columns(text: str, place: str) -> tuple[str, str]:
    columns = text.split("\t") if "\t" in text else text.split()
    if len(columns) < 2:
        raise InvalidRequest(
            f"{place}: {text!r} has one column; at least a word and its tag are needed"
        )
    tag = columns[-1].strip()
    prefix, dash, kind = tag.partition("-")
    if tag != OUTSIDE and not (prefix in ("B", "I") and dash and kind):
        raise InvalidRequest(
            f"{place}: tag {tag!r} is neither O nor B-TYPE or I-TYPE; rewrite the file in IOB1 or "
            "IOB2"
        )
    return columns[0], tag


def scheme_of(sentences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme of the tags of many sentences: how most entities begin that follow no other one of
    their type, for files have slips. Tags without entities count as IOB2."""
    num_inside = num_begun = 0
    for tags in sentences:
        before = OUTSIDE
        for tag in tags:
            if tag != OUTSIDE and before[2:] != tag[2:]:
                num_inside += tag.startswith("I-")
                num_begun += tag.startswith("B-")
            before = tag
    return "IOB1" if num_inside > num_begun else "IOB2"


def to_iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2: also of tags of IOB1, and of ``I-`` where an entity begins, which
    either scheme's readers take for its beginning."""
    found, before = [], OUTSIDE
    for tag in tags:
        begins = tag.startswith("I-") and before[2:] != tag[2:]
        found.append(f"B-{tag[2:]}" if begins else tag)
        before = tag
    return found
