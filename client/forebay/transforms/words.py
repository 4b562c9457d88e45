"""Bags of words: how often each word stands in a text, as a row of a tensor."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from forebay.dataset.dataset import Dataset
from forebay.dataset.transforms import Batch
from forebay.transforms.columns import texts_of
from forebay_wire.errors import InvalidRequest

WORD: Final = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text: letters, digits and underscores in line, casefolded."""
    return WORD.findall(text.casefold())


class _Bag(ABC):
    """Counts words at their places. Thread-safe, picklable."""

    who: str

    def __init__(self, column: str, into: str, size: int) -> None:
        self.column = column
        self.into = into
        self.size = size

    def __call__(self, batch: Batch) -> Batch:
        texts = texts_of(batch, self.column, self.who)
        found = [self._places(words_of(text or "")) for text in texts]
        counts = [len(places) for places, _ in found]
        rows = np.repeat(np.arange(len(found), dtype=np.int64), counts)
        places = np.concatenate([np.zeros(0, np.int64), *(places for places, _ in found)])
        weights = np.concatenate([np.zeros(0), *(weights for _, weights in found)])
        flat = np.bincount(rows * self.size + places, weights, minlength=len(found) * self.size)
        bags = flat.astype(np.float32).reshape(len(found), self.size)
        return {**batch, self.into: torch.from_numpy(bags)}

    @abstractmethod
    def _places(self, words: list[str]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of those words that count: where, and how much."""


class CountWords(_Bag):
    """See :func:`count_words`."""

    who = "count_words"

    def __init__(self, column: str, vocabulary: Sequence[str], into: str) -> None:
        self.vocabulary = {word.casefold(): place for place, word in enumerate(vocabulary)}
        if not self.vocabulary or len(self.vocabulary) != len(vocabulary):
            raise InvalidRequest(f"count_words({column!r}): a vocabulary has each word once")
        super().__init__(column, into, len(vocabulary))

    def _places(self, words: list[str]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        known = [self.vocabulary[word] for word in words if word in self.vocabulary]
        return np.array(known, dtype=np.int64), np.ones(len(known))


class HashWords(_Bag):
    """See :func:`hash_words`."""

    who = "hash_words"

    def __init__(self, column: str, size: int, ngrams: int, seed: int, into: str) -> None:
        if size < 1 or ngrams < 1:
            raise InvalidRequest(f"hash_words({column!r}): size and ngrams are at least 1")
        super().__init__(column, into, size)
        self.ngrams = ngrams
        self.seed = seed

    def _places(self, words: list[str]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        grams = [
            " ".join(words[start : start + length])
            for length in range(1, self.ngrams + 1)
            for start in range(len(words) - length + 1)
        ]
        seed = self.seed & 0xFFFFFFFFFFFFFFFF
        hashes = np.array(
            [xxhash.xxh3_64_intdigest(one.encode(), seed) for one in grams], dtype=np.uint64
        )
        signs = np.where(hashes >> np.uint64(63), -1.0, 1.0)
        places = (hashes & np.uint64((1 << 63) - 1)) % np.uint64(self.size)
        return places.astype(np.int64), signs


def count_words(column: str, vocabulary: Sequence[str], *, into: str = "words") -> CountWords:
    """A ``transform=`` that adds a float32 tensor *into* ``(rows, words)``: how often each word of
    *vocabulary* stands in the text in *column*, whatever its case. Other words do not count."""
    return CountWords(column, vocabulary, into)


def hash_words(
    column: str, size: int = 4096, *, ngrams: int = 1, seed: int = 0, into: str = "words"
) -> HashWords:
    """A ``transform=`` that adds a float32 tensor *into* ``(rows, size)``: the words of the text in
    *column*, and up to *ngrams* of them in a row, each counted as +1 or -1 at a place that its hash
    chooses, so that words which meet cancel out on average (Weinberger et al., 2009). The hash
    (XXH3 with *seed*) is the same in all processes and releases."""
    return HashWords(column, size, ngrams, seed, into)


def vocabulary(
    dataset: Dataset,
    column: str,
    size: int = 10_000,
    *,
    min_count: int = 1,
    stop_words: Sequence[str] | frozenset[str] = (),
) -> list[str]:
    """The *size* most frequent words of *column*, those that are equally frequent by the alphabet.

    Reads all of the version or split once: in memory stay its different words. Give it the split
    that is trained on.
    """
    counts: Counter[str] = Counter()
    step = 4096
    for start in range(0, len(dataset), step):
        rows = np.arange(start, min(start + step, len(dataset)), dtype=np.int64)
        texts = dataset.read(dataset.rows_at(rows), [column])
        for text in texts_of(texts, column, "vocabulary"):
            counts.update(words_of(text or ""))
    left_out = {word.casefold() for word in stop_words}
    kept = [(-n, word) for word, n in counts.items() if n >= min_count and word not in left_out]
    return [word for _, word in sorted(kept)[:size]]
