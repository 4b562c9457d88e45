"""Shakespeare's works as blocks of tokens, each of which is to be told from those before it.

Shape letters: N rows, T predicted tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from forebay_trainer.config import setting
from forebay_trainer.preparation import SPLIT, Preparation
from forebay_trainer.preparation.shakespeare import TEST_WORKS, Shakespeare, works
from forebay_trainer.preparation.tokens import Characters, Pieces, Tokens, tokens_of
from forebay_wire.errors import InvalidRequest

NOTHING: Final = -1
"""After the last token of a work."""

BETWEEN: Final = "\n\n"
"""What stands between two passages."""


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str | None = setting(
        None, "the archive, or a folder of .txt files; none: where `--fetch` puts it"
    )
    test_works: tuple[str, ...] = setting(
        TEST_WORKS, "works to test on; an empty list: one in ten, drawn"
    )
    tokens: Literal["characters", "pieces"] = setting(
        "characters", "what a text is cut into; pieces: byte pairs"
    )
    vocabulary_size: int = setting(1024, "of pieces; characters are as many as there are")
    block_length: int = setting(128, "tokens of a row that are predicted; it has one more")

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise InvalidRequest(f"block_length must be at least 1, not {self.block_length}")
        if self.vocabulary_size <= 256:
            raise InvalidRequest(
                f"vocabulary_size must be above 256, not {self.vocabulary_size}: every byte has a "
                "place in it"
            )


def prepare(config: Config) -> Preparation:
    return Blocks(config)


class Blocks(Shakespeare):
    def __init__(self, config: Config) -> None:
        super().__init__(config.source, config.test_works)
        self._config = config
        self.schema = {  # type: ignore[misc]  # its shape is a setting
            "tokens": ("int32", (config.block_length + 1,)),
            "num_characters": "int32",
        }

    def learn(self, rows: Iterable[pa.Table]) -> Mapping[str, Any]:
        texts = (text + BETWEEN for chunk in rows for text in chunk["text"].to_pylist())
        found: Tokens
        if self._config.tokens == "characters":
            found = Characters.learn(texts)
        else:
            found = Pieces.learn_bytes(texts, self._config.vocabulary_size)
        return {
            **found.about(),
            "vocabulary_size": found.size,
            "block_length": self._config.block_length,
        }

    def tokenise(self, rows: pa.Table, learnt: Mapping[str, Any]) -> pa.Table:
        tokens = tokens_of(learnt)
        tables = [
            block_table(*tokens.encode(BETWEEN.join(texts)), learnt["block_length"], split)
            for _, split, texts in works(rows)
        ]
        return pa.concat_tables(tables)


def block_table(numbers: list[int], lengths: list[int], block_length: int, split: str) -> pa.Table:
    """The blocks of one work as rows, in order."""
    found = [(block, count) for block, count in blocks(numbers, lengths, block_length)]
    tokens_NT = np.stack([block for block, _ in found])
    return pa.table(
        {
            "tokens": pa.FixedShapeTensorArray.from_numpy_ndarray(tokens_NT),
            "num_characters": pa.array([count for _, count in found], pa.int32()),
            SPLIT: [split] * len(found),
        }
    )


def blocks(
    numbers: list[int], lengths: list[int], block_length: int
) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Blocks (T + 1,), and of how many characters their last T tokens are. A block begins with the
    last token of the one before, so that every token but a work's first is predicted once."""
    for start in range(0, max(1, len(numbers) - 1), block_length):
        block = np.full(block_length + 1, NOTHING, np.int32)
        part = numbers[start : start + block_length + 1]
        block[: len(part)] = part
        yield block, sum(lengths[start + 1 : start + block_length + 1])
