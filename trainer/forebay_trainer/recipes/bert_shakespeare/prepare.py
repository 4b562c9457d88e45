"""Shakespeare's works as rows of words and parts of words, some of which are to be told.

Shape letters: N rows, T places of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from forebay_trainer.config import setting
from forebay_trainer.preparation import SPLIT, Preparation
from forebay_trainer.preparation.shakespeare import TEST_WORKS, Shakespeare, works
from forebay_trainer.preparation.tokens import FIRST, LAST, PADDING, Pieces, tokens_of
from forebay_wire.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str | None = setting(
        None, "the archive, or a folder of .txt files; none: where `--fetch` puts it"
    )
    test_works: tuple[str, ...] = setting(
        TEST_WORKS, "works to test on; an empty list: one in ten, drawn"
    )
    vocabulary_size: int = setting(2048, "words and parts of words")
    num_places: int = setting(64, "tokens of a row, its first and last one included")

    def __post_init__(self) -> None:
        if self.num_places < 3:
            raise InvalidRequest(f"num_places must be at least 3, not {self.num_places}")
        if self.vocabulary_size < 100:
            raise InvalidRequest(
                f"vocabulary_size must be at least 100, not {self.vocabulary_size}: every "
                "character has a place in it"
            )


def prepare(config: Config) -> Preparation:
    return Rows(config)


class Rows(Shakespeare):
    def __init__(self, config: Config) -> None:
        super().__init__(config.source, config.test_works)
        self._config = config
        self.schema = {  # type: ignore[misc]  # its shape is a setting
            "tokens": ("int32", (config.num_places,))
        }

    def learn(self, rows: Iterable[pa.Table]) -> Mapping[str, Any]:
        texts = (text for chunk in rows for text in chunk["text"].to_pylist())
        found = Pieces.learn_words(texts, self._config.vocabulary_size)
        sizes = {"vocabulary_size": found.size, "num_places": self._config.num_places}
        return {**found.about(), **sizes}

    def tokenise(self, rows: pa.Table, learnt: Mapping[str, Any]) -> pa.Table:
        tokens, num_places = tokens_of(learnt), learnt["num_places"]
        tables = []
        for _, split, texts in works(rows):
            found = list(packed([tokens.encode(text)[0] for text in texts], num_places - 2))
            tokens_NT = np.full((len(found), num_places), PADDING, np.int32)
            for row, numbers in zip(tokens_NT, found, strict=True):
                row[: len(numbers) + 2] = [FIRST, *numbers, LAST]
            array = pa.FixedShapeTensorArray.from_numpy_ndarray(tokens_NT)
            tables.append(pa.table({"tokens": array, SPLIT: [split] * len(found)}))
        return pa.concat_tables(tables)


def packed(passages: Sequence[Sequence[int]], num_tokens: int) -> Iterator[list[int]]:
    """As many passages together as fit into so many tokens, in their order; one that is longer is
    cut."""
    row: list[int] = []
    for passage in passages:
        for start in range(0, len(passage), num_tokens):
            part = passage[start : start + num_tokens]
            if row and len(row) + len(part) > num_tokens:
                yield row
                row = []
            row = [*row, *part]
    if row:
        yield row
