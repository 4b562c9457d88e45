"""Letters with everything that can be wrong with rows: broken ones, spellings, duplicates."""

import os
import signal
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from forebay_trainer.config import setting
from forebay_trainer.preparation import Preparation

LETTERS = "abcdefghij"


@dataclass(frozen=True, kw_only=True)
class Config:
    num_rows: int = setting(1000, "that are read")
    chunk_rows: int = setting(64, "that are read at a time")
    num_copies: int = setting(1, "of each training row")
    fault: str = setting("", "step that goes wrong")


def prepare(config: Config) -> Preparation:
    return Words(config)


class Words(Preparation):
    schema: ClassVar = {"word": "string", "tokens": "list[int32]", "number": "int64"}
    unique = "word"
    grows_by: ClassVar = ("num_rows",)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.splits = {"train": 0.8, "dev": 0.1, "test": 0.1}

    def read(self):
        self._fail("read")
        for start in range(0, self.config.num_rows, self.config.chunk_rows):
            numbers = range(start, min(start + self.config.chunk_rows, self.config.num_rows))
            yield pa.table({"word": [word(number) for number in numbers], "number": list(numbers)})

    def clean(self, rows):
        self._fail("clean")
        return rows.filter(pc.not_equal(rows["word"], ""))

    def normalise(self, rows):
        return rows.set_column(0, "word", pc.utf8_lower(rows["word"]))

    def learn(self, rows):
        self._fail("learn")
        counts = Counter(
            letter for table in rows for word in table["word"].to_pylist() for letter in word
        )
        return {"letters": sorted(counts), "num_train": counts.total()}

    def tokenise(self, rows, learnt):
        self._fail("tokenise")
        known = {letter: number for number, letter in enumerate(learnt["letters"])}
        tokens = [[known.get(letter, -1) for letter in word] for word in rows["word"].to_pylist()]
        return rows.append_column("tokens", pa.array(tokens, pa.list_(pa.int32())))

    def augment(self, rows, learnt, random):
        moved = pa.array(random.integers(0, 1000, len(rows)) + 1_000_000)
        return pa.concat_tables(
            [rows] + [rows.set_column(1, "number", moved)] * self.config.num_copies
        )

    def _fail(self, step):
        if self.config.fault == step:
            raise ValueError("the fault that was asked for")
        if self.config.fault == f"killed in {step}":
            os.kill(os.getpid(), signal.SIGKILL)


def word(number):
    """Every tenth is empty, every seventh one that came before, every third written in capitals."""
    if number % 10 == 0:
        return ""
    letters = [LETTERS[(number - 7 * (number % 7 == 0)) // 10**place % 10] for place in range(4)]
    return "".join(letters).upper() if number % 3 == 0 else "".join(letters)
