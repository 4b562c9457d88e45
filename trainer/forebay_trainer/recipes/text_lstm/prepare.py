"""Texts with classes: WordNet's glosses, or sentences that people rated."""

from __future__ import annotations

import html
import io
import itertools
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay_trainer.config import setting
from forebay_trainer.preparation import Preparation
from forebay_trainer.preparation.sources import VADER, WORDNET
from forebay_wire.errors import InvalidRequest

CHUNK_LINES: Final = 4000

PADDING: Final = 0
UNKNOWN: Final = 1
SPECIAL_WORDS: Final = ("<padding>", "<unknown>")

# In the order of the numbers in WordNet's data files; lexnames(5WN) lists them.
LEXICOGRAPHER_FILES: Final = (
    *("adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact"),
    *("noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event"),
    *("noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object"),
    *("noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process"),
    *("noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time"),
    *("verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition"),
    *("verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion"),
    *("verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather"),
    "adj.ppl",
)
WORDNET_FILES: Final = ("data.noun", "data.verb", "data.adj", "data.adv")

MOODS: Final = ("negative", "neutral", "positive")
# Typographic quotes and the grave accent.
QUOTES: Final = {0x2018: "'", 0x2019: "'", 0x60: "'", 0x201C: '"', 0x201D: '"'}

RATED: Final = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATED_FILES: Final = "_GroundTruth.txt"


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str | None = setting(None, "file or folder; none: where `--fetch` puts it")
    corpus: Literal["glosses", "ratings"] = setting("glosses", "what the texts are")
    neutral_below: float = setting(
        0.5, "of ratings: a mean this far from 0 is positive or negative; they go from -4 to 4"
    )
    num_words: int = setting(20_000, "in the vocabulary, the most frequent ones, at most")
    min_count: int = setting(2, "rarer words of the training texts are unknown ones")
    max_tokens: int = setting(64, "of a text; what comes after them is cut off")
    num_copies: int = setting(0, "of each training text that are added, some words unknown in each")
    unknown_share: float = setting(0.1, "of the words of a copy that become unknown")

    def __post_init__(self) -> None:
        for name in ("num_words", "min_count", "max_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_copies < 0:
            raise InvalidRequest(f"num_copies must be at least 0, not {self.num_copies}")
        if not 0 <= self.unknown_share <= 1:
            raise InvalidRequest(f"unknown_share must be from 0 to 1, not {self.unknown_share}")


def prepare(config: Config) -> Preparation:
    return Glosses(config) if config.corpus == "glosses" else Ratings(config)


class Texts(Preparation):
    """What both have in common. Rows have the columns ``text`` and ``label`` from `clean` on."""

    schema: ClassVar = {"tokens": "list[int32]", "label": "int64"}
    unique = "text"
    classes: Sequence[str]

    def __init__(self, config: Config) -> None:
        self.config = config

    def normalise(self, rows: pa.Table) -> pa.Table:
        return with_column(rows, "text", [normalised(text) for text in rows["text"].to_pylist()])

    def learn(self, rows: Iterable[pa.Table]) -> Mapping[str, Any]:
        texts = (text for chunk in rows for text in chunk["text"].to_pylist())
        words = vocabulary(texts, self.config.num_words, self.config.min_count)
        return {"words": words, "classes": list(self.classes)}

    def tokenise(self, rows: pa.Table, learnt: Mapping[str, Any]) -> pa.Table:
        numbers = {word: number for number, word in enumerate(learnt["words"])}
        tokens = [
            [numbers.get(word, UNKNOWN) for word in words_of(text)[: self.config.max_tokens]]
            for text in rows["text"].to_pylist()
        ]
        return with_column(rows, "tokens", pa.array(tokens, pa.list_(pa.int32())))

    def augment(
        self, rows: pa.Table, learnt: Mapping[str, Any], random: np.random.Generator
    ) -> pa.Table:
        tokens = rows["tokens"].combine_chunks()
        copies = [
            with_column(rows, "tokens", with_unknowns(tokens, self.config.unknown_share, random))
            for _ in range(self.config.num_copies)
        ]
        return pa.concat_tables([rows, *copies])


class Glosses(Texts):
    """What WordNet says of a set of synonyms; the class is the file that its lexicographers had it
    in: a part of speech, and of nouns and verbs what they are about."""

    sources = (WORDNET,)
    classes = LEXICOGRAPHER_FILES

    def read(self) -> Iterator[pa.Table]:
        folder = WORDNET.find(self.config.source)
        for name in WORDNET_FILES:
            with (folder / name).open(encoding="utf-8", errors="replace") as lines:
                for chunk in chunks(lines):
                    yield pa.table({"line": chunk})

    def clean(self, rows: pa.Table) -> pa.Table:
        found = [gloss_of(line) for line in rows["line"].to_pylist()]
        kept = [each for each in found if each is not None]
        return pa.table(
            {
                "text": pa.array([text for text, _ in kept], pa.string()),
                "label": pa.array([label for _, label in kept], pa.int64()),
            }
        )


class Ratings(Texts):
    """Sentences of reviews, news and tweets with the mean of twenty people's ratings (Hutto and
    Gilbert, 2014). Sentences of one review or article go to the same split."""

    sources = (VADER,)
    classes = MOODS

    def read(self) -> Iterator[pa.Table]:
        for name, content in rated_files(VADER.find(self.config.source)):
            lines = io.StringIO(content.decode("utf-8", errors="replace"), newline=None)
            for chunk in chunks(lines):
                yield pa.table({"line": chunk, "file": [name] * len(chunk)})

    def clean(self, rows: pa.Table) -> pa.Table:
        pairs = zip(rows["line"].to_pylist(), rows["file"].to_pylist(), strict=True)
        found = [rated(line, file) for line, file in pairs]
        kept = [each for each in found if each is not None]
        moods = [mood(rating, self.config.neutral_below) for _, rating, _ in kept]
        return pa.table(
            {
                "text": pa.array([text for text, _, _ in kept], pa.string()),
                "label": pa.array(moods, pa.int64()),
                "group": pa.array([group for _, _, group in kept], pa.string()),
            }
        )


# Lines of the corpora.


def gloss_of(line: str) -> tuple[str, int] | None:
    """Definition and lexicographer file of a line of a data file (wndb(5WN)); None for a line of
    the licence, and for a gloss that is examples only. Examples, which are quoted, are left out:
    they show the word itself in use."""
    head, bar, gloss = line.partition("|")
    fields = head.split()
    if line.startswith(" ") or not bar or len(fields) < 2 or not fields[1].isdecimal():
        return None
    text = re.split(r';\s*"', gloss, maxsplit=1)[0].strip()
    label = int(fields[1])
    if not text or text.startswith('"') or label >= len(LEXICOGRAPHER_FILES):
        return None
    return text, label


def rated(line: str, file: str) -> tuple[str, float, str] | None:
    """Text, mean rating and group of a line ``ID<tab>RATING<tab>TEXT``; None for a broken one.

    An id like ``12_3`` is the third sentence of text 12; any other one is a text of its own.
    """
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 3 or not fields[2].strip():
        return None
    try:
        rating = float(fields[1])
    except ValueError:
        return None
    return (
        (fields[2], rating, f"{file}/{fields[0].partition('_')[0]}") if -4 <= rating <= 4 else None
    )


def mood(rating: float, neutral_below: float) -> int:
    """Which of `MOODS` a mean rating is."""
    if abs(rating) < neutral_below:
        return MOODS.index("neutral")
    return MOODS.index("positive" if rating > 0 else "negative")


def rated_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the rated files, which lie in an archive inside the package's."""
    with tarfile.open(path) as package:
        inner = next(each for each in package if each.name.endswith(RATED))
        file = package.extractfile(inner)
        assert file is not None, "a regular file"
        with tarfile.open(fileobj=io.BytesIO(file.read())) as archive:
            members = [each for each in archive if each.name.endswith(RATED_FILES)]
            for member in sorted(members, key=lambda each: each.name):
                content = archive.extractfile(member)
                assert content is not None, "a regular file"
                yield Path(member.name).name.removesuffix(RATED_FILES), content.read()


# Words.


def normalised(text: str) -> str:
    """Lower case, one form of each character, every digit a 0, single spaces; HTML's characters
    are written out."""
    text = unicodedata.normalize("NFKC", html.unescape(text)).lower()
    text = text.translate(QUOTES)
    return " ".join(re.sub(r"\d", "0", text).split())


def words_of(text: str) -> list[str]:
    """Words with their apostrophe, runs of digits, and every other character for itself."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|0+|[^\w\s]|_", text)


def vocabulary(texts: Iterable[str], num_words: int, min_count: int) -> list[str]:
    """The special words, then the most frequent ones; of equally frequent ones by the alphabet."""
    counts = Counter(itertools.chain.from_iterable(map(words_of, texts)))
    common = [word for word, count in counts.items() if count >= min_count]
    common.sort(key=lambda word: (-counts[word], word))
    return [*SPECIAL_WORDS, *common[:num_words]]


def with_unknowns(tokens: pa.ListArray, share: float, random: np.random.Generator) -> pa.ListArray:
    """The same lists, each token unknown with the probability *share*."""
    values: NDArray[np.int32] = tokens.flatten().to_numpy(zero_copy_only=False)
    changed = np.where(random.random(len(values)) < share, np.int32(UNKNOWN), values)
    lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(changed, pa.int32()))


# Tables.


def chunks(lines: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(lines)
    while chunk := list(itertools.islice(iterator, CHUNK_LINES)):
        yield chunk


def with_column(rows: pa.Table, name: str, values: Any) -> pa.Table:
    if name in rows.column_names:
        return rows.set_column(rows.column_names.index(name), name, pa.array(values))
    return rows.append_column(name, pa.array(values))
